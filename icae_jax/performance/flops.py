"""FLOPs that the mathematics requires, counted from shapes, for MFU and planning.

Only matmuls are counted, a multiply-add as two FLOPs; embeddings, norms, RoPE and softmax are not.
Each weight element costs 2 FLOPs per token forward, 2 for the activation gradient, and 2 for its
own gradient if trained. Attention costs 4 x heads x head size per query, key and layer forward, and
twice that backward. Nothing is recomputed.

Arrays count at their full size: with padding, with the keys that a causal mask hides, and with the
first layer's input gradient, although nothing below its LoRA reads it. In the last layer, what
nothing reads is not counted: in the encoder, everything except the memory tokens, beyond K/V
(500xCompressor: K/V of the memory tokens only); of a memory in the decoder, everything except K/V;
of targets, everything except the labels, beyond K/V.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from icae_jax.compression.config import CompressionConfig
from icae_jax.models import lora
from icae_jax.models.llama import ModelConfig
from icae_jax.models.lora import LoraConfig


class Flops(NamedTuple):
    """FLOPs by where they are spent.

    encoder: the base's blocks over text and memory tokens. lora: LoRA branches, the encoder's and
    the decoder's. memory: the blocks over head (what stands before the memory) and memory in the
    decoder. targets: over targets or new tokens in the decoder. attention: scores and weighted sums
    of all three. logits: the output head at labels. teacher: all that it computes, forward only.
    """

    encoder: int = 0
    lora: int = 0
    memory: int = 0
    targets: int = 0
    attention: int = 0
    logits: int = 0
    teacher: int = 0

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(self)


KEYS_AND_VALUES = ("k_proj", "v_proj")


def _linear(config, tokens, keys, queries, lora_config=None):
    """FLOPs of the forward pass through the blocks' matmuls, or through their LoRA branches.

    tokens: in all layers but the last. keys, queries: tokens of the last layer that get K/V, and
    everything else.
    """
    sizes = {name: lora.projection_shape(config, name) for name in lora.PROJECTIONS}
    if lora_config:
        weights = {name: lora_config.rank * sum(sizes[name]) for name in lora_config.targets}
    else:
        weights = {name: math.prod(size) for name, size in sizes.items()}
    kv = sum(count for name, count in weights.items() if name in KEYS_AND_VALUES)
    total = sum(weights.values())
    return 2 * ((config.num_layers - 1) * total * tokens + kv * keys + (total - kv) * queries)


def _attention(config, rows, queries, keys, last_queries=None):
    """FLOPs of attention's forward pass in `rows` sequences; fewer queries in the last layer."""
    last = queries if last_queries is None else last_queries
    layers = (config.num_layers - 1) * queries + last
    return 4 * config.num_heads * config.head_dim * rows * layers * keys


def compress(
    model_config: ModelConfig,
    lora_config: LoraConfig,
    shape: tuple[int, int, int],
    ks: int | Sequence[int],
    compression: CompressionConfig,
) -> Flops:
    """FLOPs of writing contexts into memory, without gradients (`compression.encoder.compress`).

    shape: `(B, S, N)`, B texts of S segments of N tokens. ks: memory tokens per segment, or
    several, if one pass of the encoder writes the memories of all (`Method.write_several`).
    """
    B, S, N = shape
    ks = [ks] if isinstance(ks, int) else ks
    method, c, k = compression.spec, compression.encoder_config(model_config), max(ks)
    rows, length = B * S, N + (k if method.appends_memory_tokens else 0)
    queries = {"hidden": length if method.pools else k, "kv": 0}[method.keeps]
    last = (rows * (k if method.keeps == "kv" else length), rows * queries)
    written = Flops(
        encoder=_linear(c, rows * length, *last),
        lora=_linear(c, rows * length, *last, lora_config),
        attention=_attention(c, rows, length, length, queries),
    )
    for k in ks if method.flops else ():
        written = _added(written, Flops(**method.flops(model_config, shape, k)))
    return written


def _added(*parts):
    return Flops(*map(sum, zip(*parts, strict=True)))


def decode(
    model_config: ModelConfig, rows: int, keys: int, lora_config: LoraConfig | None = None
) -> Flops:
    """FLOPs of one new token in each of `rows` rows.

    keys: positions of the cache that the token attends to, its own included. lora_config: of the
    decoder's LoRA, if any.
    """
    tokens = (rows, rows, rows)
    return Flops(
        lora=_linear(model_config, *tokens, lora_config) if lora_config else 0,
        targets=_linear(model_config, *tokens),
        attention=_attention(model_config, rows, 1, keys),
        logits=2 * model_config.hidden_size * model_config.vocab_size * rows,
    )


def least(
    model_config: ModelConfig,
    lora_config: LoraConfig,
    compression: CompressionConfig,
    batch: dict[str, Any],
    heads: dict[str, tuple[int, ...]] | None = None,
    before: dict[str, tuple[int, ...]] | None = None,
    teacher_lora: LoraConfig | None = None,
) -> Flops:
    """FLOPs of one training step, forward and backward, on a training batch.

    batch: `context [B, S, N]`, `k` (one or several), and `targets` with `ids [B, G, T]` and `labels
    [B, G, U]` of each objective; only shapes are read. heads: by objective, the ids before the
    memory, by default none. before: by objective that a teacher knows (`objectives.distil`), the
    ids before the text that it reads; by default there is no teacher. teacher_lora: of its LoRA, if
    it has one.

    Head and memory run once for each distinct head. A memory of K/V does not run; its head runs
    once for the whole batch, and no gradient reaches it unless the decoder has a LoRA. UserError if
    `compression` does not know k.
    """
    k = batch.get("k")
    ks = [compression.choose(k) for k in (k if isinstance(k, tuple) else (k,))]
    written = compress(model_config, lora_config, batch["context"].shape, ks, compression)
    trained = Flops(2 * written.encoder, 3 * written.lora, 0, 0, 3 * written.attention)
    read = [_read(model_config, lora_config, compression, batch, heads or {}, k) for k in ks]
    taught = _taught(model_config, teacher_lora, batch, before or {}, len(ks))
    return _added(trained, *read, taught)


def _taught(c, lora_config, batch, before, memories):
    """FLOPs of the teacher, which reads text and targets once, in a training step with so many
    memories; the logits it is compared by are formed anew for each.
    """
    B, S, N = batch["context"].shape
    total = 0

    def blocks(*tokens):
        return _linear(c, *tokens) + (_linear(c, *tokens, lora_config) if lora_config else 0)

    for length in (len(ids) + S * N for ids in set(before.values())):
        total += blocks(B * length, B * length, 0) + _attention(c, B, length, length, 0)
    for o, ids in before.items():
        target = batch["targets"][o]
        (_, G, T), U = target["ids"].shape, target["labels"].shape[2]
        total += blocks(B * G * T, B * G * T, B * G * U)
        total += _attention(c, B * G, T, len(ids) + S * N + T, U)
        total += memories * 2 * c.hidden_size * c.vocab_size * B * G * U
    return Flops(teacher=total)


def _read(c, lora_config, compression, batch, heads, k):
    """FLOPs of the decoder in a training step, behind memories of k tokens per segment."""
    method, decoder_lora = compression.spec, lora_config if compression.decoder_lora else None
    B, S, _ = batch["context"].shape
    M = S * k
    adapters = attention = memory = targets = logits = 0
    heads = {o: heads.get(o, ()) for o in batch["targets"]}
    for h in map(len, set(heads.values())):
        runs = method.memory.RUNS_IN_DECODER
        rows, length = (B, h + M) if runs else (1, h)
        has_gradient = runs or decoder_lora
        kv_only = (rows * length, rows * length, 0)
        memory += (2 if has_gradient else 1) * _linear(c, *kv_only)
        attention += (3 if has_gradient else 1) * _attention(c, rows, length, length, 0)
        adapters += 3 * _linear(c, *kv_only, decoder_lora) if decoder_lora else 0
    for o, target in batch["targets"].items():
        (_, G, T), U = target["ids"].shape, target["labels"].shape[2]
        tokens = (B * G * T, B * G * T, B * G * U)
        targets += 2 * _linear(c, *tokens)
        adapters += 3 * _linear(c, *tokens, decoder_lora) if decoder_lora else 0
        attention += 3 * _attention(c, B * G, T, len(heads[o]) + M + T, U)
        logits += 4 * c.hidden_size * c.vocab_size * math.prod(target["labels"].shape)
    return Flops(0, adapters, memory, targets, attention, logits)
