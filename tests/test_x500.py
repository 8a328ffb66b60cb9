"""K/V memories: that reading them equals running their tokens, and what the reference's layout does
otherwise.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, close, head_kernel, random_trained

from icae_jax.compression import encoder
from icae_jax.compression import memory as memories
from icae_jax.compression.config import CompressionConfig
from icae_jax.compression.decoder import Decoder
from icae_jax.compression.method import METHODS
from icae_jax.compression.segments import Contexts, segment_contexts
from icae_jax.models import llama
from icae_jax.models.llama import FrozenModel

MODEL = llama.Llama(TINY, lora_scale=0.5)
TRAINED = random_trained(TINY, 3)
RNG = np.random.default_rng(0)
TEXTS = [RNG.integers(3, 64, n).tolist() for n in (5, 12, 13, 25)]
BEHIND = RNG.integers(3, 64, (2, 1, 6)).astype(np.int32)


def config(layout="clean", **fields):
    return CompressionConfig(**{"method": "x500", "k": 3, "rate": 4, "layout": layout} | fields)


@functools.partial(jax.jit, static_argnames=("config", "k"))
def compress(params, trained, ids, lengths, config, k=3):
    return encoder.compress(FrozenModel(MODEL, params), trained, Contexts(ids, lengths, k), config)


def segments(texts, config):
    return segment_contexts(texts, config, pad_id=2)


@functools.partial(jax.jit, static_argnames="head")
def logits_behind(params, memory, ids, head=()):
    """Logits `[B, T, V]` of ids `[B, 1, T]` behind head and memory."""
    prefix = memory.read(Decoder(FrozenModel(MODEL, params), None), head)
    every = jnp.broadcast_to(jnp.arange(ids.shape[2]), ids.shape)
    return Decoder.of(FrozenModel(MODEL, params), TRAINED).label_hidden(
        prefix, prefix.end, ids, every
    ) @ head_kernel(params)


@jax.jit
def straight(params, ids, positions, mask):
    """Logits of one pass of the base, and its K/V."""
    hidden, kv = MODEL.apply({"params": params}, ids, positions, mask, return_kv=True)
    return hidden @ head_kernel(params), kv


# ----------------------------------------------------------------------------------------- identity


@pytest.mark.parametrize("head", [(), (1, 3)])
def test_a_prefix_of_real_tokens_equals_running_them_in_front(tiny_params, head):
    """Breaks when K is rotated twice or to other positions, the prefix is masked wrongly, or
    targets start elsewhere.
    """
    m, h, T = 7, len(head), BEHIND.shape[2]
    ids = RNG.integers(3, 64, (2, m)).astype(np.int32)
    in_front = np.concatenate(
        [np.broadcast_to(np.asarray(head, np.int32), (2, h)), ids, BEHIND[:, 0]], 1
    )
    at = np.arange(h + m + T)
    want, (k, v) = jax.device_get(
        straight(tiny_params, in_front, at[None], (at[:, None] >= at)[None])
    )
    memory = memories.place(
        memories.KV,
        {"k": k[:, :, h : h + m], "v": v[:, :, h : h + m]},
        np.full((2, 1), 20),
        config(),
    )
    assert memory.positions.tolist() == [list(range(m))] * 2
    close(logits_behind(tiny_params, memory, BEHIND, head), want[:, h + m :])
    moved = memory.replace(positions=memory.positions + np.asarray([3] + [0] * (m - 1), np.int32))
    assert (
        np.abs(np.asarray(logits_behind(tiny_params, moved, BEHIND, head)) - want[:, h + m :]).max()
        > 1e-3
    )


def test_without_lora_memory_tokens_are_tokens_behind_the_text(tiny_params):
    """Breaks when the encoder keeps other positions' K/V, or the decoder sees more of the text than
    they carry: the base run over text, tokens and continuation at once, the continuation blind to
    the text, gives the same logits.
    """
    tokens = [9, 30, 11]
    table = TRAINED["memory_table"].at[:3].set(tiny_params["embed"][jnp.asarray(tokens)])
    trained = {"lora": jax.tree.map(jnp.zeros_like, TRAINED["lora"]), "memory_table": table}
    behind = config("sequential")  # the layout whose memory tokens stand behind the text
    memory = compress(tiny_params, trained, *segments([TEXTS[1]] * 2, behind), config=behind)
    n, T = 12, BEHIND.shape[2]
    whole = np.concatenate([np.asarray([TEXTS[1] + tokens] * 2, np.int32), BEHIND[:, 0]], 1)
    at = np.arange(n + 3 + T)
    mask = (at[:, None] >= at) & ~((at >= n + 3)[:, None] & (at < n))
    want = np.asarray(straight(tiny_params, whole, at[None], mask[None])[0])[:, n + 3 :]
    close(logits_behind(tiny_params, memory, BEHIND), want, 2e-5)


# ---------------------------------------------------------------------------------- what is written


def test_shapes_and_bytes(tiny_params):
    memory = compress(tiny_params, TRAINED, *segments(TEXTS, config()), config=config())
    assert memory.k.shape == memory.v.shape == (2, 4, 9, 2, 8)  # L, B, M, K, H
    assert memory.tokens.tolist() == [3, 3, 6, 9] and memory.bytes_per_token == 2 * 2 * 2 * 8 * 4
    assert memory.bytes.tolist() == [
        3 * 256,
        3 * 256,
        6 * 256,
        9 * 256,
    ] and memory.ratio.tolist() == [5 / 3, 4, 13 / 6, 25 / 9]


@pytest.mark.parametrize("layout", METHODS["x500"].layouts)
def test_padding_counts_in_the_reference_layout_alone(tiny_params, layout):
    """Breaks when a layout of masked padding attends to it, or `reference` masks it (its memory
    would not be the authors').
    """
    ids, lengths = segments(TEXTS, config(layout))
    memory = compress(tiny_params, TRAINED, ids, lengths, config=config(layout))
    real = np.arange(ids.shape[2]) < lengths[..., None]
    other = compress(tiny_params, TRAINED, np.where(real, ids, 63), lengths, config=config(layout))
    changed = np.abs(np.asarray(other.k) - np.asarray(memory.k)).max((0, 3, 4))[0]
    assert (changed[:3] > 1e-5).any() == (layout == "reference")


def test_reference_positions(tiny_params):
    """Breaks when the memory is read elsewhere than behind the padded text, or the decoder starts
    elsewhere than at the memory's count.
    """
    memory = compress(
        tiny_params, TRAINED, *segments(TEXTS, config("reference")), config=config("reference")
    )
    assert np.asarray(memory.positions)[2, :6].tolist() == [
        12,
        13,
        14,
        15,
        16,
        17,
    ] and memory.end.tolist() == [3, 3, 6, 9]
    with pytest.raises(
        ValueError,
        match="segments of layout reference are 12 tokens, padding included; these are 9",
    ):
        encoder.compress(
            FrozenModel(MODEL, tiny_params),
            TRAINED,
            Contexts(jnp.zeros((1, 1, 9), int), jnp.ones((1, 1), int), 3),
            config("reference"),
        )


def test_memory_is_in_the_compute_dtype(tiny_params):
    """Breaks when a bfloat16 encoder hands over float32, twice the bytes."""
    model = llama.Llama(TINY, lora_scale=0.5, dtype=jnp.bfloat16)

    @jax.jit
    def written_and_read():
        memory = encoder.compress(
            FrozenModel(model, tiny_params),
            TRAINED,
            Contexts(*segments(TEXTS, config()), 3),
            config(),
        )
        return memory, memory.read(Decoder(FrozenModel(model, tiny_params), None), (1, 3))

    memory, prefix = jax.eval_shape(written_and_read)
    memory = memory.replace(
        k=np.zeros(memory.k.shape, memory.k.dtype), v=np.zeros(memory.v.shape, memory.v.dtype)
    )
    assert memory.k.dtype == memory.v.dtype == jnp.bfloat16 and memory.bytes_per_token == 128
    assert prefix.k.dtype == prefix.v.dtype == jnp.bfloat16 and prefix.k.shape == (2, 4, 11, 2, 8)
