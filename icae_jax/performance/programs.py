"""Programs of a configuration, lowered from shapes: the training step, compressing, decoding."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Int, PyTree

from icae_jax.compression import encoder, trained
from icae_jax.compression.config import CompressionConfig
from icae_jax.compression.decoder import Decoder, Prefix
from icae_jax.compression.segments import Contexts
from icae_jax.data.collate import bucket_shape, target_shapes
from icae_jax.data.drawing import StaticInt, StaticInts
from icae_jax.inference import decoding
from icae_jax.models import llama, schemes
from icae_jax.models.axes import KV_AXES
from icae_jax.models.llama import FrozenModel
from icae_jax.performance import flops
from icae_jax.runtime import attention_choice, sharding
from icae_jax.training import step
from icae_jax.training.compressor_losses import (
    TEACHER_LORA,
    CompressorLosses,
    base_positions,
    teacher_positions,
)
from icae_jax.training.config import TrainConfig
from icae_jax.training.optimizer import make_optimizer

WHATS = ("train", "compress", "decode")
EVALUATE = "evaluate"  # the program that computes the held-out losses of a training
OF_TRAINING = ("train", EVALUATE)
PROMPT = 32  # tokens of a question that is answered


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is compiled.

    what: one of `WHATS`, or `EVALUATE`. config: with the shapes of its data only. model: the base's
    sizes. contexts: in one step, over all devices. length: most tokens of a context. qa: (inputs,
    labels) of a QA target, None for the most that the configuration allows.
    """

    what: str
    config: TrainConfig
    model: llama.ModelConfig
    contexts: int
    length: int
    qa: tuple[int, int] | None = None

    @property
    def compression(self) -> CompressionConfig:
        """What is trained."""
        return self.config.trained_compression

    @property
    def qa_shape(self) -> tuple[int, int]:
        """(T, U) of QA targets, see `objectives.packing.pack`."""
        return self.qa or (self.config.data.max_target_tokens,) * 2

    @property
    def measured_config(self) -> TrainConfig:
        """The configuration with an attention that needs no measurement: xla in place of auto.

        The devices that a program is lowered for may not be here to time the others on.
        """
        auto = self.config.attention == attention_choice.AUTO
        return dataclasses.replace(self.config, attention="xla") if auto else self.config


def _placed(tree, shardings):
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, shardings
    )


def base_shapes(spec: Spec) -> PyTree[jax.ShapeDtypeStruct]:
    """The base's parameters, in the dtype or the quantisation that the configuration names."""
    shapes, c = llama.param_shapes(spec.model), spec.config
    return schemes.quantized_shapes(shapes, c.quantize, c.jnp_dtype)


def teacher_shapes(spec: Spec) -> dict[str, PyTree[jax.ShapeDtypeStruct]]:
    """What is frozen beside the base: the LoRA of a teacher from an adapter, if there is one.

    Of the sizes of the configuration's own LoRA; the adapter is not read.
    """
    if not spec.config.objectives.teacher_adapter:
        return {}
    own = dataclasses.replace(spec.compression, decoder_lora=True)
    return {TEACHER_LORA: trained.shapes(spec.model, spec.config.lora, own)[trained.DECODER_LORA]}


def base_bytes(spec: Spec, shape: Mapping[str, int]) -> int:
    """Bytes of one device's part of the base's parameters. shape: the mesh's, by axis."""
    mesh = jax.sharding.AbstractMesh(tuple(shape.values()), tuple(shape))
    shapes = base_shapes(spec)
    shardings = sharding.Placement(mesh, spec.model).tree(shapes)
    parts = jax.tree.map(
        lambda x, where: math.prod(where.shard_shape(x.shape)) * x.dtype.itemsize,
        shapes,
        shardings,
    )
    return sum(jax.tree.leaves(parts))


def batch(spec: Spec, mesh: jax.sharding.Mesh | None = None) -> dict[str, Any]:
    """The shapes of a training batch, with every QA target as long as it may be."""
    c, where = spec.config, mesh and sharding.batch_sharding(mesh)
    rows = spec.contexts * (c.accumulate if spec.what in OF_TRAINING else 1)

    def array(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=where)

    segments, size = bucket_shape(spec.length, spec.compression)
    if spec.compression.position_layout.fixed_length:
        size = spec.compression.segment_tokens
    shapes = target_shapes(
        c.data,
        spec.compression,
        tuple(c.objectives.weights),
        spec.length,
        spec.qa_shape,
        c.objectives.pad_labels,
    )
    # Held-out losses are of one k at a time, and a step may draw one: the largest is most work.
    several = c.ks if spec.what == "train" else ()
    ks = StaticInts(several or (spec.compression.k,))
    targets = {
        o: {
            "ids": array(G, T),
            "label_at": array(G, U),
            "labels": array(G, U),
            "label_mask": array(G, U, dtype=bool),
        }
        for o, (G, T, U) in shapes.items()
    }
    return {
        "context": array(segments, size),
        "lengths": array(segments),
        "targets": targets,
        "k": ks if len(ks) > 1 else StaticInt(*ks),
    }


def positions_needed(spec: Spec) -> int:
    """Positions that the program takes of the base's."""
    c, objectives = spec.config, spec.config.objectives
    if spec.what == "train":
        qa = spec.qa_shape[0] if "qa" in objectives.weights else 0
        own = base_positions(
            objectives.weights, objectives.pad_labels, spec.compression, spec.length, qa
        )
        return max(own, teacher_positions(objectives.taught, spec.length, qa))
    behind = 0 if spec.what == "compress" else PROMPT + c.data.max_target_tokens
    return base_positions((), False, spec.compression, spec.length, behind)


def lower(
    spec: Spec, mesh: jax.sharding.Mesh | None, platforms: tuple[str, ...] | None = None
) -> jax.stages.Lowered:
    """The program on a mesh of devices, which may be those of a topology. Its arguments are shapes.

    platforms: to lower for these, such as ("cpu",), in place of the devices' own.
    """
    placement = sharding.Placement(mesh, spec.model)
    with placement.active():
        return _trace(spec, mesh, placement).lower(lowering_platforms=platforms)


def _trace(spec, mesh, placement):
    c, model = spec.measured_config, spec.model
    task = CompressorLosses(c, model, spec.compression)
    shapes = base_shapes(spec)
    if spec.what in OF_TRAINING:
        shapes = shapes | teacher_shapes(spec)
    params = _placed(shapes, placement.tree(shapes))
    tree, given = trained.shapes(model, c.lora, spec.compression), batch(spec, mesh)
    if spec.what == "train":
        optimizer, _ = make_optimizer(c.optimizer, c.steps)
        state = jax.eval_shape(lambda t: step.init_state(t, optimizer), tree)
        shardings = placement.tree(state)
        train = step.make_train_step(task, optimizer, c.seed, c.accumulate, shardings)
        return train.trace(_placed(state, shardings), params, given)
    tree = _placed(tree, placement.tree(tree))
    if spec.what == EVALUATE:
        return step.make_eval_step(task, c.accumulate).trace(tree, params, given)

    base = FrozenModel(task.model, params)
    contexts = Contexts(given["context"], given["lengths"], spec.compression.k)
    write = functools.partial(encoder.compress, config=spec.compression)
    if spec.what == "compress":
        return jax.jit(write).trace(base, tree, contexts)

    decoder = Decoder.of(base, tree)
    prefix = jax.eval_shape(
        lambda decoder, *written: write(*written).read(decoder), decoder, base, tree, contexts
    )
    axes = {"k": KV_AXES, "v": KV_AXES, "end": ("batch",)}
    prefix = prefix.replace(
        **{
            name: _placed(x, placement.sharding(*axes.get(name, ("batch", None))))
            for name, x in vars(prefix).items()
        }
    )
    ids = jax.ShapeDtypeStruct((spec.contexts, PROMPT), jnp.int32, sharding=prefix.end.sharding)
    return jax.jit(decode, static_argnames="new_tokens").trace(
        decoder, prefix, ids, new_tokens=c.data.max_target_tokens
    )


def decode(
    decoder: Decoder, prefix: Prefix, ids_BT: Int[Any, "B T"], *, new_tokens: int
) -> Int[Any, "B n"]:
    """The engine's work for a batch: it reads prompts behind memories, and decodes n new tokens."""
    B, T = ids_BT.shape
    cache, rows = decoding.empty(
        decoder, rows=B, tokens=T + new_tokens, memories=B, memory_tokens=prefix.mask.shape[1]
    )
    cache = cache.put_memory(prefix, jnp.arange(B))
    row, zeros = jnp.arange(B), jnp.zeros(B, jnp.int32)
    chunks = decoding.Chunks(
        rows=row,
        ids=ids_BT,
        lengths=zeros + T,
        offsets=zeros,
        last=jnp.ones(B, bool),
        memory=row,
        start=prefix.end,
        settings=rows.settings,
    )
    how = decoding.How("own", plain=True, alternatives=0)
    cache, rows, _ = decoding.prefill(decoder, cache, rows, chunks, how=how)

    def step(state, _):
        active = jnp.ones(B, bool)
        cache, rows, _ = decoding.step(decoder, *state, active, jnp.int32(0), how=how)
        return (cache, rows), state[1].token

    return jax.lax.scan(step, (cache, rows), length=new_tokens)[1].T


def least(spec: Spec, tokens: int | None = None) -> int:
    """The fewest FLOPs that the program takes over all devices.

    Those of a step, of writing the memories, or of reading the prompts and decoding `tokens` for
    each, by default all that the program may decode.
    """
    c, given = spec.config, batch(spec)
    if spec.what == "train":
        task = CompressorLosses(spec.measured_config, spec.model, spec.compression)
        teacher = {"before": task.before, "teacher_lora": task.teacher_lora}
        return flops.least(spec.model, c.lora, spec.compression, given, **teacher).total
    if spec.what == "compress":
        shape, k = given["context"].shape, spec.compression.k
        return flops.compress(spec.model, c.lora, shape, k, spec.compression).total
    memory = given["context"].shape[1] * spec.compression.k
    room = memory + PROMPT + c.data.max_target_tokens
    lora = c.lora if spec.compression.decoder_lora else None
    token = flops.decode(spec.model, spec.contexts, room + 1, lora)
    prompt = flops.decode(spec.model, spec.contexts * PROMPT, memory + PROMPT, lora)
    tokens = c.data.max_target_tokens if tokens is None else tokens
    prompts = prompt.targets + prompt.lora + prompt.attention + token.logits
    return tokens * token.total + prompts


def few_layers(spec: Spec, layers: int, encoder_layers: int = 0) -> Spec:
    """The same with so many layers, unrolled, one microbatch and one chunk of the loss.

    XLA counts the body of a loop once. encoder_layers: of them, how many encode; 0 for all.
    """
    compression = dataclasses.replace(spec.config.compression, encoder_layers=encoder_layers)
    config = dataclasses.replace(
        spec.config,
        unroll=layers,
        loss_chunk=1 << 30,
        accumulate=1,
        batch_size=spec.contexts,
        compression=compression,
    )
    return dataclasses.replace(spec, model=spec.model.first_layers(layers), config=config)


def to_count(spec: Spec) -> list[Spec]:
    """Programs of 2 and 3 layers, from whose FLOPs `of_all_layers` extrapolates."""
    if not spec.compression.encoder_layers:
        return [few_layers(spec, layers) for layers in (2, 3)]
    return [few_layers(spec, *layers) for layers in ((2, 2), (3, 2), (3, 3))]


def of_all_layers(spec: Spec, counted: Sequence[float]) -> float:
    """FLOPs of a program, extrapolated linearly from those of `to_count(spec)`."""
    model = spec.model.num_layers
    if len(counted) == 2:
        two, three = counted
        return two + (three - two) * (model - 2)
    two, deeper, encoder_deeper = counted
    encoder = (encoder_deeper - deeper) * (spec.compression.encoder_layers - 2)
    return two + (deeper - two) * (model - 2) + encoder
