"""Running a suite: batches, progress kept on disk, processes, and what all examples give together."""

import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import sys

import jax
import numpy as np
from tqdm import tqdm

import icae_jax
from icae_jax import files
from icae_jax.errors import UserError
from icae_jax.evaluation import statistics
from icae_jax.evaluation.suites import ablate, common, qa

PACKAGES = ("jax", "jaxlib", "numpy", "transformers", "sacrebleu", "rouge-score")


def versions():
    """`{package: version}` of what the results depend on."""
    ours = {"icae_jax": icae_jax.__version__, "python": platform.python_version()}
    return ours | {name: importlib.metadata.version(name) for name in PACKAGES}


def content(examples):
    """What a run is about: sha256 over its examples, the names of their sets included."""
    keys = sorted(f"{e.key} {e.id} {e.partner}" for e in examples)
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()


# ----------------------------------------------------------------------------------------------------------- measuring


class Progress:
    """`progress.P.jsonl` in a run's folder: what was run, then a line for each example that is done, by process P.

    What a kill or a power loss left broken counts for nothing, nor does what stands behind it. UserError where another run's progress or
    results are in the folder.
    """

    def __init__(self, folder, identity):
        self.folder, self.identity, self.done = pathlib.Path(folder), identity, {}
        self.path = self.folder / f"progress.{jax.process_index()}.jsonl"
        for path in sorted(self.folder.glob("progress.*.jsonl")):
            lines = _complete_lines(path)
            if not lines:
                continue
            check_identity(path, lines[0], identity)
            self.done |= {line["key"]: line["records"] for line in lines[1:]}
        lines = _complete_lines(self.path) if self.path.exists() else []
        with files.replacing_file(self.path) as tmp:
            tmp.write_text(
                "".join(json.dumps(line) + "\n" for line in lines or [identity]), encoding="utf-8"
            )

    def add(self, examples, records):
        """Keeps the records of some examples, flushed to disk."""
        with open(self.path, "a", encoding="utf-8") as f:
            for example, of in zip(examples, records, strict=True):
                self.done[example.key] = of
                f.write(json.dumps({"key": example.key, "records": of}) + "\n")
            f.flush()
            os.fsync(f.fileno())

    def remove(self):
        """Takes the files away: the results hold all that was in them."""
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


LATER = {
    "tokenizer",
    "weights",
    "stop_ids",
    "plain_template",
}  # which earlier versions did not record


def check_identity(path, found, wanted, part=""):
    """UserError naming the first thing in which the run that a file belongs to differs."""
    for name in dict.fromkeys([*wanted, *found]):
        if name in LATER and name not in found:
            continue
        there, here = found.get(name), wanted.get(name)
        if isinstance(there, dict) and isinstance(here, dict):
            check_identity(path, there, here, f"{part}{name} ")
        elif there != here:
            what = (
                "the examples differ (the data, --limit, or what fits)"
                if name == "examples"
                else ""
            )
            what = what or f"{part}{name} is {there!r} there and {here!r} here"
            raise UserError(f"{path} belongs to another run: {what}; give another --out")


def measure(suite, examples, batch_size, progress):
    """Measures what is not yet done of this process's share, and returns the records of all examples, in their order.

    Processes take batches in turn and need nothing of each other until the end. UserError where a score is not finite.
    """
    batches = [examples[at : at + batch_size] for at in range(0, len(examples), batch_size)]
    mine = batches[jax.process_index() :: jax.process_count()]
    todo = [[e for e in batch if e.key not in progress.done] for batch in mine]
    total, left = sum(map(len, mine)), sum(map(len, todo))
    with tqdm(
        total=total,
        initial=total - left,
        unit="example",
        desc=suite.name,
        disable=jax.process_index() > 0,
        file=sys.stderr,
    ) as bar:
        for batch in todo:
            if batch:
                records = suite.measure(batch)
                _check_finite(records)
                progress.add(batch, records)
                bar.update(len(batch))
    done = gather({e.key: progress.done[e.key] for batch in mine for e in batch})
    return [record for e in examples for record in done[e.key]]


def _check_finite(records):
    for record in (r for of in records for r in of):
        for metric, arms in record["sums"].items():
            for arm, numbers in arms.items():
                if not all(map(math.isfinite, numbers)):
                    raise UserError(
                        f"{metric} of {arm} is not finite on example {record['id']}: the adapter or --base_dtype is broken"
                    )


def gather(done):
    """The union of every process's `{key: records}`, in every process."""
    if jax.process_count() == 1:
        return done
    from jax.experimental import multihost_utils

    mine = np.frombuffer(json.dumps(done).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray([mine.size]))
    every = multihost_utils.process_allgather(np.pad(mine, (0, int(sizes.max()) - mine.size)))
    result = {}
    for row, size in zip(every, sizes.reshape(-1), strict=True):
        result |= json.loads(row[:size].tobytes())
    return result


# --------------------------------------------------------------------------------------------------------- summing up


class Weights:
    """Bootstrap weights by record: those of the same records are drawn once, so that arms are compared on the same draws."""

    def __init__(self, seed):
        self.seed, self._known = seed, {}

    def __call__(self, records, *more):
        key = (*(id(r) for r in records), *more)
        if key not in self._known:
            self._known[key] = statistics.resample(
                [f"{r['set']} {r['cluster']}" for r in records], [self.seed, *more]
            )
        return self._known[key]


def _plain(found):
    """An `Estimate` as JSON has it: None for an end without a bound, as where the full context scores 0 in many replicates."""
    return {
        name: value if math.isfinite(value) else None for name, value in found._asdict().items()
    }


def _estimates(records, metrics, weights):
    """`{metric: {arm: {mean, low, high, n}}}` of some records."""
    result = {}
    for metric in metrics:
        having = [r for r in records if metric in r["sums"]]
        for arm in dict.fromkeys(arm for r in having for arm in r["sums"][metric]):
            rows = [r for r in having if arm in r["sums"][metric]]
            vectors = np.asarray([r["sums"][metric][arm] for r in rows])
            found = statistics.estimate(vectors, common.METRICS[metric].aggregate, weights(rows))
            result.setdefault(metric, {})[arm] = _plain(found)
    return result


def summarise(suite, records, seed):
    """What the records of a suite give together: scores, groups, ties and each example's own scores, as results.json has them."""
    weights = Weights(seed)
    groups = {}
    for kind in dict.fromkeys(kind for r in records for kind in r["group"]):
        values = sorted({r["group"][kind] for r in records if kind in r["group"]}, key=_natural)
        of = {value: [r for r in records if r["group"].get(kind) == value] for value in values}
        groups[kind] = {
            value: _estimates(part, suite.METRICS, weights) for value, part in of.items()
        }
    result = {"scores": _estimates(suite.main(records), suite.METRICS, weights), "groups": groups}
    if suite.name == "qa":
        kept, without = qa.retention(records, weights)
        result["scores"] |= (
            {"retention": {arm: _plain(found) for arm, found in kept.items()}} if kept else {}
        )
        result["sets_without_retention"] = without
    if suite.name == "ablate":
        result["pairs"] = _pairs(records, suite.METRICS, weights)
    ties = {}
    for r in records:
        for arm, count in r["ties"].items():
            one = ties.setdefault(arm, {"texts": 0, "steps": 0})
            one["texts"] += count > 0
            one["steps"] += count
    result["ties"] = ties
    result["examples"] = [
        {
            "id": r["id"], "set": r["set"], "group": r["group"],
            "scores": {m: {arm: common.own_score(m, v) for arm, v in arms.items()} for m, arms in r["sums"].items()},
            "texts": r["texts"], "ties": r["ties"],
        }
        for r in records
    ]  # fmt: skip
    return result


def _natural(value):
    """Sorts "101-200" behind "1-100", and names by their letters."""
    head = value.partition("-")[0]
    return (0, int(head), value) if head.isdigit() else (1, 0, value)


def _pairs(records, metrics, weights):
    """`{metric: {"A against B": {difference of the scores, win, lose, tie in percent of the examples}}}`."""
    result = {}
    for metric in metrics:
        for (one, other), (a, b, rows) in ablate.pairs(records, metric).items():
            found = statistics.difference(
                np.asarray(a), np.asarray(b), common.METRICS[metric].aggregate, weights(rows)
            )
            marks = statistics.win_lose_tie(
                *([ablate.better(metric, v) for v in side] for side in (a, b))
            )
            win_lose_tie = dict(zip(("win", "lose", "tie"), marks, strict=True))
            result.setdefault(metric, {})[f"{one} against {other}"] = {
                "difference": _plain(found),
                **win_lose_tie,
            }
    return result
