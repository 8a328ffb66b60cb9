"""`ablate`: checkpoints side by side: pretrained against not, AE alone against LM alone against both, or steps of one run.

After arXiv 2307.06945, table 5, whose judge counts wins, losses and ties of answers; here each example's own score does.
"""

import dataclasses

from icae_jax.errors import UserError
from icae_jax.evaluation.suites import common
from icae_jax.evaluation.suites.autoencode import Autoencode
from icae_jax.evaluation.suites.common import MEMORY
from icae_jax.evaluation.suites.continuation import Continue
from icae_jax.evaluation.suites.qa import Qa


class Ablate:
    """Every checkpoint restores every text, answers the questions of those that have any, and continues the others, where long enough.

    compressors: `{name: Compressor}` of one base; the names are the arms. UserError where there are fewer than two.
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

    def __init__(self, compressors, options):
        if len(compressors) < 2:
            raise UserError(
                "--adapter is given once; suite ablate compares several: --adapter NAME=DIR --adapter NAME=DIR"
            )
        if options.arms:
            raise UserError(
                f"--arms is {options.arms}; the arms of suite ablate are its adapters, so leave it out"
            )
        alone = dataclasses.replace(options, arms=(MEMORY,))
        self.suites = {
            name: {kind.name: kind(c, alone) for kind in self.KINDS}
            for name, c in compressors.items()
        }

    def examples(self, text):
        """What every checkpoint can be measured on; a text that one of them cannot take is left out for all."""
        kinds = ("qa", "autoencode") if text.questions else ("continue", "autoencode")
        made, reason = [], ""
        for kind in kinds:
            each = [suites[kind].examples(text) for suites in self.suites.values()]
            wrong = next((one for one in each if isinstance(one, str)), None)
            if (
                wrong is None
                and len({tuple((e.ids, e.continuation) for e in one) for one in each}) > 1
            ):
                wrong = "texts that the adapters would cut differently (give --context_lengths)"
            if wrong is None:
                made += [
                    dataclasses.replace(e, key=f"{kind} {e.key}", group={"measured": kind})
                    for e in each[0]
                ]
            reason = wrong or reason
        return made or reason

    def main(self, records):
        return records

    def measure(self, batch):
        result = [None] * len(batch)
        for kind in dict.fromkeys(e.group["measured"] for e in batch):
            at = [i for i, e in enumerate(batch) if e.group["measured"] == kind]
            merged = None
            for name, suites in self.suites.items():
                found = suites[kind].measure([batch[i] for i in at])
                merged = merged or [
                    [{**one, "sums": {}, "texts": _given(one), "ties": {}} for one in of]
                    for of in found
                ]
                for of, into in zip(found, merged, strict=True):
                    for one, whole in zip(of, into, strict=True):
                        if kind == Autoencode.name:
                            one["sums"].pop(
                                "rougeL"
                            )  # that of answers has the name here; restored texts have BLEU
                        _rename(one, whole, name)
            for i, of in zip(at, merged, strict=True):
                result[i] = of
        return result


def _given(one):
    return {name: text for name, text in one["texts"].items() if name != MEMORY}


def _rename(one, whole, name):
    """Copies the memory's arm of a record into another, as the arm `name`."""
    for metric, arms in one["sums"].items():
        whole["sums"].setdefault(metric, {})[name] = arms[MEMORY]
    for part in ("texts", "ties"):
        if MEMORY in one[part]:
            whole[part][name] = one[part][MEMORY]


def pairs(records, metric):
    """`{(one, other): (examples' numbers of one, of the other, the records)}` of every pair of arms that a metric has."""
    having = [r for r in records if metric in r["sums"]]
    arms = list(dict.fromkeys(arm for r in having for arm in r["sums"][metric]))
    result = {}
    for i, one in enumerate(arms):
        for other in arms[i + 1 :]:
            both = [r for r in having if {one, other} <= r["sums"][metric].keys()]
            result[one, other] = (
                [r["sums"][metric][one] for r in both],
                [r["sums"][metric][other] for r in both],
                both,
            )
    return result


def better(metric, numbers):
    """An example's score so that more is better."""
    score = common.own_score(metric, numbers)
    return score if common.METRICS[metric].better == "higher" else -score
