"""The training step of a configuration on the devices at hand: made of random arrays, compiled, run, timed and counted."""

import dataclasses
import functools
import math
import resource
import sys
import time
import typing

import jax
import jax.numpy as jnp
import numpy as np

from icae_jax.compression import segments
from icae_jax.compression import trained as trained_tree
from icae_jax.models import llama
from icae_jax.objectives import targets
from icae_jax.objectives.packing import pack
from icae_jax.performance import programs
from icae_jax.runtime import sharding
from icae_jax.training import metrics, step
from icae_jax.training.compressor_task import CompressorLosses, with_attention
from icae_jax.training.optimizer import make_optimizer


class Measured(typing.NamedTuple):
    """What some steps took. wall_seconds; cpu_seconds: of all threads of this process, user and system. losses: `{objective: mean nats}`
    of the first of them.
    """

    wall_seconds: float
    cpu_seconds: float
    losses: dict


# ------------------------------------------------------------------------------------ random arrays


@functools.lru_cache
def _maker(shape, rows, constant, dtype, where):
    """The program that makes an array of a key: of `constant`, or, where that is None, of normal(0.02) numbers, `rows` at a time. Arrays
    of one shape share it.
    """

    def make(key):
        if constant is not None:
            return jnp.full(shape, constant, dtype)
        keys = jax.random.split(key, math.prod(shape) // math.prod(rows))
        return jax.lax.map(lambda key: 0.02 * jax.random.normal(key, rows, dtype), keys).reshape(
            shape
        )

    return jax.jit(make, out_shardings=where)


def random_params(model, placement, dtype, seed=0):
    """Random parameters of a base in `dtype`, made where they lie: layer by layer, so that no leaf exists in another dtype or place.

    model: `models.llama.ModelConfig`. placement: `runtime.sharding.Placement`.
    """
    shapes = llama.param_shapes(model)

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
    leaves, tree = jax.tree.flatten(makers)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(tree, [make(key) for make, key in zip(leaves, keys, strict=True)])


def initial(spec, params, seed=0):
    """The trained tree that training starts from, float32: LoRA with B zero, and the memory table drawn as the base's embeddings are."""
    return _initial(
        jax.random.key(seed), params["embed"], spec.model, spec.config.lora, spec.compression
    )


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _initial(key, embed, model, lora_config, compression):
    return trained_tree.init(key, embed, model, lora_config, compression)


def random_batch(spec, seed=0):
    """A training batch (numpy) of the shapes of `programs.batch`: contexts of `spec.length` random tokens, every target as long as its
    arrays let it be.
    """
    rng, shapes = np.random.default_rng(seed), programs.batch(spec)

    def tokens(size):
        return rng.integers(0, spec.model.vocab_size, size, np.int32).tolist()

    def packed(of):
        (rows, G, T), U = of["ids"].shape, of["labels"].shape[2]
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
        "targets": {o: packed(of) for o, of in shapes["targets"].items()},
        "k": shapes["k"],
    }


def _check_batch(spec, batch):
    """UserError where a batch has other shapes than the specification, whose FLOPs would then be another step's."""
    if batch.get("k") != spec.compression.k:
        raise ValueError(
            f"batch k is {batch.get('k')}, the specification's is {spec.compression.k}; give a batch of this k"
        )
    named = [
        {
            jax.tree_util.keystr(path, simple=True, separator="/"): x.shape
            for path, x in jax.tree_util.tree_leaves_with_path(tree)
        }
        for tree in (batch, programs.batch(spec))
    ]
    for name in sorted(named[0].keys() | named[1].keys()):
        given, wanted = (of.get(name) for of in named)
        if given != wanted:
            raise ValueError(
                f"batch {name} has shape {given}, the specification's is {wanted}; give a batch of its shapes"
            )


# ----------------------------------------------------------------------------------------- the step


class TrainingStep:
    """The jitted step that `icae train` runs, on real arrays on this process's devices, arranged as `spec.config.mesh` says.

    spec: `performance.programs.Spec` of "train". params: the base's tree, by default `random_params` in the configuration's dtype. batch: as
    training's are, of the shapes of `programs.batch(spec)`, by default `random_batch`. trained: the trained tree, by default `initial`.
    Nothing stands before the memory (`objectives.template` is not looked at).

    contexts, context_tokens, label_tokens, least_flops: of one step, all microbatches together; the FLOPs as `performance.flops` counts
    them. spec: with the attention that is computed. notes: lines on how that was found, and on what the mesh cannot split. UserError
    where rows do not divide over the mesh, or the batch has other shapes.
    """

    def __init__(self, spec, params=None, batch=None, trained=None, seed=0):
        c = spec.config
        self.mesh, self.contexts = (
            sharding.make_mesh(c.mesh, jax.local_devices()),
            spec.contexts * c.accumulate,
        )
        sharding.check_batch_size(self.mesh, self.contexts, c.accumulate)
        c = dataclasses.replace(c, batch_size=self.contexts)
        c, notes = with_attention(c, spec.model, spec.compression, self.mesh, spec.length)
        self.spec = spec = dataclasses.replace(spec, config=c)
        if batch is None:
            batch = random_batch(spec, seed)
        _check_batch(spec, batch)
        self.context_tokens = int(np.sum(batch["lengths"]))
        self.label_tokens = sum(int(np.sum(of["label_mask"])) for of in batch["targets"].values())
        self.least_flops = programs.least(spec)
        self.placement = sharding.Placement(self.mesh, spec.model)
        self.notes = self.placement.notes() + notes
        task = CompressorLosses(c, spec.model, spec.compression)
        optimizer, _ = make_optimizer(c.optimizer, c.steps)
        if params is None:
            params = random_params(spec.model, self.placement, c.jnp_dtype, seed)
        self.params = jax.device_put(params, self.placement.tree(params))
        with self.placement.active():
            state = step.init_state(
                initial(spec, self.params, seed) if trained is None else trained, optimizer
            )
            shardings = self.placement.tree(state)
            self.state = sharding.put(state, shardings)
            self.batch = sharding.put_batch(
                self.mesh, batch, np.arange(self.contexts), self.contexts
            )
        self.compiled, self._step = (
            None,
            step.make_train_step(task, optimizer, c.seed, c.accumulate, shardings),
        )

    def compile(self):
        """Compiles the step: `{"trace_seconds": tracing and lowering, "compile_seconds": the compiler, or reading its cache, "cache_hit"}`.

        cache_hit: whether the program came from JAX's persistent cache; None where none is in use.
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

    def run(self, steps):
        """Runs so many steps, each from the state that the last one left, and waits for them: `Measured`."""
        if self.compiled is None:
            self.compile()
        first = last = None
        jax.block_until_ready((self.state, self.params, self.batch))
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            self.state, told = self.compiled(self.state, self.params, self.batch)
            jax.block_until_ready(
                last
            )  # one step late, as training reads them: the device is already busy with the next
            first, last = first or told, told
        jax.block_until_ready(self.state)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        first = jax.device_get(first)
        return Measured(wall, cpu, metrics.means(first["sums"], first["counts"]))

    def xla_flops(self):
        """XLA's count of one step over all devices, see `xla_flops`."""
        return xla_flops(self.spec, self.mesh)

    def memory(self):
        """Bytes, None where they are not known: `device_peak_bytes` of the fullest device since the process began (accelerators),
        `process_peak_bytes` resident (CPU), and what the compiler says of one device's part of the step: `argument_bytes`,
        `temporary_bytes`, `program_peak_bytes`.
        """
        stats = [device.memory_stats() or {} for device in self.mesh.local_devices]
        resident = None
        if self.mesh.local_devices[0].platform == "cpu":
            resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
                1 if sys.platform == "darwin" else 1024
            )
        told = self.compiled and self.compiled.memory_analysis()
        return {
            "device_peak_bytes": max(
                (s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s), default=None
            ),
            "process_peak_bytes": resident,
            "argument_bytes": told and told.argument_size_in_bytes,
            "temporary_bytes": told and told.temp_size_in_bytes,
            "program_peak_bytes": told and told.peak_memory_in_bytes,
        }


def xla_flops(spec, mesh):
    """XLA's count of a training step's FLOPs over all devices of a mesh, or None where it gives none.

    Of the programs of 2 and of 3 layers, unrolled and lowered for CPUs but not compiled, continued in a straight line to all layers.
    What is recomputed counts as often as it is computed; attention as the plain one, since XLA does not look into kernels.
    """
    plain = dataclasses.replace(spec, config=dataclasses.replace(spec.config, attention="xla"))
    counted = []
    for layers in (2, 3):
        lowered = programs.lower(programs.few_layers(plain, layers), mesh, ("cpu",))
        counted.append((lowered.cost_analysis() or {}).get("flops"))
    if None in counted:
        return None
    two, three = counted
    return (two + (three - two) * (spec.model.num_layers - 2)) * spec.config.accumulate


def matmul_rate(dtype, seconds=1.0):
    """FLOP/s of large square matmuls in `dtype` on one of this process's devices, at this moment: the best of five chains, each of which
    is waited for once. seconds: about how long all of it takes, once compiled.
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
