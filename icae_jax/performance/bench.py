"""`icae bench train`: what a training step takes on the devices at hand: time, FLOPs, memory, compilation, and where the time goes."""

import contextlib
import dataclasses
import json
import pathlib
import statistics
import time

from icae_jax import files
from icae_jax.errors import UserError
from icae_jax.interop.hub import orbax_copy
from icae_jax.performance import chips, plan, programs
from icae_jax.runtime import sharding
from icae_jax.training import metrics
from icae_jax.training.config import TrainConfig

GIB = plan.GIB
PROFILED = 3  # steps of a trace: a profile's seconds are their mean
DESCRIPTION = """The configuration is given as to icae train, --config FILE[:arg] [--config.field=value …]; no data is needed. A base
that is a folder with weights is loaded; of one that is known by its sizes alone the weights are random, which takes the same time."""


def flags(parser):
    add = parser.add_argument
    parser.description, parser.epilog = parser.description + ".", DESCRIPTION
    add(
        "--contexts",
        type=int,
        help="contexts of a step, all microbatches together; by default batch_size",
    )
    add(
        "--context_length",
        type=int,
        help="tokens of a context; by default the longest of data.context_lengths",
    )
    add("--qa_tokens", metavar="PROMPT,ANSWER", help="tokens of a question with its template, and of its answer with what ends it; "
        "by default arrays of data.max_target_tokens")  # fmt: skip
    add("--steps", type=int, default=10, help="steps of one measurement (default: %(default)s)")
    add(
        "--repeats",
        type=int,
        default=5,
        help="measurements, of which the median and the range are told (default: %(default)s)",
    )
    add(
        "--growth",
        metavar="N,N,…",
        help="measure steps of these numbers of contexts too, such as 1,2,4,8, and hold them against a line",
    )
    add(
        "--profile",
        metavar="DIR",
        help="trace some steps into this folder, and tell the time of each part of the step",
    )
    add("--save", metavar="FILE", help="write what was measured as JSON")
    add(
        "--compare",
        metavar="FILE",
        help="hold what is measured against such a file, of the same configuration on the same devices",
    )
    add("--json", action="store_true", help="print one line of JSON")


# ------------------------------------------------------------------------------------------------------------- reading


def _numbers(text, flag, example, count=None):
    """The positive whole numbers of a flag such as "1,2,4"."""
    parts = text.split(",")
    if not all(p.isdigit() and int(p) for p in parts) or (count and len(parts) != count):
        raise UserError(
            f"{flag} is {text!r}; give {count or 'some'} positive whole numbers, such as {example}"
        )
    return [int(p) for p in parts]


def _qa_shape(args, config):
    """(inputs, labels) of QA targets, None without --qa_tokens."""
    if args.qa_tokens is None:
        return None
    prompt, answer = _numbers(args.qa_tokens, "--qa_tokens", "24,8", 2)
    if "qa" not in config.objectives.weights:
        raise UserError(
            f"--qa_tokens is {args.qa_tokens}, but objectives.qa is 0; give --config.objectives.qa, or leave it away"
        )
    inputs, most = (
        prompt + answer - 1,
        config.data.max_target_tokens,
    )  # the last token is predicted, not read
    if inputs > most:
        raise UserError(f"--qa_tokens {args.qa_tokens} makes targets of {inputs} tokens, longer than data.max_target_tokens, {most}: "
                         f"training leaves these out; give fewer, or --config.data.max_target_tokens={inputs}")  # fmt: skip
    return inputs, answer


def make_specs(args, config, parts):
    """(`programs.Spec` of the flags, those of --growth). parts: into how many the mesh splits a batch. UserError names the flag."""
    for name in ("steps", "repeats"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}; give a positive number")
    if args.context_length is not None and args.context_length < 2:
        raise UserError(f"--context_length is {args.context_length}; give at least 2 tokens")
    model, length = (
        plan.base_sizes(config.base),
        args.context_length or max(config.data.context_lengths),
    )
    qa = _qa_shape(args, config)

    def spec(contexts, flag):
        unit = config.accumulate * parts
        if contexts < 1 or contexts % unit:
            raise UserError(
                f"{flag} is {contexts}; give a multiple of accumulate x mesh.data x mesh.fsdp, {config.accumulate} x {parts}"
            )
        at_once = contexts // config.accumulate
        return programs.Spec(
            "train", dataclasses.replace(config, batch_size=contexts), model, at_once, length, qa
        )

    first = (
        spec(config.batch_size, "batch_size")
        if args.contexts is None
        else spec(args.contexts, "--contexts")
    )
    if (needed := programs.positions_needed(first)) > model.max_position_embeddings:
        raise UserError(
            f"contexts of {length} tokens need {needed} positions, the base has {model.max_position_embeddings}; give a smaller "
            "--context_length, or a base with more"
        )
    growth = _numbers(args.growth, "--growth", "1,2,4,8") if args.growth is not None else []
    return first, [spec(contexts, "--growth") for contexts in growth]


def matters(spec):
    """What a step's time hangs on, beside the devices: equal for results that may be compared."""
    c = spec.config
    qa = (
        {"qa_tokens": list(spec.qa_shape), "questions": c.data.questions_per_context}
        if "qa" in c.objectives.weights
        else {}
    )
    return {
        "base": c.base, "method": c.compression.method, "layout": c.compression.layout, "k": c.compression.k, "context_length": spec.length,
        "objectives": c.objectives.weights, **qa, "lora_rank": c.lora.rank, "lora_targets": list(c.lora.targets),
        "lora_dropout": c.lora.dropout, "contexts": c.batch_size, "accumulate": c.accumulate, "dtype": c.dtype, "remat": c.remat,
        "remat_decoder": c.remat_decoder or c.remat, "attention": c.attention,
    }  # fmt: skip


def read_saved(path, now):
    """What --save wrote. UserError where it is something else, or of other devices or another configuration than `now` (a report)."""
    saved = files.read_json(path, "what icae bench train --save wrote")
    if saved.get("bench") != "train" or not isinstance(saved.get("config"), dict):
        raise UserError(f"--compare {path}: not a result of icae bench train --save; give one")
    defaults = {
        field.name: field.default for field in dataclasses.fields(TrainConfig)
    }  # of fields that came after it was saved
    pairs = {
        f"config.{name}": (value, saved["config"].get(name, defaults.get(name)))
        for name, value in now["config"].items()
    }
    pairs |= {name: (now[name], saved.get(name)) for name in ("device", "devices")}
    if others := [
        f"{name}: {here!r} here, {there!r} there"
        for name, (here, there) in pairs.items()
        if here != there
    ]:
        raise UserError(
            f"--compare {path} was measured otherwise: {'; '.join(others)}. Compare like with like"
        )
    needed = [name for name in COMPARED if name != "peak_bytes"]  # not every device tells it
    if missing := [name for name in needed if not isinstance(_at(saved, name), int | float)]:
        raise UserError(f"--compare {path} lacks {missing[0]}; make it anew with --save")
    return saved


def _load(spec):
    """The base's parameters where its folder holds them, else None."""
    from icae_jax.interop.hub import base

    folder = pathlib.Path(spec.config.base)
    if not (folder.is_dir() and (orbax_copy.is_orbax(folder) or any(folder.glob("*.safetensors*")))):
        return None
    import jax

    placement = sharding.Placement(
        sharding.make_mesh(spec.config.mesh, jax.local_devices()), spec.model
    )
    return base.load_base(
        folder, spec.config.jnp_dtype, placement.parameter, need_tokenizer=False
    ).params


# ----------------------------------------------------------------------------------------------------------- measuring


@contextlib.contextmanager
def _fitting(spec):
    """UserError where the devices' memory does not suffice."""
    import jax

    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"{spec.config.batch_size} contexts of {spec.length} tokens in {spec.config.accumulate} microbatches do not fit into the "
            "devices' memory; give fewer --contexts, a larger --config.accumulate, or --config.remat=full"
        ) from error


def _spread(values):
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def measure(args, spec, params):
    """(what a step takes, as a flat dictionary; the `steps.TrainingStep`, compiled)."""
    from icae_jax.performance import steps

    step = steps.TrainingStep(spec, params)
    began = time.perf_counter()
    compiling = step.compile()
    first = step.run(1)
    compiling["seconds_to_first_step"] = time.perf_counter() - began
    step.run(2)
    memory = step.memory()
    # Before and after: other work on the machine, and its clock, change from one minute to the next.
    rates = [steps.matmul_rate(spec.config.dtype)]
    runs = [step.run(args.steps) for _ in range(args.repeats)]
    rates.append(steps.matmul_rate(spec.config.dtype))
    wall, cpu = (
        [getattr(run, name) / args.steps for run in runs]
        for name in ("wall_seconds", "cpu_seconds")
    )
    seconds, devices = statistics.median(wall), step.mesh.size
    achieved, rate, xla = step.least_flops / seconds, max(rates), step.xla_flops()
    return {
        "attention": step.spec.config.attention, "notes": step.notes,
        "contexts": step.contexts, "context_tokens": step.context_tokens, "label_tokens": step.label_tokens, "first_losses": first.losses,
        "seconds": _spread(wall), "seconds_per_context": _spread([s / step.contexts for s in wall]),
        "cpu_seconds_per_context": _spread([s / step.contexts for s in cpu]), "seconds_per_label_token": seconds / step.label_tokens,
        "contexts_per_second": step.contexts / seconds, "context_tokens_per_second": step.context_tokens / seconds,
        "least_flops": step.least_flops, "xla_flops": xla, "flops_ratio": xla and xla / step.least_flops, "flops_per_second": achieved,
        "matmul_flops_per_second": rate, "matmul_share": achieved / (rate * devices),
        "mfu": metrics.mfu(step.least_flops, seconds, chips.find(step.mesh.devices.flat[0].device_kind), devices),
        "peak_bytes": memory["device_peak_bytes"] or memory["process_peak_bytes"], "memory": memory, **compiling,
    }, step  # fmt: skip


def growth(args, specs, params):
    """Step times at several numbers of contexts: `[{"contexts", "seconds", "to_first", "to_linear"}]`, with None for what is not known
    where one does not fit, alone or beside the others.

    All are measured in turn, `args.repeats` times: the largest for `args.steps` steps, the others for as many contexts. to_first:
    t(n) / t(n1) of one turn, n1 the first number that fits, as the median; to_linear: t(n) / (n / n1 t(n1)), median, min and max, below 1
    where larger steps are cheaper a context.
    """
    from icae_jax.performance import steps

    fitting = {}
    for spec in specs:
        with contextlib.suppress(UserError), _fitting(spec):
            step = steps.TrainingStep(spec, params)
            step.run(2)
            fitting[spec.config.batch_size] = step
    counts = {n: args.steps * max(fitting) // n for n in fitting}
    turns = []
    for _ in range(args.repeats):
        turn = {}
        for n, step in fitting.items():
            with contextlib.suppress(UserError), _fitting(step.spec):
                turn[n] = step.run(counts[n]).wall_seconds / counts[n]
        fitting = {n: fitting[n] for n in turn}
        turns.append(turn)
    table, first = [], next(iter(fitting), None)
    for n in (spec.config.batch_size for spec in specs):
        row = {"contexts": n, "seconds": None, "to_first": None, "to_linear": None}
        if n in fitting:
            ratios = [turn[n] / turn[first] for turn in turns]
            row |= {
                "seconds": statistics.median(turn[n] for turn in turns),
                "to_first": statistics.median(ratios),
            }
            row["to_linear"] = _spread([ratio * first / n for ratio in ratios])
        table.append(row)
    return table


def profiled(step, folder):
    """The `profile.Profile` of some steps, traced into a folder."""
    from icae_jax.performance import profile

    with profile.tracing(folder):
        step.run(PROFILED)
    return profile.read(profile.newest(folder), step.compiled.as_text(), PROFILED)


# -------------------------------------------------------------------------------------------------------------- telling

# What --compare holds against each other, with how it is written.
COMPARED = {
    "seconds_per_context.median": "s a context", "cpu_seconds_per_context.median": "CPU s a context", "matmul_share": "of the matmul rate",
    "peak_bytes": "bytes at the peak", "compile_seconds": "s to compile",
}  # fmt: skip


def _at(report, name):
    for key in name.split("."):
        report = report.get(key) if isinstance(report, dict) else None
    return report


def compare(report, saved):
    """`{name: {"now", "saved", "ratio": now / saved}}` of what two reports of one configuration may differ in."""
    pairs = {name: (_at(report, name), _at(saved, name)) for name in COMPARED}
    return {
        name: {"now": now, "saved": then, "ratio": now / then}
        for name, (now, then) in pairs.items()
        if now and then
    }


def _range(spread, unit=""):
    return (
        f"{spread['median']:.3g}{unit and ' ' + unit} ({spread['min']:.3g} to {spread['max']:.3g})"
    )


def _memory(memory):
    named = {
        "device_peak_bytes": "at the peak of the fullest device", "process_peak_bytes": "at the peak of the process",
        "argument_bytes": "of arguments", "temporary_bytes": "of temporaries",
    }  # fmt: skip
    return ", ".join(
        f"{memory[name] / GIB:.2f} GiB {what}"
        for name, what in named.items()
        if memory[name] is not None
    )


def text(report):
    """The report for people."""
    c, r = report["config"], report
    mesh = ", ".join(f"{axis} {n}" for axis, n in r["mesh"].items())
    objectives = ", ".join(f"{o} {weight:g}" for o, weight in c["objectives"].items())
    asked = (
        f"; {c['questions']} questions of {c['qa_tokens'][0]} tokens, {c['qa_tokens'][1]} labels"
        if "questions" in c
        else ""
    )
    ratio = (
        "not counted by XLA"
        if r["flops_ratio"] is None
        else f"XLA counts {r['flops_ratio']:.3f} of that"
    )
    cache = {None: "no cache", True: "from the cache", False: "not in the cache"}[r["cache_hit"]]
    utilisation = "" if r["mfu"] is None else f", MFU {100 * r['mfu']:.1f} %"
    rows = [
        ("device", f"{r['devices']} x {r['device']}, mesh {mesh}"),
        ("base", f"{c['base']}, {'random weights' if r['random_weights'] else 'its own weights'}, {c['dtype']}"),
        ("step", f"{c['contexts']} contexts of {c['context_length']} tokens in {c['accumulate']} microbatches, {r['label_tokens']:,} labels"
                 f"{asked}"),
        ("method", f"{c['method']}, k {c['k']}, {objectives}; LoRA rank {c['lora_rank']}, "
                   f"remat {c['remat']} and {c['remat_decoder']}, attention {r['attention']}"),
        ("wall", f"{_range(r['seconds_per_context'], 's a context')}, {r['repeats']} times {r['steps']} steps; "
                 f"{r['seconds_per_label_token']:.3g} s a label token"),
        ("CPU", f"{_range(r['cpu_seconds_per_context'], 's a context')}, all threads"),
        ("rate", f"{r['contexts_per_second']:.4g} contexts/s, {r['context_tokens_per_second']:,.0f} context tokens/s"),
        ("FLOPs", f"{r['least_flops'] / 1e12:.4g} T a step at least; {ratio}"),
        ("speed", f"{r['flops_per_second'] / 1e12:.4g} TFLOP/s of these, {100 * r['matmul_share']:.1f} % of what large matmuls reach here, "
                  f"{r['matmul_flops_per_second'] / 1e12:.4g} a device{utilisation}"),
        ("memory", _memory(r["memory"])),
        ("start", f"traced in {r['trace_seconds']:.1f} s, compiled in {r['compile_seconds']:.1f} ({cache}), the first step done after "
                  f"{r['seconds_to_first_step']:.1f}"),
    ]  # fmt: skip
    lines = [f"{name:8} {value}" for name, value in rows] + r["notes"]
    if r.get("growth"):
        lines += [
            "",
            f"{'contexts a step':16}{'s a step':>12}{'to the first':>14}{'to linear':>26}",
        ]
        for row in r["growth"]:
            if row["seconds"] is None:
                lines.append(f"{row['contexts']:<16}{'does not fit':>12}")
            else:
                lines.append(
                    f"{row['contexts']:<16}{row['seconds']:12.4g}{row['to_first']:14.3f}{_range(row['to_linear']):>26}"
                )
    if r.get("compared"):
        lines += ["", f"{'':20}{'now':>14}{'saved':>14}{'ratio':>10}"]
        lines += [
            f"{COMPARED[name]:20}{of['now']:14.5g}{of['saved']:14.5g}{of['ratio']:10.3f}"
            for name, of in r["compared"].items()
        ]
    return "\n".join(lines)


def main(parser, argv):
    """Returns the exit code, 0; UserError on bad input, before anything is loaded or compiled."""
    flags(parser)
    args, rest = parser.parse_known_args(argv)
    config = plan.read_config(rest)
    for flag, path in (("--save", args.save), ("--profile", args.profile)):
        if (
            path
            and pathlib.Path(path).exists()
            and pathlib.Path(path).is_dir() == (flag == "--save")
        ):
            raise UserError(
                f"{flag} {path} is {'a folder' if flag == '--save' else 'a file'}; give another path"
            )
    import jax

    mesh = sharding.make_mesh(config.mesh, jax.local_devices())
    spec, grown = make_specs(args, config, sharding.rows_at_once(mesh))
    report = {
        "bench": "train", "jax": jax.__version__, "device": mesh.devices.flat[0].device_kind, "devices": mesh.size,
        "mesh": dict(mesh.shape), "config": matters(spec), "steps": args.steps, "repeats": args.repeats,
    }  # fmt: skip
    saved = args.compare and read_saved(args.compare, report)
    params = _load(spec)
    report["random_weights"] = params is None
    with _fitting(spec):
        measured, step = measure(args, spec, params)
    report |= measured
    told = args.profile and profiled(step, args.profile)
    params = step.params
    del step
    if grown:
        report["growth"] = growth(args, grown, params)
    if saved:
        report["compared"] = compare(report, saved)
    if told:
        rows = [row._asdict() for row in told.rows]
        report["profile"] = {
            "folder": args.profile,
            "busy_seconds": told.busy_seconds,
            "idle_seconds": told.idle_seconds,
            "rows": rows,
        }
    if args.save:
        files.write_json(args.save, report)
    print(json.dumps(report) if args.json else text(report))
    if told and not args.json:
        print(
            f"\n{told.text()}\n\ntrace in {args.profile}; to look at it: pip install xprof, and xprof {args.profile}"
        )
    return 0
