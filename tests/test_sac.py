"""SAC's anchors: the base's own keys and values, and what its vectors are added to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, close, random_trained_of

from icae_jax.compression import encoder
from icae_jax.compression.config import CompressionConfig
from icae_jax.compression.segments import Contexts, segment_contexts
from icae_jax.models import llama
from icae_jax.models.llama import FrozenModel

MODEL = llama.Llama(TINY)
RNG = np.random.default_rng(0)
TEXT = RNG.integers(3, 64, 12).tolist()


@functools.partial(jax.jit, static_argnames="config")
def compress(params, trained, ids, lengths, config):
    contexts = Contexts(ids, lengths, config.k)
    return encoder.compress(FrozenModel(MODEL, params), trained, contexts, config)


@jax.jit
def run(params, lora, x, mask):
    """K (before RoPE) and V of every token, positions 1, 2, … as in layout uniform."""
    positions = 1 + jnp.arange(x.shape[1])[None]
    variables = {"params": params} | ({} if lora is None else {"lora": lora})
    return MODEL.apply(variables, x, positions, mask, return_kv=True)[1]


def test_with_every_token_an_anchor_it_is_the_bases_own_cache(tiny_params):
    """Breaks when tokens are added, moved or left out, or keys lose their positions."""
    config = CompressionConfig(method="sac", k=12, rate=1, encoder_mask="causal")
    trained = random_trained_of(config)
    trained["memory_table"] = jnp.zeros_like(trained["memory_table"])
    trained["lora"] = jax.tree.map(jnp.zeros_like, trained["lora"])
    memory = compress(tiny_params, trained, *segment_contexts([TEXT], config), config)
    k, v = run(tiny_params, None, np.asarray([TEXT]), llama.causal_mask(12))
    close(memory.k, k)
    close(memory.v, v)
    assert memory.positions.tolist() == [list(range(1, 13))] and memory.end.tolist() == [13]


@pytest.mark.parametrize("vectors", ["one", "each"])
@pytest.mark.parametrize("n", [12, 11, 2])
def test_anchors_by_hand(tiny_params, n, vectors):
    """Breaks when an anchor is another token, gets another vector or the same one twice, or when
    what is kept belongs to another token; with 2 tokens for 4 anchors, two share each.
    """
    config = CompressionConfig(method="sac", k=4, rate=3, anchor_vectors=vectors)
    trained = random_trained_of(config)
    table = np.asarray(trained["memory_table"])
    assert len(table) == 3 + {"one": 1, "each": 4}[vectors]
    text = TEXT[:n]
    anchors = [n * (2 * j + 1) // 8 for j in range(4)]
    assert n != 12 or anchors == [1, 4, 7, 10]
    x = np.asarray(tiny_params["embed"])[text]
    for token in set(anchors):
        x[token] += table[anchors.index(token) if vectors == "each" else 0]
    k, v = run(tiny_params, trained["lora"], x[None], np.ones((1, 1, n), bool))
    memory = compress(tiny_params, trained, *segment_contexts([text], config), config)
    close(memory.k, k[:, :, anchors])
    close(memory.v, v[:, :, anchors])
    assert memory.positions.tolist() == [[a + 1 for a in anchors]]


def test_one_vector_knows_every_number_of_anchors():
    """Breaks when a vector of each anchor's own is asked for anchors that were never trained."""
    one = CompressionConfig(method="sac", k=4, rate=3)
    each = CompressionConfig(method="sac", k=4, rate=3, anchor_vectors="each")
    assert (one.vectors, each.vectors) == (1, 4)
    assert one.choose(12) == 12
    with pytest.raises(ValueError, match="k is 3; this compressor was trained with 4"):
        each.choose(3)
    with pytest.raises(ValueError, match="anchor_vectors is 'each', but method icae has no such"):
        CompressionConfig(anchor_vectors="each")
    with pytest.raises(ValueError, match="anchor_vectors is 'two'; choose from one, each"):
        CompressionConfig(method="sac", anchor_vectors="two")
