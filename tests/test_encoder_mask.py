"""What a token of the encoder sees, and an encoder that stops after some layers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, close, random_params, random_trained_of

from icae_jax.compression import encoder
from icae_jax.compression.config import CompressionConfig
from icae_jax.compression.segments import Contexts, segment_contexts
from icae_jax.models import llama
from icae_jax.models.llama import FrozenModel

RNG = np.random.default_rng(0)
TEXTS = [RNG.integers(3, 64, n).tolist() for n in (12, 7)]
N, K = 12, 4
REAL = np.asarray([[True] * (N + K), [True] * 7 + [False] * 5 + [True] * K])


def sees(mask, b, t, s):
    """By the definition: whether query t of text b sees key s."""
    if mask == "all":
        return REAL[b, s]
    mutual = mask == "slots" and t >= N and s >= N
    return REAL[b, s] and (s <= t or mutual)


@functools.partial(jax.jit, static_argnames=("config", "model"))
def compress(params, trained, ids, lengths, config, model):
    contexts = Contexts(ids, lengths, config.k)
    return encoder.compress(FrozenModel(model, params), trained, contexts, config)


@functools.partial(jax.jit, static_argnames=("config", "keeps"))
def plain(params, trained, ids, lengths, mask, config, keeps):
    """All rows of the encoder's pass under a whole mask `[B, T, T]`, cut to the memory tokens."""
    x = jnp.concatenate(
        [params["embed"][ids[:, 0]], jnp.stack([trained["memory_table"][:K]] * len(ids))], 1
    )
    positions = config.position_layout.encoder_positions(N, K, lengths[:, 0])
    variables = {"params": params, "lora": trained["lora"]}
    hidden, (k, v) = llama.Llama(TINY).apply(variables, x, positions, mask, return_kv=True)
    return hidden[:, N:] if keeps == "hidden" else (k[:, :, N:], v[:, :, N:])


@pytest.mark.parametrize("method", ["icae", "x500"])
@pytest.mark.parametrize("mask", ["causal", "slots", "all"])
def test_masks_by_their_definition(tiny_params, method, mask):
    """Breaks when a token sees what the mask hides, when padding is seen, or when the last layer,
    which computes the memory tokens alone, takes the mask's first rows for theirs.
    """
    config = CompressionConfig(method=method, k=K, rate=3, encoder_mask=mask)
    trained = random_trained_of(config)
    arrays = segment_contexts(TEXTS, config)
    whole = np.asarray(
        [
            [[sees(mask, b, t, s) for s in range(N + K)] for t in range(N + K)]
            for b in range(len(TEXTS))
        ]
    )
    memory = compress(tiny_params, trained, *arrays, config, llama.Llama(TINY))
    want = plain(tiny_params, trained, *arrays, whole, config, config.spec.keeps)
    for got, wanted in zip(
        memory.contents.values(), want if method == "x500" else (want,), strict=True
    ):
        close(got, wanted)


def test_rows_at_known_times_under_a_mask_of_each_query(tiny_params):
    """Breaks when the last layer takes rows 0, 1, … of a 3-D mask for those at a numpy `at`, which
    are cut without being gathered.
    """
    mask = RNG.random((2, N, N)) < 0.5
    mask |= np.eye(N, dtype=bool)
    x, positions = np.asarray([t[:1] * N for t in TEXTS]) + np.arange(N) % 5, np.arange(N)[None]
    run = functools.partial(llama.Llama(TINY).apply, {"params": tiny_params}, x, positions, mask)
    whole, _ = run()
    for at in (np.arange(5, 9), jnp.arange(5, 9), np.asarray([[5, 6, 7, 8]] * 2)):
        close(run(at=at)[0], whole[:, 5:9])
    assert np.abs(whole[:, 5:9] - whole[:, :4]).max() > 1e-2


DEEP = dataclasses.replace(TINY, num_layers=4, windows=(0, 5, 3, 9))


def stopped_early(method):
    """(parameters of the first two of four layers, trained tree, arrays, memory of two layers)."""
    params = random_params(DEEP)
    config = CompressionConfig(method=method, k=K, rate=3, encoder_layers=2)
    trained = random_trained_of(config, DEEP)
    assert {len(x) for x in jax.tree.leaves(trained["lora"])} == {2}
    arrays = segment_contexts(TEXTS, config)
    memory = compress(params, trained, *arrays, config, llama.Llama(DEEP))
    cut = params | {"layers": jax.tree.map(lambda x: x[:2], params["layers"])}
    return cut, trained, arrays, memory


def test_an_encoder_that_stops_early():
    """Breaks when the layers that run are not the first ones, their LoRA belongs to others, or the
    final norm is taken. The base has windows of each layer's own, which must be theirs too.
    """
    params, trained, arrays, memory = stopped_early("icae")
    model = llama.Llama(DEEP.first_layers(2))
    config = CompressionConfig(method="icae", k=K, rate=3)
    want = compress(params, trained, *arrays, config, model).slots  # with the final norm
    got, scale = memory.slots, params["norm"]["scale"]
    normed = got / jnp.sqrt(jnp.mean(jnp.square(got), -1, keepdims=True) + DEEP.rms_norm_eps)
    close(normed * scale[None, None], want)
    assert np.abs(got - want).max() > 1e-2


def test_a_pooling_encoder_that_stops_early():
    """Breaks when all layers run where every state is wanted, or states are normed before their
    mean.
    """
    params, trained, arrays, memory = stopped_early("pooled")
    every = CompressionConfig(method="pooled", k=N, rate=1, encoder_layers=2)
    eye = trained | {"projection": jnp.eye(TINY.hidden_size)}
    contexts = arrays[0][:1], arrays[1][:1]
    model = llama.Llama(DEEP.first_layers(2))
    states = compress(params, eye, *contexts, every, model).slots[0]
    means = states.reshape(K, N // K, -1).mean(1)
    close(memory.slots[0], means @ trained["projection"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"encoder_mask": "none"}, "compression.encoder_mask is 'none'; choose from causal, slots"),
        ({"encoder_layers": -1}, "encoder_layers is -1; give a number of layers, or 0 for all"),
        (
            {"method": "x500", "encoder_layers": 1},
            "encoder_layers is 1; the memory of method x500 is of all layers, so set 0",
        ),
        (
            {"method": "pooled", "k": 16, "rate": 0.5},
            "compression.rate is 0.5: of 8 tokens, method pooled makes no 16 memory tokens",
        ),
    ],
)
def test_bad_values_are_named(fields, message):
    """Breaks when a bad value gets through, or the error does not name it."""
    with pytest.raises(ValueError, match=message):
        CompressionConfig(**fields)


def test_more_layers_than_the_base_has_are_refused():
    """Breaks when an encoder is cut beyond its end."""
    config = CompressionConfig(encoder_layers=3)
    with pytest.raises(ValueError, match="encoder_layers is 3; the base has 2 layers"):
        config.encoder_config(TINY)
