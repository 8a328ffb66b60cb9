"""`ablate`: checkpoints side by side, such as pretrained or not, AE or LM alone, steps of a run.

After arXiv 2307.06945, table 5. Its judge counts wins, losses and ties of answers; here each
example's own score does.
"""

import dataclasses
from collections.abc import Sequence

from icae_jax.errors import UserError
from icae_jax.evaluation.examples import Example, Text
from icae_jax.evaluation.suites import common
from icae_jax.evaluation.suites.autoencode import Autoencode
from icae_jax.evaluation.suites.common import MEMORY
from icae_jax.evaluation.suites.continuation import Continue
from icae_jax.evaluation.suites.qa import Qa
from icae_jax.inference.compressor import Compressor

Numbers = list[list[float | int]]


class Ablate:
    """Every checkpoint restores each text, and answers its questions or else continues it.

    compressors: of one base, by name; the names are the arms. UserError where there are fewer
    than two.
    """

    name = "ablate"
    METRICS = (
        "f1",
        "em",
        "rougeL",
        "answer_loss",
        "perplexity",
        "ae_loss",
        "bleu",
        "exact_match",
        "prefix_match",
    )
    group_label = "measured on"
    KINDS = (Qa, Continue, Autoencode)

    def __init__(self, compressors: dict[str, Compressor], options: common.Options):
        if len(compressors) < 2:
            raise UserError(
                "--adapter is given once; suite ablate compares several: "
                "--adapter NAME=DIR --adapter NAME=DIR"
            )
        if options.arms:
            raise UserError(
                f"--arms is {options.arms}; the arms of suite ablate are its adapters, "
                "so leave it out"
            )
        memory_only = dataclasses.replace(options, arms=(MEMORY,))
        self.suites = {
            name: {kind.name: kind(compressor, memory_only) for kind in self.KINDS}
            for name, compressor in compressors.items()
        }

    def examples(self, text: Text) -> list[Example] | str:
        """What all checkpoints can be measured on: what one cannot take is left out for all."""
        examples, reason = [], ""
        for kind in ("qa" if text.questions else "continue", "autoencode"):
            of_each = [suites[kind].examples(text) for suites in self.suites.values()]
            why = next((x for x in of_each if isinstance(x, str)), None)
            if (
                why is None
                and len({tuple((e.ids, e.continuation) for e in x) for x in of_each}) > 1
            ):
                why = "texts that the adapters would cut differently (give --context_lengths)"
            if why is None:
                examples += [
                    dataclasses.replace(e, key=f"{kind} {e.key}", group={"measured": kind})
                    for e in of_each[0]
                ]
            reason = why or reason
        return examples or reason

    def main(self, records: Sequence[common.Record]) -> Sequence[common.Record]:
        """All records."""
        return records

    def measure(self, batch: Sequence[Example]) -> list[list[common.Record]]:
        """Each example's records, with an arm for each checkpoint."""
        by_example = [None] * len(batch)
        for kind in dict.fromkeys(e.group["measured"] for e in batch):
            indices = [i for i, e in enumerate(batch) if e.group["measured"] == kind]
            merged = None
            for name, suites in self.suites.items():
                measured = suites[kind].measure([batch[i] for i in indices])
                if merged is None:
                    merged = [list(map(_without_arms, records)) for records in measured]
                for records, into in zip(measured, merged, strict=True):
                    for record, target in zip(records, into, strict=True):
                        if kind == Autoencode.name:  # rougeL is that of answers here
                            record["sums"].pop("rougeL")
                        _copy_arm(record, target, name)
            for i, records in zip(indices, merged, strict=True):
                by_example[i] = records
        return by_example


def _without_arms(record: common.Record) -> common.Record:
    texts = {name: text for name, text in record["texts"].items() if name != MEMORY}
    return {**record, "sums": {}, "sizes": {}, "texts": texts, "ties": {}}


def _copy_arm(record: common.Record, into: common.Record, name: str) -> None:
    """Copies the memory's arm of a record into another record, as the arm `name`."""
    for metric, arms in record["sums"].items():
        into["sums"].setdefault(metric, {})[name] = arms[MEMORY]
    for part in ("sizes", "texts", "ties"):
        if MEMORY in record[part]:
            into[part][name] = record[part][MEMORY]


def pairs(
    records: Sequence[common.Record], metric: str
) -> dict[tuple[str, str], tuple[Numbers, Numbers, list[common.Record]]]:
    """By pair of arms (a, b): the numbers of a, those of b, and the records that have both."""
    with_metric = [r for r in records if metric in r["sums"]]
    arms = list(dict.fromkeys(arm for r in with_metric for arm in r["sums"][metric]))
    result = {}
    for i, a in enumerate(arms):
        for b in arms[i + 1 :]:
            both = [r for r in with_metric if {a, b} <= r["sums"][metric].keys()]
            numbers = ([r["sums"][metric][arm] for r in both] for arm in (a, b))
            result[a, b] = (*numbers, both)
    return result


def better(metric: str, numbers: Sequence[float | int]) -> float:
    """An example's score, its sign such that more is better."""
    score = common.own_score(metric, numbers)
    return score if common.METRICS[metric].better == "higher" else -score
