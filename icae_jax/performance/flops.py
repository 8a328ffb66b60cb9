"""FLOPs that the mathematics asks for, counted from shapes: what a run's speed is held against (MFU), and what a planner adds up.

Counted are matmuls alone, a multiplication and an addition being two; not embeddings, norms, RoPE, softmax. A number of a weight costs
every token 2 in the forward pass, 2 for the gradient of the activations and, where it is trained, 2 for its own. Attention costs every
query 4 x heads x head size a key and layer forward, and twice that backward. Nothing is recomputed.

Arrays are counted as they are run: with their padding, with keys that a causal mask hides, and with the first layer whole, though below its
LoRA the text's gradient has no reader. Of the last layer, what nothing reads is not counted: in the encoder all but the memory tokens,
beyond their keys and values (500xCompressor: these of the memory tokens alone); of a memory in the decoder all but K/V; of targets all but
the labels, beyond K/V.
"""

import math
import typing

from icae_jax.models import lora


class Flops(typing.NamedTuple):
    """FLOPs by where they are spent; `total` is their sum.

    encoder, memory, targets: the base's blocks over text and memory tokens in the encoder, over head (what stands before the memory) and
    memory in the decoder, and over targets (or new tokens) in the decoder. lora: the encoder's adapters. attention: scores and weighted
    sums of all three. logits: the output head at labels.
    """

    encoder: int = 0
    lora: int = 0
    memory: int = 0
    targets: int = 0
    attention: int = 0
    logits: int = 0

    @property
    def total(self):
        return sum(self)


KEYS_AND_VALUES = ("k_proj", "v_proj")


def _linear(config, tokens, keys, queries, lora_config=None):
    """FLOPs of the forward pass through the blocks' matmuls, or with `lora_config` through their adapters.

    tokens: in all layers but the last, of which `keys` tokens get K/V, and `queries` all else.
    """
    one = {name: math.prod(lora.projection_shape(config, name)) for name in lora.PROJECTIONS}
    if lora_config:
        one = {
            name: lora_config.rank * sum(lora.projection_shape(config, name))
            for name in lora_config.targets
        }
    kv = sum(count for name, count in one.items() if name in KEYS_AND_VALUES)
    every = sum(one.values())
    return 2 * ((config.num_layers - 1) * every * tokens + kv * keys + (every - kv) * queries)


def _attention(config, rows, queries, keys, last=None):
    """FLOPs of the forward pass over `rows` rectangles of queries and keys, in all layers; last: the queries of the last one."""
    layers = (config.num_layers - 1) * queries + (queries if last is None else last)
    return 4 * config.num_heads * config.head_dim * rows * layers * keys


def compress(model_config, lora_config, shape, k, method):
    """`Flops` of writing contexts into memory, without gradients (`compression.methods.compress`).

    shape: `(B, S, N)` of their ids, B texts of S segments of N tokens. k: memory tokens a segment. method: "icae" or "x500".
    """
    B, S, N = shape
    rows, length = B * S, N + k
    last = (rows * length, rows * k) if method == "icae" else (rows * k, 0)
    return Flops(
        encoder=_linear(model_config, rows * length, *last),
        lora=_linear(model_config, rows * length, *last, lora_config),
        attention=_attention(model_config, rows, length, length, k if method == "icae" else 0),
    )


def decode(model_config, rows, keys):
    """`Flops` of one new token of each of `rows` rows; keys: positions of the cache that it attends to, its own included."""
    return Flops(
        targets=_linear(model_config, rows, rows, rows),
        attention=_attention(model_config, rows, 1, keys),
        logits=2 * model_config.hidden_size * model_config.vocab_size * rows,
    )


def least(model_config, lora_config, compression, batch, heads=None):
    """`Flops` of one training step, forward and backward, of the rows that `batch` holds.

    model_config: `models.llama.ModelConfig`. lora_config: `models.lora.LoraConfig`. compression: `CompressionConfig`. batch: as training's
    are, `context [B, S, N]`, `k` and `targets` of each objective, `ids [B, G, T]` and `labels [B, G, U]`; of arrays (or
    `jax.ShapeDtypeStruct`s) only shapes are looked at. heads: `{objective: ids before the memory}`, by default none.

    Head and memory run once for each distinct head; 500xCompressor's memory does not run, and its head, which no gradient reaches, runs
    once for the whole batch. UserError where `compression` does not know k.
    """
    c, k = model_config, compression.choose(batch.get("k"))
    B, S, N = batch["context"].shape
    M = S * k
    written = compress(c, lora_config, (B, S, N), k, compression.method)
    memory = targets = logits = 0
    attention = 3 * written.attention
    heads = {o: (heads or {}).get(o, ()) for o in batch["targets"]}
    for head in set(heads.values()):
        h = len(head)
        if compression.method == "icae":
            memory += 2 * _linear(c, B * (h + M), B * (h + M), 0)
            attention += 3 * _attention(c, B, h + M, h + M, 0)
        else:
            memory += _linear(c, h, h, 0)
            attention += _attention(c, 1, h, h, 0)
    for o, target in batch["targets"].items():
        (_, G, T), U = target["ids"].shape, target["labels"].shape[2]
        targets += 2 * _linear(c, B * G * T, B * G * T, B * G * U)
        attention += 3 * _attention(c, B * G, T, len(heads[o]) + M + T, U)
        logits += 4 * c.hidden_size * c.vocab_size * math.prod(target["labels"].shape)
    return Flops(2 * written.encoder, 3 * written.lora, memory, targets, attention, logits)
