"""Measures a training step on the devices of this machine.

Reports time, FLOPs, memory, compilation, and where the time goes.
"""

import contextlib
import dataclasses
import pathlib
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jaxtyping import PyTree

from icae_jax import files
from icae_jax.errors import UserError
from icae_jax.interop.hub import base as bases
from icae_jax.interop.hub import locations, orbax_copy
from icae_jax.performance import bench_report, chips, profile, steps, subject, utilisation
from icae_jax.performance.programs import Spec
from icae_jax.runtime import profiler, sharding
from icae_jax.training.config import TrainConfig

PROFILED_STEPS = 3  # a profile's seconds are their mean


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured. Each field is a flag of the same name.

    contexts: of a step, all microbatches together; by default batch_size. context_length: in
    tokens; by default the longest of data.context_lengths. qa_tokens: (tokens of a question with
    its template, of its answer with the stop token). steps: of one measurement. repeats:
    measurements. growth: numbers of contexts to measure too. profile: folder for a trace. save:
    file for the report. compare: a saved report.
    """

    contexts: int | None = None
    context_length: int | None = None
    qa_tokens: tuple[int, int] | None = None
    steps: int = 10
    repeats: int = 5
    growth: tuple[int, ...] = ()
    profile: str | None = None
    save: str | None = None
    compare: str | None = None

    def __post_init__(self):
        for name in ("steps", "repeats"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}; give a positive number")
        if self.save and pathlib.Path(self.save).is_dir():
            raise UserError(f"--save {self.save} is a folder; give another path")
        if self.profile and pathlib.Path(self.profile).is_file():
            raise UserError(f"--profile {self.profile} is a file; give another path")


def bench(options: Options, config: TrainConfig) -> tuple[dict[str, Any], str]:
    """(report as plain values, the profile as text or ""). Writes the report to `options.save`.

    UserError on bad input, before anything is loaded or compiled.
    """
    mesh = sharding.make_mesh(config.mesh, jax.local_devices())
    spec, grown = make_specs(options, config, sharding.rows_at_once(mesh))
    report = {
        "bench": "train",
        "jax": jax.__version__,
        "device": mesh.devices.flat[0].device_kind,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "config": bench_report.comparable_fields(spec),
        "steps": options.steps,
        "repeats": options.repeats,
    }
    saved = bench_report.read_saved(options.compare, report) if options.compare else None
    began = time.perf_counter()
    base = _load_base(spec)
    if base is not None:  # perhaps it is stored quantised
        spec = _quantized(spec, base.quantize)
        grown = [_quantized(larger, base.quantize) for larger in grown]
    params = base and base.params
    report |= {"random_weights": base is None, "load_seconds": time.perf_counter() - began}
    with fitting(spec):
        measured, step = measure(options, spec, params)
    report |= measured
    traced = _profile(step, options.profile) if options.profile else None
    params = step.params
    del step  # its state and batch, before other sizes are measured
    if grown:
        report["growth"] = growth(options, grown, params)
    if saved:
        report["compared"] = bench_report.compare(report, saved)
    if traced:
        report["profile"] = {
            "folder": options.profile,
            "busy_seconds": traced.busy_seconds,
            "idle_seconds": traced.idle_seconds,
            "rows": [row._asdict() for row in traced.rows],
        }
    if options.save:
        files.write_json(options.save, report)
    return report, traced.text() if traced else ""


# ------------------------------------------------------------------------------------------- input


def _qa_shape(options: Options, config: TrainConfig) -> tuple[int, int] | None:
    """(inputs, labels) of QA targets; None without --qa_tokens."""
    if options.qa_tokens is None:
        return None
    prompt, answer = options.qa_tokens
    if "qa" not in config.objectives.weights:
        raise UserError(
            f"--qa_tokens is {prompt},{answer}, but objectives.qa is 0; "
            "give --config.objectives.qa, or leave it away"
        )
    inputs = prompt + answer - 1  # the last token is predicted, not read
    most = config.data.max_target_tokens
    if inputs > most:
        raise UserError(
            f"--qa_tokens {prompt},{answer} makes targets of {inputs} tokens, longer than "
            f"data.max_target_tokens, {most}: training leaves these out; "
            f"give fewer, or --config.data.max_target_tokens={inputs}"
        )
    return inputs, answer


def make_specs(options: Options, config: TrainConfig, parts: int) -> tuple[Spec, list[Spec]]:
    """(what is measured, what --growth adds). parts: into how many the mesh splits a batch.

    UserError names the flag.
    """
    length = subject.context_length(options.context_length, config)
    model, qa = subject.base_sizes(config.base), _qa_shape(options, config)

    def spec(contexts, flag):
        unit = config.accumulate * parts
        if contexts < 1 or contexts % unit:
            raise UserError(
                f"{flag} is {contexts}; give a multiple of accumulate x mesh.data x mesh.fsdp, "
                f"{config.accumulate} x {parts}"
            )
        microbatch = contexts // config.accumulate
        sized = dataclasses.replace(config, batch_size=contexts)
        return Spec("train", sized, model, microbatch, length, qa)

    if options.contexts is None:
        first = spec(config.batch_size, "batch_size")
    else:
        first = spec(options.contexts, "--contexts")
    subject.check_positions(first)
    return first, [spec(contexts, "--growth") for contexts in options.growth]


def _load_base(spec: Spec) -> bases.Base | None:
    """The base if its weights are on this machine, else None."""
    path, c = pathlib.Path(spec.config.base), spec.config
    if not locations.is_gguf(c.base) and not (
        path.is_dir() and (orbax_copy.is_orbax(path) or any(path.glob("*.safetensors*")))
    ):
        return None
    mesh = sharding.make_mesh(c.mesh, jax.local_devices())
    placement = sharding.Placement(mesh, spec.model)
    return bases.load_base(
        c.base, c.jnp_dtype, placement.parameter, need_tokenizer=False, quantize=c.quantize
    )


def _quantized(spec: Spec, scheme: str) -> Spec:
    return dataclasses.replace(spec, config=dataclasses.replace(spec.config, quantize=scheme))


# --------------------------------------------------------------------------------------- measuring


@contextlib.contextmanager
def fitting(spec: Spec) -> Iterator[None]:
    """Turns the devices' lack of memory into a UserError."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"{spec.config.batch_size} contexts of {spec.length} tokens in "
            f"{spec.config.accumulate} microbatches do not fit into the devices' memory; "
            "give fewer --contexts, a larger --config.accumulate, or --config.remat=full"
        ) from error


def spread(values: Sequence[float]) -> dict[str, float]:
    """Their median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def measure(
    options: Options, spec: Spec, params: PyTree | None
) -> tuple[dict[str, Any], steps.TrainingStep]:
    """(what a step takes, as a flat dictionary; the compiled step)."""
    step = steps.TrainingStep(spec, params)
    began = time.perf_counter()
    compilation = step.compile()
    first = step.run(1)
    compilation["seconds_to_first_step"] = time.perf_counter() - began
    step.run(2)
    memory = step.memory()
    # Before and after: other work on the machine, and its clock, change from minute to minute.
    rates = [steps.matmul_rate(spec.config.dtype)]
    runs = [step.run(options.steps) for _ in range(options.repeats)]
    rates.append(steps.matmul_rate(spec.config.dtype))
    wall = [run.wall_seconds / options.steps for run in runs]
    cpu = [run.cpu_seconds / options.steps for run in runs]
    seconds, devices, rate = statistics.median(wall), step.mesh.size, max(rates)
    flops_per_second, xla_flops = step.least_flops / seconds, step.xla_flops()
    dequantising = 0.0
    if spec.config.quantize and xla_flops is not None:
        dequantising = step.xla_flops(spec.config.quantize) - xla_flops
    chip = chips.find(step.mesh.devices.flat[0].device_kind)
    measured = {
        "attention": step.spec.config.attention,
        "base_format": spec.config.quantize or spec.config.dtype,
        "base_bytes": sum(x.nbytes for x in jax.tree.leaves(step.params)),
        "notes": step.notes,
        "contexts": step.contexts,
        "context_tokens": step.context_tokens,
        "label_tokens": step.label_tokens,
        "first_losses": first.losses,
        "seconds": spread(wall),
        "seconds_per_context": spread([s / step.contexts for s in wall]),
        "cpu_seconds_per_context": spread([s / step.contexts for s in cpu]),
        "seconds_per_label_token": seconds / step.label_tokens,
        "contexts_per_second": step.contexts / seconds,
        "context_tokens_per_second": step.context_tokens / seconds,
        "least_flops": step.least_flops,
        "xla_flops": xla_flops,
        "flops_ratio": xla_flops and xla_flops / step.least_flops,
        "dequantising_flops": dequantising,
        "flops_per_second": flops_per_second,
        "matmul_flops_per_second": rate,
        "matmul_share": flops_per_second / (rate * devices),
        "mfu": utilisation.mfu(step.least_flops, seconds, chip, devices),
        "peak_bytes": memory["device_peak_bytes"] or memory["process_peak_bytes"],
        "memory": memory,
        **compilation,
    }
    return measured, step


def growth(options: Options, specs: Sequence[Spec], params: PyTree | None) -> list[dict[str, Any]]:
    """Step times at several numbers of contexts: `contexts`, `seconds`, `to_first`, `to_linear`.

    Sizes are measured in turn, `options.repeats` times: the largest for `options.steps` steps, the
    others for as many contexts. With n1 the first number that fits, to_first is t(n) / t(n1) within
    one turn, as the median. to_linear is t(n) / (n / n1 t(n1)), as median, min and max: below 1 if
    larger steps cost less per context. All are None for a size that does not fit, alone or beside
    the others.
    """
    fitting_steps: dict[int, steps.TrainingStep] = {}
    for spec in specs:
        with contextlib.suppress(UserError), fitting(spec):
            step = steps.TrainingStep(spec, params)
            step.run(2)
            fitting_steps[spec.config.batch_size] = step
    counts = {n: options.steps * max(fitting_steps) // n for n in fitting_steps}
    turns = []
    for _ in range(options.repeats):
        turn = {}
        for n, step in fitting_steps.items():
            with contextlib.suppress(UserError), fitting(step.spec):
                turn[n] = step.run(counts[n]).wall_seconds / counts[n]
        fitting_steps = {n: fitting_steps[n] for n in turn}
        turns.append(turn)
    first = next(iter(fitting_steps), None)
    rows = []
    for n in (spec.config.batch_size for spec in specs):
        row = {"contexts": n, "seconds": None, "to_first": None, "to_linear": None}
        if n in fitting_steps:
            ratios = [turn[n] / turn[first] for turn in turns]
            row |= {
                "seconds": statistics.median(turn[n] for turn in turns),
                "to_first": statistics.median(ratios),
                "to_linear": spread([ratio * first / n for ratio in ratios]),
            }
        rows.append(row)
    return rows


def _profile(step: steps.TrainingStep, folder: str) -> profile.Profile:
    """Where the time of some steps goes, traced into a folder."""
    with profiler.tracing(folder):
        step.run(PROFILED_STEPS)
    trace = profile.newest_trace(folder)
    return profile.read_profile(trace, step.compiled.as_text(), PROFILED_STEPS)
