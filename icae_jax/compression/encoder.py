"""The encoder: base + LoRA reads `[segment | memory tokens]` of all contexts in one masked pass."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from icae_jax.compression.config import CompressionConfig
from icae_jax.compression.memory import Memory
from icae_jax.compression.segments import Contexts
from icae_jax.models import blocks
from icae_jax.models.llama import FrozenModel


def compress(
    base: FrozenModel,
    trained: dict[str, Any],
    contexts: Contexts,
    config: CompressionConfig,
    dropout_key: jax.Array | None = None,
) -> Memory:
    """Writes contexts into memory by the configuration's method.

    trained: as `trained.init` makes it. dropout_key: for LoRA's dropout, in training only.
    UserError if the configuration does not know `contexts.k`.
    """
    config.choose(contexts.k)
    return config.spec.write(base, trained, contexts, config, dropout_key)


def encode(
    base: FrozenModel,
    trained: dict[str, Any],
    contexts: Contexts,
    config: CompressionConfig,
    dropout_key: jax.Array | None = None,
    *,
    keeps: Literal["hidden", "kv"] = "hidden",
    memory_tokens: int | None = None,
    at: Any = None,
    mask: Callable[[Bool[Array, "BS T"]], Bool[Array, "BS _ T"]] | None = None,
) -> tuple[Any, Any]:
    """Runs base + LoRA over `[segment | memory tokens]`; returns the outputs that a method keeps.

    Segments do not see each other. A memory token sees its segment's text and the memory tokens
    before it, unless `mask` says otherwise.

    Args:
      base: the frozen base.
      trained: `{"lora": tree, "memory_table": [config.k + 3, D], …}`; the first rows of the table
        are the memory tokens.
      contexts: the segments, from `segment_contexts`.
      config: the layout and the lengths.
      dropout_key: for LoRA's dropout, in training only.
      keeps: "hidden" or "kv": what to return. The last layer computes nothing else.
      memory_tokens: how many memory tokens are appended to a segment, by default `contexts.k`.
      at: the kept token indices in `[segment | memory tokens]`, `[U]` or `[B * S, U]`, by default
        the memory tokens.
      mask: makes of the real tokens of `[segment | memory tokens]` what each token sees (see
        `Llama`); by default the real ones up to itself.

    Returns:
      Hidden states after the final norm, `[B * S, U, D]`, and None; or, for "kv", None and (K
      before RoPE, V) of every layer, each `[L, B * S, U, K, H]`.
    """
    B, S, N = contexts.ids.shape
    k = contexts.k if memory_tokens is None else memory_tokens
    layout = config.position_layout
    lengths = contexts.lengths.reshape(B * S)
    if layout.fixed_length:
        if config.segment_tokens != N:
            raise ValueError(
                f"segments of layout {config.layout} are {config.segment_tokens} tokens, padding "
                f"included; these are {N}"
            )
        lengths = jnp.full_like(lengths, N)
    tokens = base.embed(contexts.ids.reshape(B * S, N))
    memory = jnp.broadcast_to(
        trained["memory_table"][:k].astype(base.dtype), (B * S, k, tokens.shape[-1])
    )
    real = jnp.concatenate([jnp.arange(N)[None] < lengths[:, None], jnp.ones((B * S, k), bool)], 1)
    at = np.arange(N, N + k) if at is None else at
    how = {"at": at} if keeps == "hidden" else {"at": blocks.NOWHERE, "return_kv": True, "keep": at}
    with jax.named_scope("encoder"):
        hidden, kv = base(
            jnp.concatenate([tokens, memory], 1),
            layout.encoder_positions(N, k, lengths),
            real if mask is None else mask(real),
            lora=trained["lora"],
            dropout_key=dropout_key,
            **how,
        )
    return (hidden, None) if keeps == "hidden" else (None, kv)
