"""The report of a measured training step: compared with a saved one, and as text."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from icae_jax import files
from icae_jax.errors import UserError, counted
from icae_jax.performance.programs import Spec
from icae_jax.performance.subject import GIB
from icae_jax.training.config import TrainConfig

Report = dict[str, Any]

# What --compare compares, with its unit.
COMPARED = {
    "seconds_per_context.median": "s a context",
    "cpu_seconds_per_context.median": "CPU s a context",
    "matmul_share": "of the matmul rate",
    "peak_bytes": "bytes at the peak",
    "compile_seconds": "s to compile",
}


def comparable_fields(spec: Spec) -> dict[str, Any]:
    """What a step's time depends on besides the devices: equal in reports that may be compared."""
    c = spec.config
    questions = {}
    if "qa" in c.objectives.weights:
        questions = {
            "qa_tokens": list(spec.qa_shape),
            "questions": c.data.questions_per_context,
        }
    return {
        "base": c.base,
        "method": c.compression.method,
        "layout": c.compression.layout,
        "k": c.compression.k,
        "context_length": spec.length,
        "objectives": c.objectives.weights,
        **questions,
        "lora_rank": c.lora.rank,
        "lora_targets": list(c.lora.targets),
        "lora_dropout": c.lora.dropout,
        "contexts": c.batch_size,
        "accumulate": c.accumulate,
        "dtype": c.dtype,
        "quantize": c.quantize,
        "remat": c.remat,
        "remat_decoder": c.remat_decoder or c.remat,
        "attention": c.attention,
    }


# --------------------------------------------------------------------------------------- comparing


def read_saved(path: str | os.PathLike, report: Mapping[str, Any]) -> Report:
    """A report that --save wrote. UserError if it is of other devices or another configuration."""
    saved = files.read_json(path, "what icae bench train --save wrote")
    if saved.get("bench") != "train" or not isinstance(saved.get("config"), dict):
        raise UserError(f"--compare {path}: not a result of icae bench train --save; give one")
    # Fields that came later than the saved report had their defaults.
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    pairs = {
        f"config.{name}": (value, saved["config"].get(name, defaults.get(name)))
        for name, value in report["config"].items()
    }
    pairs |= {name: (report[name], saved.get(name)) for name in ("device", "devices")}
    differing = [
        f"{name}: {here!r} here, {there!r} there"
        for name, (here, there) in pairs.items()
        if here != there
    ]
    if differing:
        raise UserError(
            f"--compare {path} was measured otherwise: {'; '.join(differing)}. "
            "Compare like with like"
        )
    needed = [name for name in COMPARED if name != "peak_bytes"]  # which not every device tells
    missing = [name for name in needed if not isinstance(_lookup(saved, name), int | float)]
    if missing:
        raise UserError(f"--compare {path} lacks {missing[0]}; make it anew with --save")
    return saved


def _lookup(report, name):
    for key in name.split("."):
        report = report.get(key) if isinstance(report, dict) else None
    return report


def compare(report: Report, saved: Report) -> dict[str, dict[str, float]]:
    """`{name: {"now", "saved", "ratio"}}` of what may differ between two reports."""
    pairs = {name: (_lookup(report, name), _lookup(saved, name)) for name in COMPARED}
    return {
        name: {"now": now, "saved": before, "ratio": now / before}
        for name, (now, before) in pairs.items()
        if now and before
    }


# -------------------------------------------------------------------------------------------- text


def text(report: Report) -> str:
    """The report for people."""
    rows = [*_subject_rows(report), *_speed_rows(report), *_memory_rows(report)]
    lines = [f"{name:8} {value}" for name, value in rows] + report["notes"]
    if report.get("growth"):
        lines += ["", *_growth_lines(report["growth"])]
    if report.get("compared"):
        lines += ["", f"{'':20}{'now':>14}{'saved':>14}{'ratio':>10}"]
        lines += [
            f"{COMPARED[name]:20}{pair['now']:14.5g}{pair['saved']:14.5g}{pair['ratio']:10.3f}"
            for name, pair in report["compared"].items()
        ]
    return "\n".join(lines)


def _subject_rows(r):
    c = r["config"]
    mesh = ", ".join(f"{axis} {n}" for axis, n in r["mesh"].items())
    objectives = ", ".join(f"{name} {weight:g}" for name, weight in c["objectives"].items())
    questions = ""
    if "questions" in c:
        inputs, labels = c["qa_tokens"]
        questions = f"; {c['questions']} questions of {inputs} tokens, {labels} labels"
    whose = "random weights"
    if not r["random_weights"]:
        whose = f"its own weights, loaded in {r['load_seconds']:.1f} s"
    return [
        ("device", f"{r['devices']} x {r['device']}, mesh {mesh}"),
        (
            "base",
            f"{c['base']}, {whose}; {r['base_format']}, {r['base_bytes'] / GIB:.3f} GiB, "
            f"activations {c['dtype']}",
        ),
        (
            "step",
            f"{counted(c['contexts'], 'contexts')} of {c['context_length']} tokens in "
            f"{counted(c['accumulate'], 'microbatches')}, {r['label_tokens']:,} labels"
            f"{questions}",
        ),
        (
            "method",
            f"{c['method']}, k {c['k']}, {objectives}; LoRA rank {c['lora_rank']}, "
            f"remat {c['remat']} and {c['remat_decoder']}, attention {r['attention']}",
        ),
    ]


def _speed_rows(r):
    counted = "not counted by XLA"
    if r["flops_ratio"] is not None:
        counted = f"XLA counts {r['flops_ratio']:.3f} of that"
    if r["dequantising_flops"]:
        counted += f", and {r['dequantising_flops'] / 1e12:.3g} T of dequantising"
    utilisation = "" if r["mfu"] is None else f", MFU {100 * r['mfu']:.1f} %"
    return [
        (
            "wall",
            f"{ranged(r['seconds_per_context'], ' s a context')}, {r['repeats']} times "
            f"{r['steps']} steps; {r['seconds_per_label_token']:.3g} s a label token",
        ),
        ("CPU", f"{ranged(r['cpu_seconds_per_context'], ' s a context')}, all threads"),
        (
            "rate",
            f"{r['contexts_per_second']:.4g} contexts/s, "
            f"{r['context_tokens_per_second']:,.0f} context tokens/s",
        ),
        ("FLOPs", f"{r['least_flops'] / 1e12:.4g} T a step at least; {counted}"),
        (
            "speed",
            f"{r['flops_per_second'] / 1e12:.4g} TFLOP/s of these, "
            f"{100 * r['matmul_share']:.1f} % of what large matmuls reach here, "
            f"{r['matmul_flops_per_second'] / 1e12:.4g} a device{utilisation}",
        ),
    ]


def _memory_rows(r):
    labels = {
        "device_peak_bytes": "at the peak of the fullest device",
        "process_peak_bytes": "at the peak of the process",
        "argument_bytes": "of arguments",
        "temporary_bytes": "of temporaries",
    }
    memory = ", ".join(
        f"{r['memory'][name] / GIB:.2f} GiB {label}"
        for name, label in labels.items()
        if r["memory"][name] is not None
    )
    cache = {None: "no cache", True: "from the cache", False: "not in the cache"}[r["cache_hit"]]
    start = (
        f"traced in {r['trace_seconds']:.1f} s, compiled in {r['compile_seconds']:.1f} ({cache}), "
        f"the first step done after {r['seconds_to_first_step']:.1f}"
    )
    return [("memory", memory), ("start", start)]


def _growth_lines(rows):
    yield f"{'contexts a step':16}{'s a step':>12}{'to the first':>14}{'to linear':>26}"
    for row in rows:
        if row["seconds"] is None:
            yield f"{row['contexts']:<16}{'does not fit':>12}"
        else:
            yield (
                f"{row['contexts']:<16}{row['seconds']:12.4g}{row['to_first']:14.3f}"
                f"{ranged(row['to_linear']):>26}"
            )


def ranged(spread: Mapping[str, float], unit: str = "") -> str:
    """A median with its range."""
    return f"{spread['median']:.3g}{unit} ({spread['min']:.3g} to {spread['max']:.3g})"
