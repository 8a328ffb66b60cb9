"""LoRA as a collection: where it starts, what it adds, and dropout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, close, random_lora

from icae_jax.models import blocks, llama, lora

IDS = np.random.default_rng(0).integers(0, 64, (2, 10))
MODEL = llama.Llama(TINY, lora_scale=0.7, lora_dropout=0.5)


@jax.jit
def hidden(params, adapter=None, key=None):
    variables = {"params": params} | ({} if adapter is None else {"lora": adapter})
    rngs = None if key is None else {"dropout": key}
    return MODEL.apply(variables, IDS, jnp.arange(10)[None], llama.causal_mask(10), rngs=rngs)[0]


@pytest.fixture(scope="module")
def base_output(tiny_params):
    return hidden(tiny_params)


def test_training_starts_at_the_base_model(tiny_params, base_output):
    """Breaks when B does not start at zero, or A is not drawn as PEFT draws it (nothing could then
    be learned, or too fast).
    """
    config = lora.LoraConfig(rank=4, targets=("q_proj", "down_proj"))
    tree = jax.device_get(
        jax.jit(lora.init_lora, static_argnums=(1, 2))(jax.random.key(0), TINY, config)
    )
    shapes = {
        f"{m}.{p}.{x}": v.shape
        for m, ps in tree["layers"].items()
        for p, ab in ps.items()
        for x, v in ab.items()
    }
    assert shapes == {
        "self_attn.q_proj.a": (2, 32, 4),
        "self_attn.q_proj.b": (2, 4, 32),
        "mlp.down_proj.a": (2, 48, 4),
        "mlp.down_proj.b": (2, 4, 32),
    }
    for module, name, d_in in (("self_attn", "q_proj", 32), ("mlp", "down_proj", 48)):
        a = np.abs(tree["layers"][module][name]["a"])
        assert 0.95 * d_in**-0.5 < a.max() <= d_in**-0.5 and not np.array_equal(a[0], a[1])
    np.testing.assert_array_equal(hidden(tiny_params, tree), base_output)


def test_equals_merged_kernels(tiny_params, base_output):
    """Breaks when the scale, the order of A and B, or one of the seven projections is wrong."""
    adapter = random_lora(TINY, targets=lora.PROJECTIONS)
    merged = jax.tree.map(np.asarray, tiny_params)
    for module, projections in adapter["layers"].items():
        for name, pair in projections.items():
            update = 0.7 * np.einsum("lir,lro->lio", pair["a"], pair["b"])
            assert np.abs(update).max() > 0.01
            merged["layers"][module][name]["kernel"] = (
                merged["layers"][module][name]["kernel"] + update
            )
    got = np.asarray(hidden(tiny_params, adapter))
    close(got, hidden(merged))
    assert np.abs(np.asarray(got - base_output)).max() > 0.1


def test_dropout_only_with_a_key(tiny_params, base_output):
    """Breaks when dropout runs in inference, ignores its key, touches the base path, or is the same
    in every layer.
    """
    adapter = random_lora(TINY)
    without, one, same, other = (
        np.asarray(hidden(tiny_params, adapter, k)) for k in (None, *map(jax.random.key, (0, 0, 1)))
    )
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - without).max() > 1e-3 and np.abs(one - other).max() > 1e-3
    nothing = jax.tree.map(np.zeros_like, adapter)
    np.testing.assert_array_equal(hidden(tiny_params, nothing, jax.random.key(0)), base_output)


def test_dropout_keeps_the_mean():
    """Breaks when kept inputs are not scaled up by 1 / (1 - dropout)."""
    projection = blocks.Projection(3, lora_scale=1.0, lora_dropout=0.25)
    params = {"kernel": np.zeros((5, 3), np.float32)}
    adapter = {name: np.ones(shape, np.float32) for name, shape in (("a", (5, 2)), ("b", (2, 3)))}
    apply = functools.partial(
        projection.apply, {"params": params, "lora": adapter}, np.ones((4000, 5), np.float32)
    )
    plain, dropped = jax.device_get(
        jax.jit(lambda key: (apply(), apply(rngs={"dropout": key})))(jax.random.key(0))
    )
    assert plain[0].tolist() == [10.0] * 3
    assert dropped.mean() == pytest.approx(10, rel=0.02) and dropped.std() > 1
    assert set(np.unique(np.round(dropped * 0.75 / 2).astype(int))) <= set(range(6))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "lora.rank is 0"),
        ({"dropout": 1.0}, "lora.dropout is 1.0"),
        ({"dropout": -0.1}, "lora.dropout is -0.1"),
        ({"targets": ()}, "lora.targets holds nothing"),
        ({"targets": ("q_proj", "qkv")}, r"lora.targets holds \['qkv'\]"),
    ],
)
def test_bad_configuration_is_named(fields, message):
    """Breaks when a bad value gets through, or the error does not name it."""
    with pytest.raises(ValueError, match=message):
        lora.LoraConfig(**fields)
