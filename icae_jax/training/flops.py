"""FLOPs that the mathematics asks for, counted from shapes: what a run's speed is held against (MFU), and what a planner adds up.

Counted are matmuls alone, a multiplication and an addition being two; not embeddings, norms, RoPE, softmax. A number of a weight costs
every token 2 in the forward pass, 2 for the gradient of the activations and, where it is trained, 2 for its own. Attention costs every
query 4 x heads x head size a key and layer forward, and twice that backward. Nothing is recomputed.

Arrays are counted as they are run: with their padding, with keys that a causal mask hides, and with layers whole, as in a scan, also the
last one where only its K/V have a reader (500xCompressor's encoder, a memory in the decoder) and the first one below the LoRA, where
the text's gradient has none.
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


def _block_parameters(config):
    """Numbers in the kernels of all blocks."""
    return config.num_layers * sum(math.prod(lora.projection_shape(config, name)) for name in lora.PROJECTIONS)


def _lora_parameters(config, lora_config):
    """Numbers in the adapters of all blocks."""
    return config.num_layers * lora_config.rank * sum(sum(lora.projection_shape(config, name)) for name in lora_config.targets)


def _attention(config, rows, queries, keys):
    """The forward pass over `rows` rectangles of queries and keys, in all layers."""
    return 4 * config.num_layers * config.num_heads * config.head_dim * rows * queries * keys


def compress(model_config, lora_config, shape, k):
    """`Flops` of writing contexts into memory, without gradients (`compression.methods.compress`).

    shape: `(B, S, N)` of their ids, B texts of S segments of N tokens. k: memory tokens a segment.
    """
    B, S, N = shape
    tokens = B * S * (N + k)
    return Flops(
        encoder=2 * _block_parameters(model_config) * tokens,
        lora=2 * _lora_parameters(model_config, lora_config) * tokens,
        attention=_attention(model_config, B * S, N + k, N + k),
    )


def decode(model_config, rows, keys):
    """`Flops` of one new token of each of `rows` rows; keys: positions of the cache that it attends to, its own included."""
    return Flops(
        targets=2 * _block_parameters(model_config) * rows,
        attention=_attention(model_config, rows, 1, keys),
        logits=2 * model_config.hidden_size * model_config.vocab_size * rows,
    )


def least(model_config, lora_config, compression, batch, heads=None):
    """`Flops` of one training step, forward and backward, of the rows that `batch` holds.

    model_config: `models.llama.ModelConfig`. lora_config: `models.lora.LoraConfig`. compression: `CompressionConfig`. batch: as training's
    are, `context [B, S, N]`, `k` and `targets` of each objective, `ids [B, G, T]` and `labels [B, G, U]`; of arrays (or
    `jax.ShapeDtypeStruct`s) only shapes are looked at. heads: `{objective: ids before the memory}`, by default none.

    Head and memory run once for each distinct head; 500xCompressor's memory does not run, and its head, which no gradient reaches, runs
    once for the whole batch. ValueError where `compression` does not know k.
    """
    c, k = model_config, compression.choose(batch.get("k"))
    B, S, N = batch["context"].shape
    M, blocks = S * k, _block_parameters(c)
    written = compress(c, lora_config, (B, S, N), k)
    memory = targets = logits = 0
    attention = 3 * written.attention
    heads = {o: (heads or {}).get(o, ()) for o in batch["targets"]}
    for head in set(heads.values()):
        h = len(head)
        if compression.method == "icae":
            memory += 4 * blocks * B * (h + M)
            attention += 3 * _attention(c, B, h + M, h + M)
        else:
            memory += 2 * blocks * h
            attention += _attention(c, 1, h, h)
    for o, target in batch["targets"].items():
        _, G, T = target["ids"].shape
        targets += 4 * blocks * B * G * T
        attention += 3 * _attention(c, B * G, T, len(heads[o]) + M + T)
        logits += 4 * c.hidden_size * c.vocab_size * math.prod(target["labels"].shape)
    return Flops(2 * written.encoder, 3 * written.lora, memory, targets, attention, logits)
