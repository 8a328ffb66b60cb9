"""Tables of what `methods.py` measured: scores, costs, and paired differences between arms.

    python launch/experiments/methods_table.py --workdir runs/methods

Intervals are 95 % bootstrap intervals over passages, each with its scores of all seeds: they do not
say how much another seed would change, so the seeds are listed too.
"""

import argparse
import pathlib
import sys
from typing import Any

import numpy as np

from icae_jax import files
from icae_jax.evaluation import report, statistics

# By score: the sums of each passage that it is made of, which of these, and what makes a value.
SCORES = {
    "qa": ("qa", [0, 2], statistics.ratio),  # EM in percent
    "f1": ("qa", [1, 2], statistics.ratio),
    "wrong_qa": ("wrong_qa", [0, 2], statistics.ratio),
    "ae": ("ae", [0, 1], statistics.ratio),  # nats per token
    "wrong_ae": ("wrong_ae", [0, 1], statistics.ratio),
    "bleu": ("bleu", slice(None), statistics.corpus_bleu),
}
COMPARED = ("qa", "ae", "bleu")
# (question, one arm, the other): they differ in one thing.
PAIRS = (
    ("slots: memory tokens see each other", "icae-slots", "icae-causal"),
    ("500x: memory tokens see each other", "x500-slots", "x500"),
    ("pooling: the text sees itself both ways", "pooled-all", "pooled-causal"),
    ("SAC: the text sees itself both ways", "sac", "sac-causal"),
    ("pooling against slots, causal", "pooled-causal", "icae-causal"),
    ("pooling against slots, bidirectional", "pooled-all", "icae-slots"),
    ("SAC against 500x", "sac", "x500"),
    ("SAC against 500x, both causal", "sac-causal", "x500"),
    ("pooling: all k in every step", "pooled-all-sum", "pooled-all"),
    ("decoder LoRA", "icae-slots-lora", "icae-slots"),
    ("decoder LoRA", "pooled-all-lora", "pooled-all"),
    ("decoder LoRA", "x500-lora", "x500"),
)
SHARES = (0.0, 0.5)
AS_PUBLISHED = ("SAC without AE against 500x with it", ("sac", 0.0), ("x500", 0.5))

Arm = tuple[str, float]  # its name and its share of AE
Record = dict[str, Any]  # what a run leaves


class Results:
    """The records of runs, by arm and seed."""

    def __init__(self, records: list[Record]):
        self.by_arm: dict[Arm, dict[int, Record]] = {}
        for record in sorted(records, key=lambda r: (r["arm"], r["share"], r["seed"])):
            of_arm = self.by_arm.setdefault((record["arm"], record["share"]), {})
            of_arm[record["seed"]] = record
        self.ks = sorted({int(k) for record in records for k in record["by_k"]}, reverse=True)

    def vectors(self, arm: Arm, k: int, score: str, seeds: list[int]) -> np.ndarray:
        """Sums of each passage of each seed, `[seeds x passages, d]`."""
        runs, (sums, columns, _) = self.by_arm[arm], SCORES[score]
        of_seeds = [np.asarray(runs[seed]["by_k"][str(k)][sums], float) for seed in seeds]
        return np.concatenate(of_seeds)[:, columns]

    def estimate(self, arm: Arm, k: int, score: str) -> statistics.Estimate:
        """A score of an arm over all of its seeds."""
        seeds = list(self.by_arm[arm])
        vectors = self.vectors(arm, k, score, seeds)
        return statistics.estimate(vectors, SCORES[score][-1], _weights(vectors, seeds))

    def difference(self, one: Arm, other: Arm, k: int, score: str) -> statistics.Estimate:
        """Paired: the same passages and seeds, those that both arms have."""
        seeds = [seed for seed in self.by_arm[one] if seed in self.by_arm[other]]
        a, b = (self.vectors(arm, k, score, seeds) for arm in (one, other))
        return statistics.difference(a, b, SCORES[score][-1], _weights(a, seeds))

    def of_seeds(self, arm: Arm, k: int, score: str, seeds: list[int] | None = None) -> list[float]:
        """A score of each seed by itself, by default of all: what depends on the seed."""
        seeds = list(self.by_arm[arm]) if seeds is None else seeds
        sums = [self.vectors(arm, k, score, [seed]).sum(0) for seed in seeds]
        return [float(SCORES[score][-1](of_seed)) for of_seed in sums]

    def differences_of_seeds(self, one: Arm, other: Arm, k: int, score: str) -> list[float]:
        """The difference at each seed that both arms have, by which data and first values go."""
        seeds = [seed for seed in self.by_arm[one] if seed in self.by_arm[other]]
        both = [self.of_seeds(arm, k, score, seeds) for arm in (one, other)]
        return [a - b for a, b in zip(*both, strict=True)]

    def pairs(self) -> list[tuple[str, Arm, Arm]]:
        """(question, one arm, the other) of arms that both have runs of one seed."""
        names = dict.fromkeys(name for name, _ in self.by_arm)
        pairs = [(f"{name}: AE 0.5 against 0", (name, 0.5), (name, 0.0)) for name in names]
        pairs += [(what, (a, share), (b, share)) for what, a, b in PAIRS for share in SHARES]
        return [
            pair
            for pair in [*pairs, AS_PUBLISHED]
            if self.by_arm.get(pair[1], {}).keys() & self.by_arm.get(pair[2], {}).keys()
        ]


def _weights(vectors, seeds):
    passages = np.arange(len(vectors) // len(seeds))
    return statistics.resample(np.tile(passages, len(seeds)), 0)


# --------------------------------------------------------------------------------- what is printed


def summary(results: Results) -> dict[str, Any]:
    """The numbers of the tables: `arms` and `differences`; intervals are [mean, low, high]."""
    arms = []
    for arm, runs in results.by_arm.items():
        first = next(iter(runs.values()))
        same = ("arm", "share", "rate", "steps", "training_flops")
        arms.append(
            {name: first[name] for name in same}
            | {
                "seeds": list(runs),
                "seconds": float(np.mean([run["seconds"] for run in runs.values()])),
                "by_k": {str(k): _at(results, arm, first, k) for k in results.ks},
            }
        )
    differences = [
        {"question": question, "one": list(one), "other": list(other), "k": k}
        | {"qa_of_seeds": results.differences_of_seeds(one, other, k, "qa")}
        | {score: list(results.difference(one, other, k, score)[:3]) for score in COMPARED}
        for question, one, other in results.pairs()
        for k in results.ks
    ]
    return {"arms": arms, "differences": differences}


def _at(results, arm, run, k):
    """The scores of an arm at k memory tokens, and what its memory costs."""
    of_k = run["by_k"][str(k)]
    return {
        **{score: list(results.estimate(arm, k, score)[:3]) for score in SCORES},
        "qa_of_seeds": results.of_seeds(arm, k, "qa"),
        "tokens": of_k["tokens"],
        "bytes": of_k["bytes"],
        "encoder_flops": run["encoder_flops"][str(k)],
    }


def tables(result: dict[str, Any]) -> str:
    """The summary as text."""
    scored, costs = [], []
    for row in result["arms"]:
        for k, at in row["by_k"].items():
            name = (f"{row['arm']}, AE {row['share']:g}", k)
            scored.append(
                (
                    *name,
                    _interval(at["qa"], 1),
                    " ".join(f"{value:.1f}" for value in at["qa_of_seeds"]),
                    f"{at['wrong_qa'][0]:.1f}",
                    _interval(at["ae"], 3),
                    f"{at['wrong_ae'][0]:.3f}",
                    f"{at['bleu'][0]:.1f}",
                )
            )
            costs.append(
                (
                    *name,
                    f"{at['bytes']:,.0f}",
                    f"{at['encoder_flops'] / 1e6:.0f} M",
                    f"{row['training_flops'] / 1e12:.2f} T",
                    f"{row['rate']:g}",
                    str(row["steps"]),
                    str(len(row["seeds"])),
                )
            )
    differences = [
        (
            d["question"],
            "AE {:g}".format(d["one"][1]),
            str(d["k"]),
            _interval(d["qa"], 1),
            " ".join(f"{value:.1f}" for value in d["qa_of_seeds"]),
            _interval(d["ae"], 3),
            _interval(d["bleu"], 1),
        )
        for d in result["differences"]
    ]
    of_arm = ("arm", "k")
    return "\n\n".join(
        report.text_table(header, rows)
        for header, rows in (
            ((*of_arm, "QA EM", "of seeds", "wrong", "AE loss", "wrong", "BLEU-4"), scored),
            ((*of_arm, "bytes", "encode", "train", "rate", "steps", "seeds"), costs),
            (("difference", "", "k", "QA EM", "of seeds", "AE loss", "BLEU-4"), differences),
        )
    )


def _interval(values, digits):
    mean, low, high = (f"{value:.{digits}f}" for value in values)
    return f"{mean} [{low}, {high}]"


def summarise(workdir: pathlib.Path) -> None:
    """Prints the tables of the runs that are there, and writes their numbers to results.json."""
    paths = sorted((workdir / "runs").glob("*-seed*.json"))
    if not paths:
        print(f"{workdir} has no runs yet")
        return
    result = summary(Results([files.read_json(path, "a run's scores") for path in paths]))
    for name in ("settings", "base"):
        result[name] = files.read_json(workdir / f"{name}.json", name)
    files.write_json(workdir / "results.json", result)
    print(tables(result))


def main() -> int:
    """Prints the tables. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--workdir", required=True, type=pathlib.Path, help="of methods.py")
    summarise(parser.parse_args().workdir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
