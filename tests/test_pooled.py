"""Mean pooling against the base's own states, and against groups cut by hand."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, close, random_trained_of

from icae_jax.compression import encoder
from icae_jax.compression.config import CompressionConfig
from icae_jax.compression.methods import pooled
from icae_jax.compression.segments import Contexts, segment_contexts
from icae_jax.compression.trained import init
from icae_jax.models import llama
from icae_jax.models.llama import FrozenModel
from icae_jax.models.lora import LoraConfig

MODEL = llama.Llama(TINY)
RNG = np.random.default_rng(0)
TEXTS = [RNG.integers(3, 64, n).tolist() for n in (12, 7, 1)]


@functools.partial(jax.jit, static_argnames=("config", "ks"))
def compress(params, trained, ids, lengths, config, ks):
    contexts = Contexts(ids, lengths, max(ks))
    return encoder.compress_several(FrozenModel(MODEL, params), trained, contexts, ks, config)


@functools.partial(jax.jit, static_argnames="mask")
def states(params, ids, mask):
    """The base's last states of one text without padding."""
    T = ids.shape[1]
    sees = jnp.ones((1, 1, T), bool) if mask == "all" else llama.causal_mask(T)
    return MODEL.apply({"params": params}, ids, jnp.arange(T)[None], sees)[0][0]


@pytest.mark.parametrize("mask", ["causal", "all"])
def test_at_a_ratio_of_one_it_is_the_base(tiny_params, mask):
    """Breaks when the projection does not start as the identity, LoRA not at the base, when the
    text is read with other tokens or positions, or a token's mean has others in it.
    """
    config = CompressionConfig(method="pooled", k=12, rate=1, encoder_mask=mask)
    trained = init(jax.random.key(0), tiny_params["embed"], TINY, LoraConfig(4), config)
    ids, lengths = segment_contexts(TEXTS[:1], config)
    (memory,) = compress(tiny_params, trained, ids, lengths, config, (12,))
    want = states(tiny_params, np.asarray(TEXTS[:1]), mask)
    close(memory.slots[0], want)
    other = states(tiny_params, np.asarray(TEXTS[:1]), {"causal": "all", "all": "causal"}[mask])
    assert np.abs(other - want).max() > 1e-2


def by_hand(text, states, k, projection):
    """Means over the tokens whose share of the text begins in each of k equal parts."""
    n = len(text)
    cuts = [j * n // k for j in range(k + 1)]
    means = [states[a : max(b, a + 1)].mean(0) for a, b in itertools.pairwise(cuts)]
    return np.stack(means) @ projection


def test_groups_are_near_equal_and_never_empty(tiny_params):
    """Breaks when a group takes its neighbour's token, is empty, or counts padding; when the mean
    is a sum; when the projection is left out or transposed; or when one pass for several numbers
    of memory tokens gives others than their own passes.
    """
    config = CompressionConfig(method="pooled", k=5, rate=2.4)
    trained = random_trained_of(config)
    ids, lengths = segment_contexts(TEXTS, config)
    ks = (5, 3, 1)
    several = compress(tiny_params, trained, ids, lengths, config, ks)
    (alone,) = compress(tiny_params, trained, ids, lengths, config, (12,))
    close(compress(tiny_params, trained, ids, lengths, config, (3,))[0].slots, several[1].slots)
    lora_states = functools.partial(MODEL.apply, {"params": tiny_params, "lora": trained["lora"]})
    for b, text in enumerate(TEXTS):
        T = len(text)
        hidden, _ = lora_states(np.asarray([text]), jnp.arange(T)[None], jnp.ones((1, 1, T), bool))
        for k, memory in (*zip(ks, several, strict=True), (12, alone)):
            want = by_hand(text, np.asarray(hidden[0]), k, np.asarray(trained["projection"]))
            close(memory.slots[b], want, 2e-5)


def test_the_sizes_of_groups():
    """Breaks when a group is empty, holds padding, or, of k groups of n tokens, one is more than a
    token longer than another.
    """
    for n in range(1, 14):
        for k in (1, 3, 12):
            inside = np.asarray(pooled.groups(k, jnp.asarray([n]), 13)[0])
            sizes = inside.sum(1)
            assert sizes.min() > 0 and not inside[:, n:].any()
            assert k > n or (sizes.max() - sizes.min() <= 1 and sizes.sum() == n)
