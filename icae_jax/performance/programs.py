"""The programs of a configuration, lowered from shapes: the training step, compressing, decoding."""

import dataclasses

import jax
import jax.numpy as jnp

from icae_jax.compression import encoder, layout, methods
from icae_jax.data import batches
from icae_jax.inference import generate
from icae_jax.models import llama, lora
from icae_jax.performance import flops
from icae_jax.runtime import sharding
from icae_jax.training import step
from icae_jax.training.compressor_task import CompressorLosses, positions
from icae_jax.training.config import TrainConfig
from icae_jax.training.optimizer import make_optimizer

WHATS = ("train", "compress", "decode")
EVALUATE = "evaluate"  # beside a training step: the program that a training computes its held-out losses with
OF_TRAINING = ("train", EVALUATE)
PROMPT = 32  # tokens of a question, where it is answered


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is compiled.

    what: one of `WHATS`, or `EVALUATE`. config: with its data's shapes alone. model: the base's sizes. contexts: of one step, over all
    devices. length: tokens of a context at most. qa: (inputs, labels) of a QA target; None for the most that the configuration lets in.
    """

    what: str
    config: TrainConfig
    model: llama.ModelConfig
    contexts: int
    length: int
    qa: tuple[int, int] | None = None

    @property
    def compression(self):
        return self.config.trained_compression

    @property
    def qa_shape(self):
        """(T, U) of QA targets, see `objectives.targets.pack`."""
        return self.qa or (self.config.data.max_target_tokens,) * 2


def _placed(tree, shardings, dtype=None):
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=where),
        tree,
        shardings,
    )


def batch(spec, mesh=None):
    """The shapes of a training batch, with every QA target as long as it may be."""
    c, where = spec.config, mesh and sharding.batch_sharding(mesh)
    rows = spec.contexts * (c.accumulate if spec.what in OF_TRAINING else 1)

    def array(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=where)

    segments, size = batches.segment_shape(spec.length, spec.compression)
    size = (
        spec.compression.segment_tokens
        if layout.get(spec.compression.layout).fixed_length
        else size
    )
    shapes = batches.target_shapes(
        c.data,
        spec.compression,
        tuple(c.objectives.weights),
        spec.length,
        spec.qa_shape,
        c.objectives.pad_labels,
    )
    targets = {
        o: {
            "ids": array(G, T),
            "label_at": array(G, U),
            "labels": array(G, U),
            "label_mask": array(G, U, dtype=bool),
        }
        for o, (G, T, U) in shapes.items()
    }
    k = batches.StaticInt(spec.compression.k)
    return {
        "context": array(segments, size),
        "lengths": array(segments),
        "targets": targets,
        "k": k,
    }


def positions_needed(spec):
    """Positions of the base that the program takes."""
    c, objectives = spec.config, spec.config.objectives
    if spec.what == "train":
        qa = spec.qa_shape[0] if "qa" in objectives.weights else 0
        return positions(
            objectives.weights, objectives.pad_labels, spec.compression, spec.length, qa
        )
    return positions(
        (),
        False,
        spec.compression,
        spec.length,
        0 if spec.what == "compress" else PROMPT + c.data.max_target_tokens,
    )


def lower(spec, mesh, platforms=None):
    """The `jax.stages.Lowered` program on a mesh of devices, which may be those of a topology alone. Its arguments are only shapes.

    platforms: such as ("cpu",), to lower for these instead of the devices' own.
    """
    c, k = spec.config, spec.compression.k
    placement = sharding.Placement(mesh, spec.model)
    task = CompressorLosses(c, spec.model, spec.compression)
    shapes = llama.param_shapes(spec.model)
    params = _placed(shapes, placement.tree(shapes), c.jnp_dtype)
    trained = {
        "lora": jax.eval_shape(lambda: lora.init_lora(jax.random.key(0), spec.model, c.lora)),
        "memory_table": jax.ShapeDtypeStruct(
            (k + encoder.SPECIAL_ROWS, spec.model.hidden_size), jnp.float32
        ),
    }
    given = batch(spec, mesh)
    with placement.active():
        if spec.what == "train":
            optimizer, _ = make_optimizer(c.optimizer, c.steps)
            state = jax.eval_shape(lambda t: step.init_state(t, optimizer), trained)
            shardings = placement.tree(state)
            train = step.make_train_step(task, optimizer, c.seed, c.accumulate, shardings)
            return train.trace(_placed(state, shardings), params, given).lower(
                lowering_platforms=platforms
            )
        trained = _placed(trained, placement.tree(trained))
        if spec.what == EVALUATE:
            return (
                step.make_eval_step(task, c.accumulate)
                .trace(trained, params, given)
                .lower(lowering_platforms=platforms)
            )
        write = jax.jit(methods.compress, static_argnames=("model", "config", "k"))
        texts = (task.model, params, trained, given["context"], given["lengths"])
        if spec.what == "compress":
            return write.trace(*texts, config=spec.compression, k=k).lower(
                lowering_platforms=platforms
            )
        prefix = jax.eval_shape(
            lambda *arrays: _prefix(task.model, *arrays, config=spec.compression, k=k), *texts[1:]
        )
        at = {
            "k": llama.KV_AXES,
            "v": llama.KV_AXES,
            "mask": ("batch", None),
            "positions": ("batch", None),
            "end": ("batch",),
        }
        prefix = prefix.replace(
            **{
                name: _placed(getattr(prefix, name), placement.sharding(*axes))
                for name, axes in at.items()
            }
        )
        rows = [
            jax.ShapeDtypeStruct((spec.contexts, *shape), jnp.int32, sharding=prefix.end.sharding)
            for shape in ((), (PROMPT,), (), ())
        ]
        return generate.greedy.trace(
            task.model,
            params,
            trained["memory_table"],
            prefix,
            *rows,
            max_new_tokens=c.data.max_target_tokens,
            stop_ids=(2,),
        ).lower(lowering_platforms=platforms)


def _prefix(model, params, trained, ids, lengths, config, k):
    return methods.read(
        model, params, methods.compress(model, params, trained, ids, lengths, config, k)
    )


def least(spec, tokens=None):
    """The fewest FLOPs that it takes over all devices: of a step, of writing the memories, or of reading the prompts and so many tokens
    each, by default all that the program may decode.
    """
    c, given = spec.config, batch(spec)
    if spec.what == "train":
        return flops.least(spec.model, c.lora, spec.compression, given).total
    if spec.what == "compress":
        return flops.compress(
            spec.model, c.lora, given["context"].shape, spec.compression.k, spec.compression.method
        ).total
    memory = given["context"].shape[1] * spec.compression.k
    room = memory + PROMPT + c.data.max_target_tokens
    token = flops.decode(spec.model, spec.contexts, room + 1)
    prompt = flops.decode(spec.model, spec.contexts * PROMPT, memory + PROMPT)
    tokens = c.data.max_target_tokens if tokens is None else tokens
    return tokens * token.total + prompt.targets + prompt.attention + token.logits


def few_layers(spec, layers):
    """The same with so many layers, unrolled, one microbatch and one chunk of the loss: XLA counts the body of a loop once."""
    model = dataclasses.replace(spec.model, num_layers=layers, windows=spec.model.windows[:layers])
    config = dataclasses.replace(
        spec.config, unroll=layers, loss_chunk=1 << 30, accumulate=1, batch_size=spec.contexts
    )
    return dataclasses.replace(spec, model=model, config=config)
