"""The encoder: base + LoRA reads `[segment | memory tokens]` of all contexts in one masked pass."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from icae_jax.compression.config import CompressionConfig
from icae_jax.compression.memory import Memory
from icae_jax.compression.segments import Contexts
from icae_jax.models import blocks
from icae_jax.models.llama import FrozenModel, causal_mask

MEMORY_TOKENS = np.zeros(0, np.int32)  # as `at` of `encode`: the appended memory tokens


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
    return compress_several(base, trained, contexts, (contexts.k,), config, dropout_key)[0]


def compress_several(
    base: FrozenModel,
    trained: dict[str, Any],
    contexts: Contexts,
    ks: Sequence[int],
    config: CompressionConfig,
    dropout_key: jax.Array | None = None,
) -> tuple[Memory, ...]:
    """As `compress` for each of several numbers of memory tokens, in place of `contexts.k`.

    In one pass of the encoder if the method can (`Method.write_several`), else in one for each.
    """
    for k in ks:
        config.choose(k)
    if config.spec.write_several:
        return config.spec.write_several(base, trained, contexts, ks, config, dropout_key)
    by_k = [contexts.replace(k=int(k)) for k in ks]
    return tuple(config.spec.write(base, trained, c, config, dropout_key) for c in by_k)


def encode(
    base: FrozenModel,
    trained: dict[str, Any],
    contexts: Contexts,
    config: CompressionConfig,
    dropout_key: jax.Array | None = None,
    *,
    keeps: Literal["hidden", "kv"] = "hidden",
    memory_tokens: int | None = None,
    at: Any = MEMORY_TOKENS,
    is_memory: Bool[Array, "BS N"] | None = None,
    added: Float[Array, "BS N D"] | None = None,
    mask: Callable[[Bool[Array, "BS T"]], Bool[Array, "BS _ T"]] | None = None,
) -> tuple[Any, Any]:
    """Runs base + LoRA over `[segment | memory tokens]`; returns the outputs that a method keeps.

    Segments do not see each other. What a token sees of its own segment is said by
    `config.encoder_mask`. With `config.encoder_layers` only the first layers run, without the final
    norm.

    Args:
      base: the frozen base.
      trained: `{"lora": tree, "memory_table": [config.vectors + 3, D], …}`; the first rows of the
        table are the memory tokens.
      contexts: the segments, from `segment_contexts`.
      config: the layout, the mask and the lengths.
      dropout_key: for LoRA's dropout, in training only.
      keeps: "hidden" or "kv": what to return. The last layer computes nothing else.
      memory_tokens: how many memory tokens are appended to a segment, by default `contexts.k`.
      at: the kept token indices in `[segment | memory tokens]`, `[U]` or `[B * S, U]`, None for
        all, by default the memory tokens.
      is_memory: which tokens of the text are memory tokens too, for mask "slots"; none by default.
      added: to the embeddings of the text.
      mask: in place of `config.encoder_mask`: makes of the real tokens of `[segment | memory
        tokens]` what each token sees (see `Llama`).

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
    if added is not None:
        tokens = tokens + added.astype(tokens.dtype)
    memory = jnp.broadcast_to(
        trained["memory_table"][:k].astype(base.dtype), (B * S, k, tokens.shape[-1])
    )
    real = jnp.concatenate([jnp.arange(N)[None] < lengths[:, None], jnp.ones((B * S, k), bool)], 1)
    at = np.arange(N, N + k) if at is MEMORY_TOKENS else at
    how = {"at": at} if keeps == "hidden" else {"at": blocks.NOWHERE, "return_kv": True, "keep": at}
    if mask is None:
        if is_memory is None:
            is_memory = jnp.zeros((1, N), bool) if k else None
        if is_memory is not None:
            appended = jnp.ones((is_memory.shape[0], k), bool)
            is_memory = jnp.concatenate([is_memory, appended], 1)
        sees = encoder_mask(config.encoder_mask, real, is_memory)
    else:
        sees = mask(real)
    if config.encoder_layers:
        base = base.first_layers(config.encoder_layers)
    with jax.named_scope("encoder"):
        hidden, kv = base(
            jnp.concatenate([tokens, memory], 1),
            layout.encoder_positions(N, k, lengths),
            sees,
            lora=trained["lora"],
            dropout_key=dropout_key,
            **how,
        )
    return (hidden, None) if keeps == "hidden" else (None, kv)


def encoder_mask(
    name: str, real: Bool[Array, "BS T"], is_memory: Bool[Array, "_ T"] | None = None
) -> Bool[Array, "BS ..."]:
    """What each token sees, as `Llama` takes it.

    name: of `config.MASKS`. "slots" is `[B * S, T, T]`, "all" a single row for all queries. real:
    which tokens are not padding. is_memory: which are memory tokens, None if none is.
    """
    if name == "all":
        return real[:, None]
    if name == "causal" or is_memory is None:
        return real
    T = real.shape[1]
    mutual = is_memory[:, :, None] & is_memory[:, None]
    return real[:, None] & (causal_mask(T) | mutual)
