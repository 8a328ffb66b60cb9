"""Plans a configuration on a TPU slice, by compiling it for one on any machine.

Says whether it fits, its memory, collectives and FLOPs, and estimates its time.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from icae_jax.errors import UserError
from icae_jax.performance import chips, plan_cache, plan_summary, programs, subject, worker
from icae_jax.performance.programs import Spec
from icae_jax.performance.subject import GIB
from icae_jax.runtime.sharding import AXES, BATCH, MeshConfig
from icae_jax.training.config import TrainConfig

MOST_HOST_DEVICES = 256  # beyond, FLOPs are counted on a smaller mesh

MeshShape = Mapping[str, int]  # {axis: devices}
Compiled = dict[str, Any]  # what the compiler says, see `worker`, and whether it "fits"
Ask = Callable[..., dict[str, Any]]  # `plan_cache.ask`, or one that knows kept answers alone
Compile = Callable[[Spec], Compiled]  # `compile_for` on one topology


@dataclasses.dataclass(frozen=True)
class Options:
    """What is planned.

    topology: a TPU slice, such as v5e:4x4. what: one of `programs.WHATS`. contexts_per_chip: of a
    microbatch; by default batch_size / accumulate over the chips. context_length: in tokens; by
    default the longest of data.context_lengths. search: find the most contexts that fit. exact:
    compile with full effort, as a run does.
    """

    topology: str
    what: str = "train"
    contexts_per_chip: float | None = None
    context_length: int | None = None
    search: bool = False
    exact: bool = False

    def __post_init__(self):
        if self.contexts_per_chip is None:
            return
        if self.search:
            raise UserError("--contexts_per_chip and --search exclude each other; give one of them")
        if not 0 < self.contexts_per_chip < math.inf:
            raise UserError(
                f"--contexts_per_chip is {self.contexts_per_chip:g}; give a positive number"
            )


def plan(options: Options, config: TrainConfig, say: Callable[[str], None]) -> dict[str, Any]:
    """The plan as plain values, see `plan_summary.summarise`; `say` is told a search's progress.

    UserError on bad input, and without libtpu.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "libtpu is not installed, which compiles for TPUs on any machine: "
            "pip install 'icae_jax[tpu]'"
        )
    slice_ = plan_cache.ask({"kind": "topology", "topology": options.topology})
    chip = chips.find(slice_["kind"])
    if chip is None:
        raise UserError(
            f"--topology {options.topology}: no published peaks are known of {slice_['kind']}"
        )
    spec, shape = make_spec(options, config, slice_["chips"])
    say(forecast(options, spec, shape))
    compile_ = functools.partial(compile_for, topology=options.topology, exact=options.exact)
    if options.search:
        spec, compiled = search(spec, compile_, say)
    else:
        compiled = compile_(spec)
    compiled = with_evaluation(spec, compiled, compile_)
    counted = count_flops(spec, shape)
    summary = plan_summary.summarise(spec, shape, options.topology, chip, compiled, counted)
    return summary if summary["fits"] else summary | {"advice": advice(spec, shape)}


def make_spec(
    options: Options, config: TrainConfig, chip_count: int
) -> tuple[Spec, dict[str, int]]:
    """(what is compiled, mesh shape). UserError if contexts do not divide over the mesh."""
    model = subject.base_sizes(config.base)
    shape = dict(zip(AXES, config.mesh.shape(chip_count), strict=True))
    counting_mesh(shape)
    parts = batch_parts(shape)
    length = subject.context_length(options.context_length, config)
    contexts = config.batch_size // config.accumulate
    if options.contexts_per_chip is not None:
        contexts = round(options.contexts_per_chip * chip_count)
    if options.search:
        contexts = parts
    if contexts < 1 or contexts % parts:
        raise UserError(
            f"{contexts} contexts do not divide over mesh.data x mesh.fsdp, {parts}: "
            f"give --contexts_per_chip as a multiple of {parts / chip_count:g}, "
            "or another batch_size"
        )
    spec = Spec(options.what, config, model, contexts, length)
    subject.check_positions(spec)
    return spec, shape


def batch_parts(shape: MeshShape) -> int:
    """Into how many parts a mesh splits a batch."""
    return shape["data"] * shape["fsdp"]


def shape_size(shape: MeshShape) -> int:
    """The devices of a mesh."""
    return shape["data"] * shape["fsdp"] * shape["tensor"]


# ------------------------------------------------------------------------------ how long it takes

SEARCHED = 6  # programs that a search compiles, about


def forecast(options: Options, spec: Spec, shape: MeshShape) -> str:
    """What a plan will compile, and how long that will take, for the user."""
    missing: list[tuple[plan_cache.Request, int]] = []

    def look(request, host_devices=1):
        try:
            return plan_cache.kept(request, host_devices)
        except plan_cache.NotKept:
            missing.append((request, host_devices))
            raise

    compile_ = functools.partial(
        compile_for, topology=options.topology, exact=options.exact, ask=look
    )
    compiled: Compiled = {"fits": True}
    with contextlib.suppress(plan_cache.NotKept):
        if options.search:
            spec, compiled = search(spec, compile_, lambda line: None)
        else:
            compiled = compile_(spec)
    if options.search:
        missing *= SEARCHED
    with contextlib.suppress(plan_cache.NotKept):
        with_evaluation(spec, compiled, compile_)
    for scheme in dict.fromkeys(("", spec.config.quantize)):
        with contextlib.suppress(plan_cache.NotKept):
            _count(_quantized(spec, scheme), shape, look)
    return plan_cache.forecast(missing)


# --------------------------------------------------------------------------------------- compiling


def compile_for(
    spec: Spec, topology: str, exact: bool = False, ask: Ask = plan_cache.ask
) -> Compiled:
    """What the compiler says of a program on a topology, see `worker`.

    If it does not fit, `fits` is false and `peak_bytes` is what the program wanted, if known.
    """
    request = {
        "kind": "tpu",
        "spec": spec,
        "topology": topology,
        "mesh": spec.config.mesh,
        "exact": exact,
    }
    try:
        return ask(request) | {"fits": True}
    except worker.OutOfMemory as error:
        used = re.search(
            r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm"
            r"|\(([\d.]+)([KMGT])\) exceeds available HBM",
            str(error),
        )
        unit = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
        peak = float(used[1] or used[3]) * unit[used[2] or used[4]] if used else None
        return {"fits": False, "peak_bytes": peak, "message": str(error).splitlines()[0]}


def with_evaluation(spec: Spec, compiled: Compiled, compile_: Compile) -> Compiled:
    """Adds the held-out evaluation between training steps: `fits` is then whether both do.

    Other programs, and trainings without an evaluation, stay as they are.
    """
    if spec.what != "train" or not spec.config.eval_examples or not compiled["fits"]:
        return compiled
    evaluation = compile_(dataclasses.replace(spec, what=programs.EVALUATE))
    compiled = compiled | {"evaluation_peak_bytes": evaluation["peak_bytes"]}
    if evaluation["fits"]:
        return compiled
    return compiled | {key: evaluation[key] for key in ("fits", "peak_bytes", "message")}


# --------------------------------------------------------------------------------------- counting


def counting_mesh(shape: MeshShape) -> dict[str, int]:
    """A mesh's shape, halved until this machine can pretend to have as many devices.

    UserError if there is no such shape.
    """
    smaller = dict(shape)
    while shape_size(smaller) > MOST_HOST_DEVICES:
        axis = max(BATCH, key=lambda a: smaller[a])
        if smaller[axis] % 2:
            raise UserError(
                f"mesh is {shape}, too large to count FLOPs on {MOST_HOST_DEVICES} host devices; "
                "use even sizes"
            )
        smaller[axis] //= 2
    return smaller


def count_flops(spec: Spec, shape: MeshShape, ask: Ask = plan_cache.ask) -> plan_summary.Counted:
    """FLOPs of one chip's part, with what a quantised base adds apart.

    In float32: of bfloat16, CPUs convert each matmul's operands, which chips take as they are. So
    nf4's levels count as CPUs look them up, where TPUs select among them.

    Counted on the partitioned program with 2 and with 3 unrolled layers, on host devices, and
    extrapolated to all layers. There, unlike in the scanned program, XLA drops what nothing reads
    of the last layer: of 500xCompressor's encoder everything beyond its K/V.
    """
    matmuls = _count(_quantized(spec, ""), shape, ask)
    dequantising = _count(spec, shape, ask) - matmuls if spec.config.quantize else 0.0
    return plan_summary.Counted(matmuls, dequantising, counting_mesh(shape))


def _quantized(spec, scheme):
    return dataclasses.replace(spec, config=dataclasses.replace(spec.config, quantize=scheme))


def _count(spec, shape, ask):
    counted_on = counting_mesh(shape)
    contexts = spec.contexts // batch_parts(shape) * batch_parts(counted_on)
    config = dataclasses.replace(spec.config, dtype="float32")
    smaller = dataclasses.replace(spec, contexts=contexts, config=config)
    request = {
        "kind": "host",
        "specs": programs.to_count(smaller),
        "mesh": MeshConfig(**counted_on),
    }
    flops = programs.of_all_layers(spec, ask(request, shape_size(counted_on))["flops"])
    if spec.what == "train":
        return flops * spec.config.accumulate
    # XLA counts the body of the decoding loop once.
    return flops * programs.least(spec) / programs.least(spec, tokens=1)


# --------------------------------------------------------------------------------------- searching


def search(spec: Spec, compile_: Compile, say: Callable[[str], None]) -> tuple[Spec, Compiled]:
    """(the spec with the most contexts that fit, what the compiler says of it).

    The spec itself and its failure if not even the fewest fit. Beyond a hundred rows on each part
    of the mesh the result is the most within 2 %.
    """
    unit = spec.contexts
    tried: dict[int, Compiled] = {}

    def fits(n):
        tried[n] = compile_(dataclasses.replace(spec, contexts=n * unit))
        peak = tried[n]["peak_bytes"]
        size = "" if peak is None else f", peak {peak / GIB:.2f} GiB"
        say(f"{n * unit} contexts: {'fit' if tried[n]['fits'] else 'do not fit'}{size}")
        return tried[n]["fits"]

    if not fits(1) or not fits(2):
        return spec, tried[1]
    while True:
        low = max(n for n, compiled in tried.items() if compiled["fits"])
        high = min((n for n, compiled in tried.items() if not compiled["fits"]), default=None)
        step = max(1, low // 50)
        if high is None:
            fits(_next_guess(tried, low, step))
        elif high - low > step:
            fits((low + high) // 2)
        else:
            return dataclasses.replace(spec, contexts=low * unit), tried[low]


def _next_guess(tried, low, step):
    """Where the line through the two largest programs reaches the chip's memory.

    Programs get a little less than all of it.
    """
    below = max(n for n in tried if n < low)
    slope = (tried[low]["peak_bytes"] - tried[below]["peak_bytes"]) / (low - below)
    if slope <= 0:
        return 2 * low
    room = chips.find(tried[low]["kind"]).hbm_bytes * 0.98 - tried[low]["peak_bytes"]
    return min(max(low + int(room / slope), low + step), 16 * low)


def advice(spec: Spec, shape: MeshShape) -> list[str]:
    """What to change if a program does not fit, the least costly change first."""
    c, parts = spec.config, batch_parts(shape)
    rows = spec.contexts // parts
    changes = []
    if spec.what == "train" and {c.remat, c.remat_decoder or c.remat} != {"full"}:
        decoder = " --config.remat_decoder=full" if c.remat_decoder else ""
        changes.append(f"--config.remat=full{decoder}")
    if rows > 1:
        split = next(n for n in range(2, rows + 1) if rows % n == 0)
        per_chip = rows // split * parts / shape_size(shape)
        fewer = f"--contexts_per_chip={per_chip:g}"
        if spec.what == "train" and spec.contexts * c.accumulate == c.batch_size:
            fewer = f"--config.accumulate={split * c.accumulate}"
        changes.append(f"fewer contexts at once (--search finds how many): {fewer}")
    if shape["data"] > 1:
        changes.append(f"the base over more chips: --config.mesh.data=1 --config.mesh.fsdp={parts}")
    if not c.quantize:
        changes.append("a base of half the bytes: --config.quantize=int8 (nf4: of a quarter)")
    if shape["tensor"] == 1 and shape["fsdp"] % 2 == 0:
        changes.append(
            "activations over more chips too: "
            f"--config.mesh.fsdp={shape['fsdp'] // 2} --config.mesh.tensor=2"
        )
    return [*changes, "a larger slice"]
