"""ICAE (Ge et al., arXiv 2307.06945): an LLM with LoRA writes a text into k memory slots, the same LLM, frozen, reads them."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from icae_jax.compression import layout as layouts
from icae_jax.compression.memory import Prefix, Slots
from icae_jax.models import llama

SPECIAL_ROWS = 3  # [AE], [LM], [FT]: the last rows of the memory table


@dataclasses.dataclass(frozen=True)
class CompressionConfig:
    """k: memory tokens per segment. rate: text tokens per memory token. layout: see `compression.layout`.

    memory_init: "embedding" draws the memory table from N(mean, std) of the base's token embeddings, "normal" from N(0, 1).
    trigger_token: a token whose embedding the [AE] row starts from ("" for none); a base that was trained with a
        copying token already knows what to do after it.
    """

    method: str = "icae"
    k: int = 128
    rate: int = 4
    layout: str = "servable"
    memory_init: str = "embedding"
    trigger_token: str = ""

    def __post_init__(self):
        if self.method != "icae":
            raise ValueError(f"compression.method is {self.method!r}; choose icae")
        for name in ("k", "rate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"compression.{name} is {getattr(self, name)}; it must be a positive whole number")
        if self.memory_init not in ("embedding", "normal"):
            raise ValueError(f"compression.memory_init is {self.memory_init!r}; choose embedding or normal")
        layouts.get(self.layout)

    @property
    def segment_tokens(self):
        """Most text tokens that one segment holds."""
        return self.k * self.rate


# ------------------------------------------------------------------------------------------------------------- segments


def segment_shape(tokens, config):
    """(segments, tokens per segment) for a text: near-equal segments of at most k x rate tokens (reference v2)."""
    segments = max(1, math.ceil(tokens / config.segment_tokens))
    return segments, math.ceil(tokens / segments)


def segment_contexts(contexts, config, shape=None):
    """Cuts token lists into near-equal segments, padded with 0: ids `[B, S, N]` and lengths `[B, S]`, int32 numpy.

    shape: (S, N) to pad to; by default just enough for the longest. A row without tokens has lengths 0.
    """
    shapes = [segment_shape(len(c), config) for c in contexts]
    S, N = shape or (max(s for s, _ in shapes), max(n for _, n in shapes))
    ids = np.zeros((len(contexts), S, N), np.int32)
    lengths = np.zeros((len(contexts), S), np.int32)
    for b, (context, (segments, size)) in enumerate(zip(contexts, shapes, strict=True)):
        for s in range(segments):
            piece = context[s * size : (s + 1) * size]
            ids[b, s, : len(piece)] = piece
            lengths[b, s] = len(piece)
    return ids, lengths


# -------------------------------------------------------------------------------------------------------- trained table


def init_memory_table(key, base_params, config, trigger_id=None):
    """The trained embedding table `[k + 3, D]` float32: k memory tokens, then [AE], [LM], [FT]."""
    embeddings = jnp.asarray(base_params["embed"], jnp.float32)
    table = jax.random.normal(key, (config.k + SPECIAL_ROWS, embeddings.shape[1]), jnp.float32)
    if config.memory_init == "embedding":
        table = embeddings.mean(0, keepdims=True) + embeddings.std(0, keepdims=True) * table
    if trigger_id is not None:
        table = table.at[config.k].set(embeddings[trigger_id])
    return table


def embed_with_table(base_params, table, ids):
    """Embeddings of ids `[...]`, where negative ids are rows of the memory table from its end (`objectives.targets.AE`, …)."""
    special = jnp.take(table, jnp.where(ids < 0, ids + table.shape[0], 0), axis=0)
    tokens = llama.embed(base_params, jnp.maximum(ids, 0))
    return jnp.where(ids[..., None] < 0, special.astype(tokens.dtype), tokens)


# ------------------------------------------------------------------------------------------------------ write and read


def compress(model, base_params, trained, ids_BSN, lengths_BS, config, dropout_key=None):
    """Writes contexts into memory: all segments of all texts in one batched, masked encoder pass.

    trained: `{"lora": tree, "memory_table": [k + 3, D]}`. ids `[B, S, N]`, lengths `[B, S]` as `segment_contexts` makes them.
    Segments do not see each other; memory tokens see their segment's text and the memory tokens before them. Returns `Slots`.
    """
    B, S, N = ids_BSN.shape
    k, layout = config.k, layouts.get(config.layout)
    lengths = lengths_BS.reshape(B * S)
    tokens = llama.embed(base_params, ids_BSN.reshape(B * S, N)).astype(model.dtype)
    memory = jnp.broadcast_to(trained["memory_table"][:k].astype(model.dtype), (B * S, k, tokens.shape[-1]))
    real = jnp.concatenate([jnp.arange(N)[None] < lengths[:, None], jnp.ones((B * S, k), bool)], 1)
    mask = llama.causal_mask(N + k) & real[:, None, :]
    with jax.named_scope("encoder"):
        hidden, _ = model.apply(
            {"params": base_params, "lora": trained["lora"]},
            jnp.concatenate([tokens, memory], 1),
            layouts.encoder_positions(layout, N, k, lengths),
            mask,
            rngs=None if dropout_key is None else {"dropout": dropout_key},
        )
    return place(hidden[:, N:].reshape(B, S * k, -1), lengths_BS, config)


def place(slots_BMD, lengths_BS, config):
    """`Slots` of the hidden states of S segments a text: which are real, and where the decoder reads them."""
    positions, end = layouts.decoder_positions(layouts.get(config.layout), config.k, lengths_BS)
    return Slots(slots_BMD, jnp.repeat(lengths_BS > 0, config.k, axis=1), positions, end, lengths_BS)


def read(model, base_params, memory, head=()):
    """Runs the frozen decoder over `head` (ids that stand before the memory) and the memory: the `Prefix` that targets see."""
    B, M, D = memory.slots.shape
    h = len(head)
    x = memory.slots
    if h:
        tokens = llama.embed(base_params, jnp.asarray(head, jnp.int32)).astype(x.dtype)
        x = jnp.concatenate([jnp.broadcast_to(tokens, (B, h, D)), x], 1)
    positions = jnp.concatenate([jnp.broadcast_to(jnp.arange(h), (B, h)), h + memory.positions], 1)
    real = jnp.concatenate([jnp.ones((B, h), bool), memory.mask], 1)
    with jax.named_scope("memory_prefix"):
        _, (k, v) = model.apply(
            {"params": base_params}, x, positions, llama.causal_mask(h + M) & real[:, None, :], return_kv=True
        )
    return Prefix(llama.rotate_keys(model.config, k, positions), v, real, h + memory.end)
