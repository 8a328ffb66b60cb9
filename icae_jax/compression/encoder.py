"""What both methods share: their configuration, how a text is cut into segments, the trained table, and the one encoder pass."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from icae_jax.compression import layout as layouts
from icae_jax.errors import UserError
from icae_jax.models import llama

SPECIAL_ROWS = 3  # [AE], [LM], [FT]: the last rows of the memory table
# The default first.
METHOD_LAYOUTS = {
    "icae": ("servable", "sequential", "uniform", "padded"),
    "x500": ("clean", "sequential", "reference", "uniform"),
}
METHOD_TRIGGERS = {"icae": "trained", "x500": "bos"}


@dataclasses.dataclass(frozen=True)
class CompressionConfig:
    """method: "icae" (slots, arXiv 2307.06945) or "x500" (per-layer K/V, arXiv 2408.03094).

    k: memory tokens per segment. rate: text tokens per memory token; a segment holds at most k x rate tokens.
    k_choices: the numbers of memory tokens that one model learns, rising, the last of them k: each uses a prefix of the memory
        table; () for k alone.
    layout: see `compression.layout`; "" for the method's default, servable or clean.
    memory_init: "embedding" draws the memory table from N(mean, std) of the base's token embeddings, "normal" from N(0, 1).
    trigger: what asks for the text back: "trained", the table's [AE] row, or "bos", the tokenizer's own token; "" for the
        method's default, trained or bos.
    trigger_token: a token whose embedding the [AE] row starts from ("" for none); a base that was trained with a
        copying token already knows what to do after it.
    """

    method: str = "icae"
    k: int = 128
    rate: float = 4.0
    k_choices: tuple[int, ...] = ()
    layout: str = ""
    memory_init: str = "embedding"
    trigger: str = ""
    trigger_token: str = ""

    def __post_init__(self):
        if self.method not in METHOD_LAYOUTS:
            raise UserError(
                f"compression.method is {self.method!r}; choose from {', '.join(METHOD_LAYOUTS)}"
            )
        for name in ("k", "rate"):
            if getattr(self, name) <= 0:
                raise UserError(f"compression.{name} is {getattr(self, name)}; it must be positive")
        if self.segment_tokens < 1:
            raise UserError(
                f"compression.rate is {self.rate} with compression.k {self.k}: a segment holds no token; raise one of them"
            )
        choices = self.k_choices
        if choices and (
            min(choices) < 1 or list(choices) != sorted(set(choices)) or choices[-1] != self.k
        ):
            raise UserError(
                f"compression.k_choices is {choices}; give rising numbers from 1 on, the last of them k ({self.k})"
            )
        if self.memory_init not in ("embedding", "normal"):
            raise UserError(
                f"compression.memory_init is {self.memory_init!r}; choose embedding or normal"
            )
        if self.trigger not in ("", "trained", "bos"):
            raise UserError(f"compression.trigger is {self.trigger!r}; choose trained or bos")
        allowed = METHOD_LAYOUTS[self.method]
        object.__setattr__(self, "layout", self.layout or allowed[0])
        object.__setattr__(self, "trigger", self.trigger or METHOD_TRIGGERS[self.method])
        layouts.get(self.layout)
        if self.layout not in allowed:
            raise UserError(
                f"compression.layout is {self.layout!r}, not one of method {self.method}; choose from {', '.join(allowed)}"
            )

    @property
    def segment_tokens(self):
        """Most text tokens that one segment holds, whatever number of memory tokens is chosen for it."""
        return round(self.k * self.rate)

    @property
    def choices(self):
        """The numbers of memory tokens a segment that can be asked for."""
        return self.k_choices or (self.k,)

    def choose(self, k=None):
        """k if it is one of `choices`, by default the largest; UserError with the choices otherwise."""
        if k is None:
            return self.k
        if k not in self.choices:
            known = ", ".join(map(str, self.choices))
            raise UserError(
                f"k is {k}; this compressor was trained with {known} memory tokens a segment; choose one of these"
            )
        return int(k)


# ------------------------------------------------------------------------------------------------------------- segments


def segment_shape(tokens, config):
    """(segments, tokens per segment) for a text: near-equal segments of at most k x rate tokens (reference ICAE, v2)."""
    segments = max(1, math.ceil(tokens / config.segment_tokens))
    return segments, math.ceil(tokens / segments)


def segment_contexts(contexts, config, shape=None, pad_id=0):
    """Cuts token lists into near-equal segments, padded with `pad_id`: ids `[B, S, N]` and lengths `[B, S]`, int32 numpy.

    shape: (S, N) to pad to; by default just enough for the longest. N is `config.segment_tokens` in a layout of fixed length, where the
    padding is attended to. A row without tokens has lengths 0.
    """
    shapes = [segment_shape(len(c), config) for c in contexts]
    S, N = shape or (max(s for s, _ in shapes), max(n for _, n in shapes))
    if layouts.get(config.layout).fixed_length:
        N = config.segment_tokens
    ids = np.full((len(contexts), S, N), pad_id, np.int32)
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


# ---------------------------------------------------------------------------------------------------------- encoder pass


def encode(model, base_params, trained, ids_BSN, lengths_BS, config, k, kind, dropout_key=None):
    """Runs base + LoRA over `[segment | k memory tokens]`: all segments of all texts in one batched, masked pass.

    trained: `{"lora": tree, "memory_table": [config.k + 3, D]}`, of which the first k rows are used. ids `[B, S, N]`, lengths `[B, S]` as
    `segment_contexts` makes them. Segments do not see each other; memory tokens see their segment's text and the memory tokens before them.

    kind: what is wanted of the memory tokens, and returned: "hidden", hidden states after the final norm, `[B * S, k, D]`, or "kv",
    (K before RoPE, V) of every layer, each `[L, B * S, k, K, H]`. What the last layer has beyond that is not computed.
    """
    B, S, N = ids_BSN.shape
    layout = layouts.get(config.layout)
    lengths = lengths_BS.reshape(B * S)
    if layout.fixed_length:
        if config.segment_tokens != N:
            raise ValueError(
                f"segments of layout {layout.name} are {config.segment_tokens} tokens, padding included; these are {N}"
            )
        lengths = jnp.full_like(lengths, N)
    tokens = llama.embed(base_params, ids_BSN.reshape(B * S, N)).astype(model.dtype)
    memory = jnp.broadcast_to(
        trained["memory_table"][:k].astype(model.dtype), (B * S, k, tokens.shape[-1])
    )
    real = jnp.concatenate([jnp.arange(N)[None] < lengths[:, None], jnp.ones((B * S, k), bool)], 1)
    memory_at = np.arange(N, N + k)
    wanted = {
        "hidden": {"at": memory_at},
        "kv": {"at": llama.NOWHERE, "return_kv": True, "keep": memory_at},
    }[kind]
    with jax.named_scope("encoder"):
        hidden, kv = model.apply(
            {"params": base_params, "lora": trained["lora"]},
            jnp.concatenate([tokens, memory], 1),
            layouts.encoder_positions(layout, N, k, lengths),
            real,
            **wanted,
            rngs=None if dropout_key is None else {"dropout": dropout_key},
        )
    return {"hidden": hidden, "kv": kv}[kind]
