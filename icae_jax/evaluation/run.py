"""Runs a suite: batches, progress on disk, several processes; then sums up all records."""

import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

import icae_jax
from icae_jax import files
from icae_jax.errors import UserError
from icae_jax.evaluation import statistics
from icae_jax.evaluation.examples import Example
from icae_jax.evaluation.suites import ablate, common, qa
from icae_jax.evaluation.suites.common import Record
from icae_jax.runtime import distributed

PACKAGES = ("jax", "jaxlib", "numpy", "transformers", "sacrebleu", "rouge-score")
SAME_SCORES_SINCE = "0.1.0"  # the first version whose examples and scores are those of this one
# Parts of an identity that earlier versions did not record.
NEW_IN_IDENTITY = {"tokenizer", "weights", "stop_ids", "plain_template"}


def versions() -> dict[str, str]:
    """Versions of the packages that results depend on."""
    ours = {"icae_jax": icae_jax.__version__, "python": platform.python_version()}
    return ours | {name: importlib.metadata.version(name) for name in PACKAGES}


def content(examples: Iterable[Example]) -> str:
    """sha256 over a run's examples, the names of their sets included."""
    keys = sorted(f"{e.key} {e.id} {e.partner}" for e in examples)
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()


# --------------------------------------------------------------------------------------- measuring


class Progress:
    """`progress.P.jsonl` in a run's folder, written by process P.

    Its first line is the run's identity; a line for each finished example follows. Lines from the
    first broken one on (a kill, a power loss) are ignored. UserError where the folder holds
    another run's progress.
    """

    def __init__(self, folder: str | os.PathLike, identity: dict[str, Any]):
        self.folder, self.identity = pathlib.Path(folder), identity
        self.done: dict[str, list[Record]] = {}
        self.path = self.folder / f"progress.{jax.process_index()}.jsonl"
        for path in sorted(self.folder.glob("progress.*.jsonl")):
            lines = _complete_lines(path)
            if not lines:
                continue
            check_identity(path, lines[0], identity)
            self.done |= {line["key"]: line["records"] for line in lines[1:]}
        lines = _complete_lines(self.path) if self.path.exists() else []
        with files.replacing_file(self.path) as tmp:
            texts = [json.dumps(line) + "\n" for line in lines or [identity]]
            tmp.write_text("".join(texts), encoding="utf-8")

    def add(self, examples: Sequence[Example], records: Sequence[list[Record]]) -> None:
        """Keeps the records of some examples, flushed to disk."""
        with open(self.path, "a", encoding="utf-8") as f:
            for example, of_example in zip(examples, records, strict=True):
                self.done[example.key] = of_example
                f.write(json.dumps({"key": example.key, "records": of_example}) + "\n")
            f.flush()
            os.fsync(f.fileno())

    def remove(self) -> None:
        """Deletes the files, once the results hold all that was in them."""
        for path in self.folder.glob("progress.*.jsonl"):
            path.unlink(missing_ok=True)


def _complete_lines(path):
    """The lines of a progress file up to the first broken one."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not isinstance(line, dict) or (lines and not line.keys() >= {"key", "records"}):
            break
        lines.append(line)
    return lines


def check_identity(path: str | os.PathLike, recorded: dict, wanted: dict, group: str = "") -> None:
    """UserError that names the first difference between a file's run and this one."""
    for name in dict.fromkeys([*wanted, *recorded]):
        if name in NEW_IN_IDENTITY and name not in recorded:
            continue
        there, here = recorded.get(name), wanted.get(name)
        if isinstance(there, dict) and isinstance(here, dict):
            check_identity(path, there, here, f"{group}{name} ")
        elif there != here:
            what = f"{group}{name} is {there!r} there and {here!r} here"
            if name == "examples":
                what = "the examples differ (the data, --limit, or what fits)"
            raise UserError(f"{path} belongs to another run: {what}; give another --out")


def measure(
    suite: common.Measurement, examples: Sequence[Example], batch_size: int, progress: Progress
) -> list[Record]:
    """Measures what is not done of this process's share; returns all examples' records, in order.

    Processes take batches in turn and communicate only at the end. UserError where a score is
    not finite.
    """
    batches = [examples[i : i + batch_size] for i in range(0, len(examples), batch_size)]
    own = batches[jax.process_index() :: jax.process_count()]
    to_do = [[e for e in batch if e.key not in progress.done] for batch in own]
    total, left = sum(map(len, own)), sum(map(len, to_do))
    with tqdm(
        total=total,
        initial=total - left,
        unit="example",
        desc=suite.name,
        disable=jax.process_index() > 0,
        file=sys.stderr,
    ) as bar:
        for batch in filter(None, to_do):
            records = suite.measure(batch)
            _check_finite(records)
            progress.add(batch, records)
            bar.update(len(batch))
    done = gather({e.key: progress.done[e.key] for batch in own for e in batch})
    return [record for e in examples for record in done[e.key]]


def _check_finite(records):
    for record in (record for of_example in records for record in of_example):
        for metric, arms in record["sums"].items():
            for arm, numbers in arms.items():
                if not all(map(math.isfinite, numbers)):
                    raise UserError(
                        f"{metric} of {arm} is not finite on example {record['id']}: "
                        "the adapter or --base_dtype is broken"
                    )


def gather(done: dict[str, list[Record]]) -> dict[str, list[Record]]:
    """The union of every process's records by example, in every process."""
    union = {}
    for text in distributed.gathered(json.dumps(done)):  # as text, which keeps the arms' order
        union |= json.loads(text)
    return union


# --------------------------------------------------------------------------------------- summing up


class Weights:
    """Bootstrap weights by records, drawn once, so that arms are compared on the same draws."""

    def __init__(self, seed: int):
        self.seed, self._cache = seed, {}

    def __call__(self, records: Sequence[Record], *more: int) -> UInt8[np.ndarray, "replicates n"]:
        """Weights of these records. more: makes the draws differ from others of the records."""
        key = (*(id(r) for r in records), *more)
        if key not in self._cache:
            clusters = [f"{r['set']} {r['cluster']}" for r in records]
            self._cache[key] = statistics.resample(clusters, [self.seed, *more])
        return self._cache[key]


def _as_json(estimate: statistics.Estimate) -> dict[str, float | int | None]:
    """An `Estimate` for JSON: None for an end without a bound.

    Such as where the full context scores 0 in many replicates.
    """
    return {name: x if math.isfinite(x) else None for name, x in estimate._asdict().items()}


def _estimates(records, metrics, weights):
    """`{metric: {arm: {mean, low, high, n}}}` of some records."""
    estimates = {}
    for metric in metrics:
        with_metric = [r for r in records if metric in r["sums"]]
        for arm in dict.fromkeys(arm for r in with_metric for arm in r["sums"][metric]):
            with_arm = [r for r in with_metric if arm in r["sums"][metric]]
            vectors = np.asarray([r["sums"][metric][arm] for r in with_arm])
            aggregate = common.METRICS[metric].aggregate
            estimate = statistics.estimate(vectors, aggregate, weights(with_arm))
            estimates.setdefault(metric, {})[arm] = _as_json(estimate)
    return estimates


def summarise(suite: common.Measurement, records: Sequence[Record], seed: int) -> dict[str, Any]:
    """Scores of all, by group, ties, and each example's own scores, as results.json has them."""
    weights = Weights(seed)
    result = {
        "scores": _estimates(suite.main(records), suite.METRICS, weights),
        "groups": _by_group(records, suite.METRICS, weights),
        "sizes": _sizes(suite.main(records)),
    }
    if suite.name == "qa":
        for name, full in (("retention", common.FULL), ("retention_tuned", common.TUNED)):
            retained, without = qa.retention(records, weights, full)
            if retained:
                by_arm = {arm: _as_json(estimate) for arm, estimate in retained.items()}
                result["scores"][name] = by_arm
            if without or full == common.FULL:
                result[f"sets_without_{name}"] = without
    if suite.name == "ablate":
        result["pairs"] = _pairs(records, suite.METRICS, weights)
    return result | {"ties": _ties(records), "examples": list(map(_own_scores, records))}


def _by_group(records, metrics, weights):
    """`{kind: {value: estimates}}` of the records of each group."""
    groups = {}
    for kind in dict.fromkeys(kind for r in records for kind in r["group"]):
        values = {r["group"][kind] for r in records if kind in r["group"]}
        groups[kind] = {
            value: _estimates(
                [r for r in records if r["group"].get(kind) == value], metrics, weights
            )
            for value in sorted(values, key=_natural)
        }
    return groups


def _sizes(records):
    """`{arm: {"tokens", "bytes"}}`: what an arm reads of memory for an example, in the mean.

    Bytes are None for an arm without a memory.
    """
    by_arm = {}
    for record in records:
        for arm, size in record.get("sizes", {}).items():  # progress of earlier versions has none
            by_arm.setdefault(arm, []).append(size)
    means = {}
    for arm, sizes in by_arm.items():
        tokens, nbytes = zip(*sizes, strict=True)
        means[arm] = {
            "tokens": float(np.mean(tokens)),
            "bytes": None if None in nbytes else float(np.mean(nbytes)),
        }
    return means


def _ties(records):
    """By arm: texts with a tie between the two best tokens, and steps that had one."""
    ties = {}
    for record in records:
        for arm, steps in record["ties"].items():
            of_arm = ties.setdefault(arm, {"texts": 0, "steps": 0})
            of_arm["texts"] += steps > 0
            of_arm["steps"] += steps
    return ties


def _own_scores(record):
    """A record with scores in place of the numbers they are made of."""
    scores = {
        metric: {arm: common.own_score(metric, numbers) for arm, numbers in arms.items()}
        for metric, arms in record["sums"].items()
    }
    fields = {name: record[name] for name in ("id", "set", "group")}
    return fields | {"scores": scores, "texts": record["texts"], "ties": record["ties"]}


def _natural(value: str):
    """Sorts "101-200" behind "1-100", and names by their letters."""
    head = value.partition("-")[0]
    return (0, int(head), value) if head.isdigit() else (1, 0, value)


def _pairs(records, metrics, weights):
    """`{metric: {"A against B": {"difference", "win", "lose", "tie"}}}`, shares in percent."""
    result = {}
    for metric in metrics:
        for (a, b), (numbers_a, numbers_b, both) in ablate.pairs(records, metric).items():
            difference = statistics.difference(
                np.asarray(numbers_a),
                np.asarray(numbers_b),
                common.METRICS[metric].aggregate,
                weights(both),
            )
            scores_a, scores_b = (
                [ablate.better(metric, numbers) for numbers in side]
                for side in (numbers_a, numbers_b)
            )
            shares = statistics.win_lose_tie(scores_a, scores_b)
            result.setdefault(metric, {})[f"{a} against {b}"] = {
                "difference": _as_json(difference),
                **dict(zip(("win", "lose", "tie"), shares, strict=True)),
            }
    return result
