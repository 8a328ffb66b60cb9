"""Rotary positions: angles as transformers has them, scores that know distances alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, close

from icae_jax.models import rope

LONG = dataclasses.replace(TINY, head_dim=32, rope_theta=500.0, max_position_embeddings=256)
SCALINGS = {
    "default": (None, {}),
    "linear": (rope.LinearScaling(4.0), {"factor": 4.0}),
    "llama3": (
        rope.Llama3Scaling(8.0, 1.0, 4.0, 64),
        {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "yarn": (
        rope.YarnScaling(4.0, 64, 1.3),
        {"factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.3},
    ),
    "yarn, whole ramp": (
        rope.YarnScaling(4.0, 64, 1.0, 8.0, 0.5, truncate=False),
        {
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "attention_factor": 1.0,
            "beta_fast": 8.0,
            "beta_slow": 0.5,
            "truncate": False,
        },
    ),
}


@pytest.mark.parametrize("name", [name for name in SCALINGS if name != "default"])
def test_frequencies_as_transformers_has_them(name):
    """Breaks when a scaling stretches other frequencies, or as much where it should not, or loses
    its magnitude.
    """
    pytest.importorskip("torch")
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling, fields = SCALINGS[name]
    kind = name.split(",")[0]
    hub = transformers.LlamaConfig(
        hidden_size=128,
        num_attention_heads=4,
        head_dim=32,
        max_position_embeddings=256,
        rope_parameters={"rope_type": kind, "rope_theta": 500.0, **fields},
    )
    wanted, magnitude = ROPE_INIT_FUNCTIONS[kind](hub, None)
    config = dataclasses.replace(LONG, rope_scaling=scaling)
    np.testing.assert_allclose(rope.frequencies(config), wanted.numpy(), rtol=1e-5)
    cos, sin = rope.tables(config, jnp.arange(5))
    np.testing.assert_allclose(cos**2 + sin**2, magnitude**2, rtol=1e-5)


@pytest.mark.parametrize("name", SCALINGS)
def test_scores_know_distances_alone(name):
    """Breaks when halves are paired otherwise in cos than in sin, or angles do not grow evenly with
    positions.
    """
    config = dataclasses.replace(LONG, rope_scaling=SCALINGS[name][0])
    q, k = np.random.default_rng(0).standard_normal((2, 1, 1, 3, 32)).astype(np.float32)

    @jax.jit
    def scores(there, here):
        turned = (
            rope.rotate(x, rope.tables(config, position)) for x, position in ((q, there), (k, here))
        )
        return jnp.einsum("btnh,btnh->n", *turned)

    def at(*positions):
        return np.asarray(scores(*(np.asarray([[position]]) for position in positions)))

    close(at(90, 70), at(25, 5))
    assert np.abs(at(90, 70) - at(90, 71)).max() > 1e-3


def test_stacked_keys_are_rotated_row_by_row():
    """Breaks when keys of a prefix are rotated to another row's positions, in another layer than
    the first, or in another dtype.
    """
    k = np.random.default_rng(1).standard_normal((3, 2, 4, 1, 32)).astype(jnp.bfloat16)
    at = np.asarray([[0, 1, 2, 3], [7, 8, 20, 30]])
    got = np.asarray(jax.jit(rope.rotate_keys, static_argnums=0)(LONG, k, at))
    assert got.dtype == jnp.bfloat16
    one = jax.jit(lambda k, at: rope.rotate(k, rope.tables(LONG, at)))
    for layer, row in np.ndindex(3, 2):
        close(got[layer, row], one(k[layer, row], at[row]))
