"""A plan as plain values, with a roofline estimate of its time, and as text."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from icae_jax.performance import programs
from icae_jax.performance.chips import Chip
from icae_jax.performance.programs import Spec
from icae_jax.performance.subject import GIB

Summary = dict[str, Any]


class Counted(NamedTuple):
    """FLOPs of one chip's part of a program.

    matmuls: of the program on a base that is not quantised, beside whose matmuls everything else
    is little. dequantising: what the quantised base adds. on: the mesh that they were counted on.
    """

    matmuls: float
    dequantising: float
    on: Mapping[str, int]


def summarise(
    spec: Spec,
    shape: Mapping[str, int],
    topology: str,
    chip: Chip,
    compiled: Mapping[str, Any],
    counted: Counted,
) -> Summary:
    """The plan as a flat dictionary, as `icae plan --json` prints it.

    compiled: see `plan.compile_for`. All bytes and FLOPs are one chip's.
    """
    c, chip_count = spec.config, shape["data"] * shape["fsdp"] * shape["tensor"]
    least_flops = programs.least(spec) / chip_count
    summary = {
        "config_base": c.base,
        "what": spec.what,
        "topology": topology,
        "chip": chip.kind,
        "chips": chip_count,
        "mesh": dict(shape),
        "remat": c.remat,
        "remat_decoder": c.remat_decoder or c.remat,
        "context_length": spec.length,
        "dtype": c.dtype,
        "quantize": c.quantize,
        "base_bytes_per_chip": programs.base_bytes(spec, shape),
        "contexts": spec.contexts,
        "contexts_per_chip": spec.contexts / chip_count,
        "accumulate": c.accumulate if spec.what == "train" else 1,
        "fits": compiled["fits"],
        "peak_hbm_bytes_per_chip": compiled["peak_bytes"],
        "chip_hbm_bytes": chip.hbm_bytes,
        "evaluation_peak_hbm_bytes_per_chip": compiled.get("evaluation_peak_bytes"),
        "flops_per_chip": counted.matmuls,
        "least_flops_per_chip": least_flops,
        "flops_ratio": counted.matmuls / least_flops,
        "dequantising_flops_per_chip": counted.dequantising,
        "counted_on": dict(counted.on),
    }
    if spec.what == "decode":
        summary |= {"prompt_tokens": programs.PROMPT, "new_tokens": c.data.max_target_tokens}
    if not compiled["fits"]:
        no_estimate = {"estimated_seconds": None, "estimated_mfu": None}
        return summary | {"message": compiled["message"], **no_estimate}
    collectives = _by_kind(compiled["collectives"])
    # A ring sends what it gathers once, and what it sums twice.
    sent_bytes = sum(
        collective["bytes"] * (2 if kind == "all-reduce" else 1)
        for kind, collective in collectives.items()
    )
    parts = {
        "compute": counted.matmuls / chip.bf16_flops,
        "memory": compiled["hbm_bytes"] / chip.hbm_bandwidth,
        "links": sent_bytes / chip.link_bandwidth,
    }
    seconds = max(parts.values())
    return summary | {
        "argument_bytes_per_chip": compiled["argument_bytes"],
        "temporary_bytes_per_chip": compiled["temporary_bytes"],
        "hbm_traffic_bytes_per_chip": compiled["hbm_bytes"],
        "collectives": collectives,
        "estimated_parts": parts,
        "estimated_seconds": seconds,
        "estimated_mfu": least_flops / seconds / chip.bf16_flops,
        "notes": compiled["notes"],
    }


def _by_kind(collectives: Iterable[Sequence[Any]]) -> dict[str, dict[str, Any]]:
    """Adds up collectives of a kind, each (kind, bytes, times, shape)."""
    kinds = {}
    for kind, size, times, shape in collectives:
        total = kinds.setdefault(kind, {"times": 0, "bytes": 0, "largest_bytes": 0, "largest": ""})
        total["times"] += times
        total["bytes"] += size * times
        if size > total["largest_bytes"]:
            total["largest_bytes"], total["largest"] = size, shape
    return kinds


def _mesh(shape):
    return ", ".join(f"{axis} {n}" for axis, n in shape.items())


def text(plan: Summary) -> str:
    """The plan for people."""
    contexts = (
        f"{plan['contexts_per_chip']:g} a chip, {plan['contexts']} at once, "
        f"{plan['context_length']} tokens each"
    )
    if plan["what"] == "decode":
        contexts += f"; {plan['prompt_tokens']} more of a question, {plan['new_tokens']} answered"
    rows = [
        (
            "chips",
            f"{plan['chips']} x {plan['chip']} ({plan['topology']}), mesh {_mesh(plan['mesh'])}",
        ),
        ("contexts", contexts),
    ]
    rows.append(
        (
            "base",
            f"{plan['quantize'] or plan['dtype']}, {_gib(plan['base_bytes_per_chip'])} a chip",
        )
    )
    rows += _memory_rows(plan)
    counted_on = ""
    if plan["counted_on"] != plan["mesh"]:
        counted_on = f", counted on {_mesh(plan['counted_on'])}"
    rows.append(
        (
            "FLOPs",
            f"{plan['flops_per_chip'] / 1e12:.1f} T a chip, {plan['flops_ratio']:.3f} of the least "
            f"possible, {plan['least_flops_per_chip'] / 1e12:.1f} T{counted_on}",
        )
    )
    if plan["quantize"]:
        extra = plan["dequantising_flops_per_chip"]
        share = f"{100 * extra / plan['flops_per_chip']:.2g} % of these"
        rows.append(
            ("dequantising", f"{extra / 1e12:.3g} T a chip, {share}; elementwise, not estimated")
        )
    if plan["fits"]:
        rows.append(("estimate", _estimate(plan)))
    lines = [f"{name:12} {value}" for name, value in rows]
    lines += plan.get("notes", [plan.get("message", "")])
    return "\n".join(lines + [f"to make it fit: {way}" for way in plan.get("advice", [])])


def _gib(size):
    return "unknown" if size is None else f"{size / GIB:.2f} GiB"


def _memory_rows(plan):
    verdict = (
        f"{'yes' if plan['fits'] else 'no'}: peak {_gib(plan['peak_hbm_bytes_per_chip'])} "
        f"of {plan['chip_hbm_bytes'] / GIB:g} GiB a chip"
    )
    if not plan["fits"]:
        return [("fits", verdict)]
    arguments = _gib(plan["argument_bytes_per_chip"])
    rows = [
        ("parameters", f"{arguments} a chip, with optimizer state and batch"),
        ("temporaries", f"{_gib(plan['temporary_bytes_per_chip'])} a chip at the peak"),
        ("fits", verdict),
    ]
    evaluation = plan["evaluation_peak_hbm_bytes_per_chip"]
    if evaluation is not None:
        rows.append(("evaluation", f"held out, between steps: peak {_gib(evaluation)} a chip"))
    for kind, total in plan["collectives"].items():
        largest = f"the largest {total['largest_bytes'] / GIB:.3f} GiB, {total['largest']}"
        rows.append((kind, f"{total['times']} times, {_gib(total['bytes'])} a chip; {largest}"))
    return rows


def _estimate(plan):
    parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in plan["estimated_parts"].items())
    rate = plan["contexts"] * plan["accumulate"] / plan["estimated_seconds"]
    return (
        f"{plan['estimated_seconds']:.2f} s ({parts}), {rate:.1f} contexts/s, "
        f"MFU {100 * plan['estimated_mfu']:.0f} %: "
        "a roofline from published peaks, not a measurement"
    )
