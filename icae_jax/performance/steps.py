"""The training step of a configuration on the devices at hand, timed and counted."""

import dataclasses
import functools
import math
import resource
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PyTree

from icae_jax.compression import segments
from icae_jax.compression import trained as trained_tree
from icae_jax.models import llama, schemes
from icae_jax.models.llama import ModelConfig
from icae_jax.objectives import targets
from icae_jax.objectives.packing import pack
from icae_jax.performance import programs
from icae_jax.runtime import sharding
from icae_jax.training import metrics, step
from icae_jax.training.compressor_losses import CompressorLosses, ks_of
from icae_jax.training.compressor_task import with_attention
from icae_jax.training.optimizer import make_optimizer


class Measured(NamedTuple):
    """What some steps took.

    cpu_seconds: of all threads of this process, user and system. losses: of the first step, mean
    nats by objective.
    """

    wall_seconds: float
    cpu_seconds: float
    losses: dict[str, float]


# ------------------------------------------------------------------------------------ random arrays


@functools.lru_cache
def _maker(shape, rows, constant, dtype, where):
    """The program that makes an array from a key; arrays of one shape share it.

    It is filled with `constant`, or, if that is None, with normal(0.02) numbers, `rows` at a time.
    """

    def make(key):
        if constant is not None:
            return jnp.full(shape, constant, dtype)
        keys = jax.random.split(key, math.prod(shape) // math.prod(rows))
        return jax.lax.map(lambda key: 0.02 * jax.random.normal(key, rows, dtype), keys).reshape(
            shape
        )

    return jax.jit(make, out_shardings=where)


def random_params(
    model: ModelConfig,
    placement: sharding.Placement,
    dtype: DTypeLike,
    seed: int = 0,
    scheme: str = "",
) -> PyTree:
    """Random parameters of a base in `dtype`, made on the devices that hold them.

    They are made layer by layer, so that no leaf exists in another dtype or place. With a scheme
    (`models.quantize`), each is quantised before the next is made.
    """
    shapes, parsed = llama.param_shapes(model), schemes.parse_scheme(scheme)
    schemes.quantized_shapes(shapes, scheme, dtype)  # UserError for a width that does not fit

    def leaf(path, shape, where):
        constant = {"scale": 1, "bias": 0}.get(path[-1].key)
        return _maker(
            shape.shape,
            shape.shape[1:] if path[0].key == "layers" else shape.shape,
            constant,
            jnp.dtype(dtype),
            where,
        )

    makers = jax.tree_util.tree_map_with_path(leaf, shapes, placement.tree(shapes))
    makers, tree = jax.tree_util.tree_flatten_with_path(makers)
    keys = jax.random.split(jax.random.key(seed), len(makers))
    leaves = []
    for (path, make), key in zip(makers, keys, strict=True):
        names = tuple(part.key for part in path)
        axis, array = parsed.block_axis(names), make(key)
        if axis is not None:
            array = schemes.quantize_matrix(array, parsed.kind, axis)
            where = functools.partial(placement.parameter, names)
            array = jax.device_put(array, jax.tree.map(where, array))
        leaves.append(array)
    return jax.tree.unflatten(tree, leaves)


def initial(spec: programs.Spec, params: PyTree, seed: int = 0) -> PyTree:
    """The trained tree that training starts from (`compression.trained.init`)."""
    return _initial(
        jax.random.key(seed), params["embed"], spec.model, spec.config.lora, spec.compression
    )


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _initial(key, embed, model, lora_config, compression):
    return trained_tree.init(key, embed, model, lora_config, compression)


def random_batch(spec: programs.Spec, seed: int = 0) -> dict[str, Any]:
    """A training batch (numpy) of the shapes of `programs.batch`.

    Contexts have `spec.length` random tokens; targets are as long as their arrays allow.
    """
    rng, shapes = np.random.default_rng(seed), programs.batch(spec)

    def tokens(size):
        return rng.integers(0, spec.model.vocab_size, size, np.int32).tolist()

    def packed(target):
        (rows, G, T), U = target["ids"].shape, target["labels"].shape[2]
        return pack(
            [[targets.Target(tokens(T + 1), T + 1 - U) for _ in range(G)] for _ in range(rows)],
            G,
            T,
            U,
        )

    rows, *shape = shapes["context"].shape
    context, lengths = segments.segment_contexts(
        [tokens(spec.length) for _ in range(rows)], spec.compression, tuple(shape)
    )
    return {
        "context": context,
        "lengths": lengths,
        "targets": {o: packed(target) for o, target in shapes["targets"].items()},
        "k": shapes["k"],
    }


def _check_batch(spec, batch):
    """ValueError if a batch has other shapes than the specification, whose FLOPs are counted."""
    k = programs.batch(spec)["k"]
    if batch.get("k") != k:
        raise ValueError(
            f"batch k is {batch.get('k')}, the specification's is {k}; give a batch of this k"
        )
    named = [
        {
            jax.tree_util.keystr(path, simple=True, separator="/"): x.shape
            for path, x in jax.tree_util.tree_leaves_with_path(tree)
        }
        for tree in (batch, programs.batch(spec))
    ]
    for name in sorted(named[0].keys() | named[1].keys()):
        given, wanted = (shapes.get(name) for shapes in named)
        if given != wanted:
            raise ValueError(
                f"batch {name} has shape {given}, the specification's is {wanted}; give a batch of "
                "its shapes"
            )


# ----------------------------------------------------------------------------------------- the step


class TrainingStep:
    """The jitted step that `icae train` runs, on real arrays on this process's devices.

    Args:
      spec: of "train"; its mesh says how devices are arranged. Nothing stands before the memory
        (`objectives.template` is ignored).
      params: the base's tree, by default `random_params` in the configuration's dtype.
      batch: of the shapes of `programs.batch(spec)`, by default `random_batch`.
      trained: the trained tree, by default `initial`.
      seed: of what is random.

    Attributes:
      spec: with the attention that is computed.
      notes: lines on how that was found, and on what the mesh cannot split.
      contexts, context_tokens, label_tokens, least_flops: of one step, over all microbatches; FLOPs
        as `performance.flops` counts them.

    UserError if rows do not divide over the mesh. ValueError if the batch has other shapes.
    """

    def __init__(
        self,
        spec: programs.Spec,
        params: PyTree = None,
        batch: dict[str, Any] | None = None,
        trained: PyTree = None,
        seed: int = 0,
    ):
        self.mesh = sharding.make_mesh(spec.config.mesh, jax.local_devices())
        self.contexts = spec.contexts * spec.config.accumulate
        sharding.check_batch_size(self.mesh, self.contexts, spec.config.accumulate)
        c = dataclasses.replace(spec.config, batch_size=self.contexts)
        c, notes = with_attention(c, spec.model, spec.compression, self.mesh, spec.length)
        self.spec = spec = dataclasses.replace(spec, config=c)
        batch = random_batch(spec, seed) if batch is None else batch
        _check_batch(spec, batch)
        self.context_tokens = int(np.sum(batch["lengths"]))
        labels = sum(int(np.sum(t["label_mask"])) for t in batch["targets"].values())
        self.label_tokens = len(ks_of(batch)) * labels
        self.least_flops = programs.least(spec)
        self.placement = sharding.Placement(self.mesh, spec.model)
        self.notes = self.placement.notes() + notes
        task = CompressorLosses(c, spec.model, spec.compression)
        optimizer, _ = make_optimizer(c.optimizer, c.steps)
        if params is None:
            params = random_params(spec.model, self.placement, c.jnp_dtype, seed, c.quantize)
        # Its LoRA is as new: what it teaches takes as long.
        like = programs.teacher_shapes(spec)
        params = params | jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
        self.params = jax.device_put(params, self.placement.tree(params))
        with self.placement.active():
            trained = initial(spec, self.params, seed) if trained is None else trained
            state = step.init_state(trained, optimizer)
            shardings = self.placement.tree(state)
            self.state = sharding.put(state, shardings)
            rows = np.arange(self.contexts)
            self.batch = sharding.put_batch(self.mesh, batch, rows, self.contexts)
        self.compiled = None
        self._step = step.make_train_step(task, optimizer, c.seed, c.accumulate, shardings)

    def compile(self) -> dict[str, Any]:
        """Compiles the step.

        Returns `trace_seconds` (tracing and lowering), `compile_seconds` (the compiler, or reading
        its cache) and `cache_hit` (whether the program came from JAX's persistent cache, None if
        none is in use).
        """
        events = []

        def listen(event, **_):
            events.append(event)

        began = time.perf_counter()
        with self.placement.active():
            lowered = self._step.lower(self.state, self.params, self.batch)
            traced = time.perf_counter()
            jax.monitoring.register_event_listener(listen)
            try:
                self.compiled = lowered.compile()
            finally:
                jax.monitoring.unregister_event_listener(listen)
        used = (
            jax.config.jax_compilation_cache_dir
            and "/jax/compilation_cache/compile_requests_use_cache" in events
        )
        hit = "/jax/compilation_cache/cache_hits" in events if used else None
        return {
            "trace_seconds": traced - began,
            "compile_seconds": time.perf_counter() - traced,
            "cache_hit": hit,
        }

    def run(self, steps: int) -> Measured:
        """Runs so many steps, each from the state that the last one left, and waits for them."""
        if self.compiled is None:
            self.compile()
        first = last = None
        jax.block_until_ready((self.state, self.params, self.batch))
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            self.state, metrics_of_step = self.compiled(self.state, self.params, self.batch)
            # One step late, as training reads them: the device is already busy with the next.
            jax.block_until_ready(last)
            first, last = first or metrics_of_step, metrics_of_step
        jax.block_until_ready(self.state)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        first = jax.device_get(first)
        return Measured(wall, cpu, metrics.means(first["sums"], first["counts"]))

    def xla_flops(self, scheme: str = "") -> float | None:
        """XLA's count of a step's FLOPs over all devices, on a base quantised so: `xla_flops`."""
        config = dataclasses.replace(self.spec.config, quantize=scheme)
        return xla_flops(dataclasses.replace(self.spec, config=config), self.mesh)

    def memory(self) -> dict[str, int | None]:
        """Bytes, None where they are unknown.

        `device_peak_bytes`: of the fullest device since the process began (accelerators).
        `process_peak_bytes`: resident (CPU). `argument_bytes`, `temporary_bytes` and
        `program_peak_bytes`: the compiler's figures for one device's part of the step.
        """
        stats = [device.memory_stats() or {} for device in self.mesh.local_devices]
        resident = None
        if self.mesh.local_devices[0].platform == "cpu":
            resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
                1 if sys.platform == "darwin" else 1024
            )
        analysis = self.compiled and self.compiled.memory_analysis()
        return {
            "device_peak_bytes": max(
                (s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s), default=None
            ),
            "process_peak_bytes": resident,
            "argument_bytes": analysis and analysis.argument_size_in_bytes,
            "temporary_bytes": analysis and analysis.temp_size_in_bytes,
            "program_peak_bytes": analysis and analysis.peak_memory_in_bytes,
        }


def xla_flops(spec: programs.Spec, mesh: jax.sharding.Mesh | None) -> float | None:
    """XLA's count of a training step's FLOPs over all devices of a mesh, None if it gives none.

    Extrapolated linearly from programs of 2 and 3 layers, unrolled and lowered for CPUs but not
    compiled. Recomputation counts as often as it happens. Attention is counted as xla's, since XLA
    does not look into kernels.
    """
    xla = dataclasses.replace(spec, config=dataclasses.replace(spec.config, attention="xla"))
    counted = []
    for smaller in programs.to_count(xla):
        lowered = programs.lower(smaller, mesh, ("cpu",))
        counted.append((lowered.cost_analysis() or {}).get("flops"))
    if None in counted:
        return None
    return programs.of_all_layers(spec, counted) * spec.config.accumulate


def matmul_rate(dtype: DTypeLike, seconds: float = 1.0) -> float:
    """FLOP/s that large square matmuls reach now on one of this process's devices.

    The best of five chains, each of which is waited for once. seconds: about how long all of it
    takes, once compiled.
    """
    device = jax.local_devices()[0]
    size = 2048 if device.platform == "cpu" else 8192
    # Random numbers, since some devices clock higher on constants; w keeps x's size.
    x, w = (
        scale * jax.random.normal(jax.random.key(i), (size, size), dtype)
        for i, scale in enumerate((1, size**-0.5))
    )
    x, w = jax.device_put((x, w), device)
    multiply = jax.jit(lambda x, w: x @ w)

    def run(times):
        began, y = time.perf_counter(), x
        for _ in range(times):
            y = multiply(y, w)
        y.block_until_ready()
        return time.perf_counter() - began

    run(1)
    times = max(1, round(seconds / 5 / run(1)))
    return 2 * size**3 * times / min(run(times) for _ in range(5))
