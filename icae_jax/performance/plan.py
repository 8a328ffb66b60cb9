"""`icae plan`: what a configuration takes on a TPU slice, compiled for it on any machine: memory, collectives, FLOPs, a time."""

import argparse
import dataclasses
import importlib.util
import json
import math
import pathlib
import re
import sys

from icae_jax.errors import UserError
from icae_jax.performance import chips, programs, worker
from icae_jax.runtime.sharding import AXES, BATCH, MeshConfig
from icae_jax.training import config_file
from icae_jax.training.config import SCRATCH, TrainConfig

GIB = 2**30
MOST_HOST_DEVICES = 256  # beyond, FLOPs are counted on a smaller mesh
DESCRIPTION = "The configuration is given as to icae train, --config FILE[:arg] [--config.field=value …]; no base, data or TPU is needed."


def flags(parser):
    add = parser.add_argument
    parser.description, parser.epilog = parser.description + ".", DESCRIPTION
    add("--topology", required=True, help="TPU slice, such as v5e:4x4, v5p:2x2x2, v6e:4x4")
    what = "a training step, writing memories, or answering behind memories that are read (default: %(default)s)"
    add("--what", choices=programs.WHATS, default="train", help=what)
    add(
        "--contexts_per_chip",
        type=float,
        help="contexts of a microbatch on each chip; by default batch_size / accumulate over the chips",
    )
    add(
        "--context_length",
        type=int,
        help="tokens of a context; by default the longest of data.context_lengths",
    )
    add("--search", action="store_true", help="find the most contexts per chip that fit")
    add(
        "--exact",
        action="store_true",
        help="compile with all effort, as a run does: several times slower, memory within a few per cent",
    )
    add("--json", action="store_true", help="print one line of JSON")


# ------------------------------------------------------------------------------------------------------------- reading


def base_sizes(base):
    """The `ModelConfig` of a base: of a folder that is here, else of a known hub id. UserError with the known ones."""
    from icae_jax.interop.hub import base as bases
    from icae_jax.models.families import sizes

    if not base:
        raise UserError(
            f"base is not set; name it, --config.base=NAME, or a configuration that does; known are {', '.join(sizes.NAMED)}"
        )
    return bases.sizes(base) if pathlib.Path(base).is_dir() else sizes.find(base)


def read_config(argv):
    """The `TrainConfig` of a command line, for which no data need be named. UserError also where the base is not known."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    args, rest = parser.parse_known_args(argv)
    overrides = config_file.overrides(rest) | {"data.train_weights": ()}  # no data are read
    unset = {"data.train": "-", "init_from": SCRATCH}
    config = config_file.load(TrainConfig, args.config, overrides, unset)
    base_sizes(config.base)
    return config


def make_spec(args, config, chip_count):
    """(`programs.Spec`, mesh shape) of the flags. UserError where contexts do not divide over the mesh."""
    model = base_sizes(config.base)
    shape = dict(zip(AXES, config.mesh.shape(chip_count), strict=True))
    counting_mesh(shape)
    parts = shape["data"] * shape["fsdp"]
    if args.context_length is not None and args.context_length < 2:
        raise UserError(f"--context_length is {args.context_length}; give at least 2 tokens")
    length = args.context_length or max(config.data.context_lengths)
    contexts = config.batch_size // config.accumulate
    if args.contexts_per_chip is not None:
        if not 0 < args.contexts_per_chip < math.inf:
            raise UserError(
                f"--contexts_per_chip is {args.contexts_per_chip:g}; give a positive number"
            )
        contexts = round(args.contexts_per_chip * chip_count)
    if args.search:
        contexts = parts
    if contexts < 1 or contexts % parts:
        raise UserError(
            f"{contexts} contexts do not divide over mesh.data x mesh.fsdp, {parts}: give --contexts_per_chip as a multiple of "
            f"{parts / chip_count:g}, or another batch_size"
        )
    spec = programs.Spec(args.what, config, model, contexts, length)
    if (needed := programs.positions_needed(spec)) > model.max_position_embeddings:
        raise UserError(
            f"contexts of {length} tokens need {needed} positions, the base has {model.max_position_embeddings}; give a smaller "
            "--context_length, or a base with more"
        )
    return spec, shape


# ------------------------------------------------------------------------------------------------------------ compiling


def compile_for(spec, topology, exact=False):
    """What the compiler says of a program on a topology, see `worker`; where it does not fit, `fits` is false, the peak what it wanted."""
    request = {
        "kind": "tpu",
        "spec": spec,
        "topology": topology,
        "mesh": spec.config.mesh,
        "exact": exact,
    }
    try:
        return worker.ask(request) | {"fits": True}
    except worker.OutOfMemory as error:
        used = re.search(
            r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm|\(([\d.]+)([KMGT])\) exceeds available HBM",
            str(error),
        )
        unit = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
        peak = float(used[1] or used[3]) * unit[used[2] or used[4]] if used else None
        return {"fits": False, "peak_bytes": peak, "message": str(error).splitlines()[0]}


def with_evaluation(spec, found, topology, exact=False):
    """What the compiler says of a training step (`compile_for`), and of the held-out evaluation between steps; `fits` is whether both do.

    Programs that are no training, and trainings without an evaluation, stay as they are.
    """
    if spec.what != "train" or not spec.config.eval_examples or not found["fits"]:
        return found
    evaluation = compile_for(dataclasses.replace(spec, what=programs.EVALUATE), topology, exact)
    found = found | {"evaluation_peak_bytes": evaluation["peak_bytes"]}
    return (
        found
        if evaluation["fits"]
        else found | {key: evaluation[key] for key in ("fits", "peak_bytes", "message")}
    )


def counting_mesh(shape):
    """A mesh of as many host devices as can be had, a mesh's shape or a smaller one. UserError where there is none."""
    smaller = dict(shape)
    while shape_size(smaller) > MOST_HOST_DEVICES:
        axis = max(BATCH, key=lambda a: smaller[a])
        if smaller[axis] % 2:
            raise UserError(
                f"mesh is {shape}, too large to count FLOPs on {MOST_HOST_DEVICES} host devices; use even sizes"
            )
        smaller[axis] //= 2
    return smaller


def count_flops(spec, shape):
    """(FLOPs of one chip's part, the mesh they were counted on).

    Of the partitioned program with 2 and with 3 layers unrolled, on host devices, continued to all layers. What nothing reads of the
    last layer XLA drops there, unlike in the scanned program: of 500xCompressor's encoder all beyond its K/V.
    """
    counted_on = counting_mesh(shape)
    parts, whole = (s["data"] * s["fsdp"] for s in (counted_on, shape))
    smaller = dataclasses.replace(spec, contexts=spec.contexts // whole * parts)
    request = {
        "kind": "host",
        "specs": [programs.few_layers(smaller, n) for n in (2, 3)],
        "mesh": MeshConfig(**counted_on),
    }
    two, three = worker.ask(request, shape_size(counted_on))["flops"]
    once = two + (three - two) * (spec.model.num_layers - 2)
    if spec.what == "train":
        return once * spec.config.accumulate, counted_on
    return once * programs.least(spec) / programs.least(
        spec, tokens=1
    ), counted_on  # of decoding, the loop's body is counted once


def search(spec, topology, exact, say):
    """(the spec with the most contexts that fit, what the compiler says of it); (the spec, its failure) where not even the fewest fit.

    Beyond a hundred rows on each part of the mesh it is the most within 2 %.
    """
    unit, tried = spec.contexts, {}

    def ask(n):
        tried[n] = compile_for(dataclasses.replace(spec, contexts=n * unit), topology, exact)
        peak = tried[n]["peak_bytes"]
        say(
            f"{n * unit} contexts: {'fit' if tried[n]['fits'] else 'do not fit'}{'' if peak is None else f', peak {peak / GIB:.2f} GiB'}"
        )
        return tried[n]["fits"]

    if not ask(1):
        return spec, tried[1]
    if not ask(2):
        return spec, tried[1]
    while True:
        low = max(n for n, found in tried.items() if found["fits"])
        high = min((n for n, found in tried.items() if not found["fits"]), default=None)
        step = max(1, low // 50)
        if high is not None and high - low <= step:
            return dataclasses.replace(spec, contexts=low * unit), tried[low]
        if high is not None:
            ask((low + high) // 2)
            continue
        # Where the line through the two largest reaches the chip's memory, of which programs get a little less.
        below = max(n for n in tried if n < low)
        slope = (tried[low]["peak_bytes"] - tried[below]["peak_bytes"]) / (low - below)
        room = chips.find(tried[low]["kind"]).hbm_bytes * 0.98 - tried[low]["peak_bytes"]
        ask(min(max(low + int(room / slope), low + step), 16 * low) if slope > 0 else 2 * low)


def advice(spec, shape):
    """What to change where a program does not fit, the least costly first."""
    c, ways = spec.config, []
    parts = shape["data"] * shape["fsdp"]
    rows = spec.contexts // parts
    if spec.what == "train" and {c.remat, c.remat_decoder or c.remat} != {"full"}:
        ways.append(
            "--config.remat=full" + (" --config.remat_decoder=full" if c.remat_decoder else "")
        )
    if rows > 1:
        split = next(n for n in range(2, rows + 1) if rows % n == 0)
        whole_batch = (
            spec.what == "train" and spec.contexts * c.accumulate == c.batch_size
        )  # not --contexts_per_chip
        per_chip = rows // split * parts / shape_size(shape)
        fewer = (
            f"--config.accumulate={split * c.accumulate}"
            if whole_batch
            else f"--contexts_per_chip={per_chip:g}"
        )
        ways.append(f"fewer contexts at once (--search finds how many): {fewer}")
    if shape["data"] > 1:
        ways.append(f"the base over more chips: --config.mesh.data=1 --config.mesh.fsdp={parts}")
    if shape["tensor"] == 1 and shape["fsdp"] % 2 == 0:
        ways.append(
            f"activations over more chips too: --config.mesh.fsdp={shape['fsdp'] // 2} --config.mesh.tensor=2"
        )
    return [*ways, "a larger slice"]


def shape_size(shape):
    return shape["data"] * shape["fsdp"] * shape["tensor"]


# -------------------------------------------------------------------------------------------------------------- telling


def summarise(spec, shape, topology, chip, found):
    """The plan as a flat dictionary, as --json prints it."""
    count, c = shape_size(shape), spec.config
    plan = {
        "config_base": c.base, "what": spec.what, "topology": topology, "chip": chip.kind, "chips": count, "mesh": shape,
        "remat": c.remat, "remat_decoder": c.remat_decoder or c.remat, "context_length": spec.length,
        "contexts": spec.contexts, "contexts_per_chip": spec.contexts / count, "accumulate": c.accumulate if spec.what == "train" else 1,
        "fits": found["fits"], "peak_hbm_bytes_per_chip": found["peak_bytes"], "chip_hbm_bytes": chip.hbm_bytes,
        "evaluation_peak_hbm_bytes_per_chip": found.get("evaluation_peak_bytes"),
    }  # fmt: skip
    if spec.what == "decode":
        plan |= {"prompt_tokens": programs.PROMPT, "new_tokens": c.data.max_target_tokens}
    flops, counted_on = count_flops(spec, shape)
    least = programs.least(spec) / count
    plan |= {
        "flops_per_chip": flops,
        "least_flops_per_chip": least,
        "flops_ratio": flops / least,
        "counted_on": counted_on,
    }
    if not found["fits"]:
        told = {"message": found["message"], "advice": advice(spec, shape)}
        return plan | told | {"estimated_seconds": None, "estimated_mfu": None}
    kinds = {}
    for kind, size, times, text in found["collectives"]:
        one = kinds.setdefault(kind, {"times": 0, "bytes": 0, "largest_bytes": 0, "largest": ""})
        one["times"], one["bytes"] = one["times"] + times, one["bytes"] + size * times
        if size > one["largest_bytes"]:
            one["largest_bytes"], one["largest"] = size, text
    # A ring sends what it gathers once, and what it sums twice.
    sent = sum(of["bytes"] * (2 if kind == "all-reduce" else 1) for kind, of in kinds.items())
    parts = {
        "compute": flops / chip.bf16_flops,
        "memory": found["hbm_bytes"] / chip.hbm_bandwidth,
        "links": sent / chip.link_bandwidth,
    }
    seconds = max(parts.values())
    return plan | {
        "argument_bytes_per_chip": found["argument_bytes"], "temporary_bytes_per_chip": found["temporary_bytes"],
        "hbm_traffic_bytes_per_chip": found["hbm_bytes"], "collectives": kinds, "estimated_parts": parts, "estimated_seconds": seconds,
        "estimated_mfu": least / seconds / chip.bf16_flops, "notes": found["notes"],
    }  # fmt: skip


def text(plan):
    """The plan for people."""
    mesh = ", ".join(f"{axis} {n}" for axis, n in plan["mesh"].items())
    peak = plan["peak_hbm_bytes_per_chip"]
    behind = (
        f"; {plan['prompt_tokens']} more of a question, {plan['new_tokens']} answered"
        if plan["what"] == "decode"
        else ""
    )
    rows = [
        ("chips", f"{plan['chips']} x {plan['chip']} ({plan['topology']}), mesh {mesh}"),
        ("contexts", f"{plan['contexts_per_chip']:g} a chip, {plan['contexts']} at once, {plan['context_length']} tokens each{behind}"),
        ("fits", f"{'yes' if plan['fits'] else 'no'}: peak {'unknown' if peak is None else f'{peak / GIB:.2f} GiB'} "
                 f"of {plan['chip_hbm_bytes'] / GIB:g} GiB a chip"),
    ]  # fmt: skip
    if plan["fits"]:
        rows[-1:] = [
            (
                "parameters",
                f"{plan['argument_bytes_per_chip'] / GIB:.2f} GiB a chip, with optimizer state and batch",
            ),
            ("temporaries", f"{plan['temporary_bytes_per_chip'] / GIB:.2f} GiB a chip at the peak"),
            rows[-1],
        ]
        if plan["evaluation_peak_hbm_bytes_per_chip"] is not None:
            rows.append(
                (
                    "evaluation",
                    f"held out, between steps: peak {plan['evaluation_peak_hbm_bytes_per_chip'] / GIB:.2f} GiB a chip",
                )
            )
        for kind, of in plan["collectives"].items():
            most = f"the largest {of['largest_bytes'] / GIB:.3f} GiB, {of['largest']}"
            rows.append((kind, f"{of['times']} times, {of['bytes'] / GIB:.2f} GiB a chip; {most}"))
    where = (
        ""
        if plan["counted_on"] == plan["mesh"]
        else f", counted on {', '.join(f'{a} {n}' for a, n in plan['counted_on'].items())}"
    )
    least, flops = plan["least_flops_per_chip"], plan["flops_per_chip"]
    rows.append(
        (
            "FLOPs",
            f"{flops / 1e12:.1f} T a chip, {plan['flops_ratio']:.3f} of the least possible, {least / 1e12:.1f} T{where}",
        )
    )
    if plan["fits"]:
        parts = ", ".join(
            f"{name} {seconds:.2f}" for name, seconds in plan["estimated_parts"].items()
        )
        rate = plan["contexts"] * plan["accumulate"] / plan["estimated_seconds"]
        rows.append((
            "estimate", f"{plan['estimated_seconds']:.2f} s ({parts}), {rate:.1f} contexts/s, MFU {100 * plan['estimated_mfu']:.0f} %: "
            "a roofline from published peaks, not a measurement",
        ))  # fmt: skip
    lines = [f"{name:12} {value}" for name, value in rows] + plan.get(
        "notes", [plan.get("message", "")]
    )
    return "\n".join(lines + [f"to make it fit: {way}" for way in plan.get("advice", [])])


def main(parser, argv):
    """Returns the exit code: 0 where it fits, 1 where it does not; UserError on bad input and without libtpu."""
    flags(parser)
    args, rest = parser.parse_known_args(argv)
    config = read_config(rest)
    if args.contexts_per_chip is not None and args.search:
        raise UserError("--contexts_per_chip and --search exclude each other; give one of them")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "icae plan needs libtpu, which compiles for TPUs on any machine: pip install 'icae_jax[tpu]'"
        )
    about = worker.ask({"kind": "topology", "topology": args.topology})
    chip = chips.find(about["kind"])
    if chip is None:
        raise UserError(
            f"--topology {args.topology}: no published peaks are known of {about['kind']}"
        )
    spec, shape = make_spec(args, config, about["chips"])

    def say(line):
        print(line, file=sys.stderr, flush=True)

    if args.search:
        spec, found = search(spec, args.topology, args.exact, say)
    else:
        found = compile_for(spec, args.topology, args.exact)
    found = with_evaluation(spec, found, args.topology, args.exact)
    plan = summarise(spec, shape, args.topology, chip, found)
    print(json.dumps(plan) if args.json else text(plan))
    return 0 if plan["fits"] else 1
