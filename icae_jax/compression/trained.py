"""What is trained: the encoder's LoRA, the memory table, what else the method has, and perhaps a
LoRA of the decoder.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from icae_jax.compression.config import CompressionConfig
from icae_jax.models import lora
from icae_jax.models.llama import ModelConfig
from icae_jax.models.lora import LoraConfig
from icae_jax.models.quantize import as_array, is_quantized, take_rows

SPECIAL_ROWS = 3  # [AE], [LM], [FT]: the last rows of the memory table
DECODER_LORA = (
    "decoder_lora"  # the key of the decoder's LoRA in the trained tree, absent if it has none
)

# Jitted as one program; eagerly, every array's shape would be one.
_init_lora = jax.jit(lora.init_lora, static_argnums=(1, 2))


def init_memory_table(
    key: Array,
    embeddings: Any,
    config: CompressionConfig,
    trigger_id: int | None = None,
    multiplier: float = 1.0,
) -> Float[Array, "rows D"]:
    """The table of trained embeddings, float32: `config.vectors` rows of the method, such as its k
    memory tokens, then [AE], [LM], [FT].

    Its rows, as slots, are what the first block reads, and so start among multiplied embeddings
    where a model multiplies its embeddings. That keeps them as large as what they stand among,
    whatever the multiplier, and what an encoder wrote is read as it is.

    embeddings: the base's table. trigger_id: the token whose embedding [AE] starts from, if any.
    multiplier: of embeddings, as in `ModelConfig`.
    """
    table = jax.random.normal(
        key, (config.vectors + SPECIAL_ROWS, embeddings.shape[1]), jnp.float32
    )
    if config.memory_init == "embedding":
        moments = _moments_of_quantized if is_quantized(embeddings) else _moments
        mean, std = moments(embeddings)
        table = multiplier * (mean + std * table)
    if trigger_id is not None:
        rows = take_rows(embeddings, jnp.asarray([trigger_id]))
        table = table.at[-SPECIAL_ROWS].set(multiplier * rows[0].astype(jnp.float32))
    return table


def _moments(embeddings):
    """Mean and standard deviation of a table's columns, each `[1, D]`."""
    embeddings = as_array(embeddings, jnp.float32)
    return embeddings.mean(0, keepdims=True), embeddings.std(0, keepdims=True)


# As one program, which does not form the dequantised table.
_moments_of_quantized = jax.jit(_moments)


def init(
    key: Array,
    embeddings: Any,
    model: ModelConfig,
    lora_config: LoraConfig,
    config: CompressionConfig,
    trigger_id: int | None = None,
) -> dict[str, Any]:
    """The trained tree that training starts from, float32; arguments as for `init_memory_table`.

    `{"lora": …, "memory_table": …}`, the method's own tensors, and "decoder_lora" if the
    configuration has one. B of every LoRA is zero.
    """
    table = init_memory_table(
        jax.random.fold_in(key, 1), embeddings, config, trigger_id, model.embedding_multiplier
    )
    tree = {
        "lora": _init_lora(jax.random.fold_in(key, 2), config.encoder_config(model), lora_config),
        "memory_table": table,
    }
    if config.spec.tensors:
        tree |= config.spec.tensors(model, config)
    if config.decoder_lora:
        tree[DECODER_LORA] = _init_lora(jax.random.fold_in(key, 3), model, lora_config)
    return tree


@functools.lru_cache
def shapes(model: ModelConfig, lora_config: LoraConfig, config: CompressionConfig) -> Any:
    """The tree of `jax.ShapeDtypeStruct` that `init` would make."""
    embeddings = jax.ShapeDtypeStruct((model.vocab_size, model.hidden_size), jnp.float32)
    return jax.eval_shape(
        lambda embeddings: init(jax.random.key(0), embeddings, model, lora_config, config),
        embeddings,
    )
