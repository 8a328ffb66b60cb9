"""The same training step on a base in several formats, side by side: seconds and peak memory.

Every measurement is in a process of its own, whose peak memory is then that format's. The formats
take turns, since a machine's speed changes from minute to minute.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from icae_jax import files
from icae_jax.errors import UserError
from icae_jax.models.schemes import SCHEMES
from icae_jax.performance import bench, bench_report, worker
from icae_jax.performance.subject import GIB
from icae_jax.training.config import TrainConfig

FORMATS = ("float32", "bfloat16", *SCHEMES)


def parse_formats(text: str) -> tuple[str, ...]:
    """The formats of a flag such as "float32,int8". UserError unless they are two known ones."""
    formats = tuple(text.split(","))
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or len(formats) < 2 or len(set(formats)) < len(formats):
        raise UserError(
            f"--bases is {text!r}; give at least two different ones of {', '.join(FORMATS)}"
        )
    return formats


def compare(formats: Sequence[str], options: bench.Options, config: TrainConfig) -> dict[str, Any]:
    """The report as plain values, which is also written to `options.save`.

    options: `repeats` is the number of turns. UserError as `bench.bench`, and if the base is stored
    quantised in another format.
    """
    for name in ("growth", "profile", "compare"):
        if getattr(options, name):
            raise UserError(f"--bases and --{name} exclude each other; give one of them")
    alone = dataclasses.replace(options, repeats=1, save=None)
    turns = []
    for _ in range(options.repeats):
        turns.append({})
        for name in formats:
            request = {"kind": "measure", "name": name, "options": alone, "config": config}
            turns[-1][name] = worker.run("icae_jax.performance.bench_bases", request)
    first = turns[0][formats[0]]
    shared = ("jax", "device", "devices", "mesh", "random_weights", "contexts", "label_tokens")
    report = {
        "bench": "train bases",
        **{name: first[name] for name in shared},
        "config": {k: v for k, v in first["config"].items() if k not in ("dtype", "quantize")},
        "steps": options.steps,
        "repeats": options.repeats,
        "bases": {name: _row(name, formats[0], turns) for name in formats},
    }
    if options.save:
        files.write_json(options.save, report)
    return report


def _row(name, first, turns):
    """What the turns say of a format: medians with their range, and ratios within a turn."""

    def spread(value):
        return bench.spread([value(turn[name]) for turn in turns])

    def to_first(value):
        return statistics.median(value(turn[name]) / value(turn[first]) for turn in turns)

    def seconds(report):
        return report["seconds"]["median"]

    def peak(report):
        return report["peak_bytes"]

    report = turns[0][name]
    known = all(peak(turn[n]) for turn in turns for n in (name, first))
    return {
        "activations": report["config"]["dtype"],
        "base_bytes": report["base_bytes"],
        "load_seconds": spread(lambda report: report["load_seconds"]),
        "seconds": spread(seconds),
        "seconds_to_first": to_first(seconds),
        "peak_bytes": spread(peak) if known else None,
        "peak_to_first": to_first(peak) if known else None,
        "argument_bytes": report["memory"]["argument_bytes"],
        "temporary_bytes": report["memory"]["temporary_bytes"],
        "first_losses": report["first_losses"],
    }


def text(report: dict[str, Any]) -> str:
    """The report for people."""
    c, gib = report["config"], GIB
    whose = "random weights" if report["random_weights"] else "its own weights"
    lines = [
        f"{report['devices']} x {report['device']}; {c['base']}, {whose}; {report['contexts']} "
        f"contexts of {c['context_length']} tokens a step, {report['label_tokens']:,} labels",
        f"{report['repeats']} turns of {report['steps']} steps, each in a process of its own: "
        "median (min to max), and the ratio to the first base",
        f"{'base':10}{'activations':>12}{'GiB':>8}{'s a step':>26}{'ratio':>8}"
        f"{'peak, GiB':>26}{'ratio':>8}{'loaded, s':>11}  first losses",
    ]
    for name, row in report["bases"].items():
        peak = ratio = "unknown"
        if row["peak_bytes"]:
            peak = bench_report.ranged({k: v / gib for k, v in row["peak_bytes"].items()})
            ratio = f"{row['peak_to_first']:.3f}"
        losses = ", ".join(f"{o} {loss:.4f}" for o, loss in row["first_losses"].items())
        lines.append(
            f"{name:10}{row['activations']:>12}{row['base_bytes'] / gib:8.3f}"
            f"{bench_report.ranged(row['seconds']):>26}{row['seconds_to_first']:8.3f}"
            f"{peak:>26}{ratio:>8}{row['load_seconds']['median']:11.1f}  {losses}"
        )
    return "\n".join(lines)


# ---------------------------------------------------------------------------------- in the process


def _measure(name: str, options: bench.Options, config: TrainConfig) -> dict[str, Any]:
    """`bench.bench` of one format."""
    from icae_jax.interop.hub import base as bases

    dtype, scheme = bases.precision(name)
    report, _ = bench.bench(
        options, dataclasses.replace(config, dtype=dtype, quantize=scheme or "")
    )
    if report["base_format"] != name:
        raise UserError(
            f"--bases names {name}, but {config.base} is stored in {report['base_format']}; "
            "give the base that it was made of"
        )
    return report


if __name__ == "__main__":
    worker.answer_request({"measure": _measure})
