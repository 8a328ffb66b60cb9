"""A quantised leaf in an array's place: encoder, decoder, gradients, greedy decoding, a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FRAMING, TINY, close, eight_devices, random_params, random_trained

from icae_jax.compression import encoder
from icae_jax.compression.config import CompressionConfig
from icae_jax.compression.decoder import Decoder
from icae_jax.compression.segments import Contexts, segment_contexts
from icae_jax.inference import generate
from icae_jax.models import llama, quantize
from icae_jax.models.axes import logical_axes
from icae_jax.models.llama import FrozenModel
from icae_jax.models.pytree import pytree
from icae_jax.objectives import loss, targets
from icae_jax.objectives.packing import pack
from icae_jax.runtime import sharding

MODEL = llama.Llama(TINY, lora_scale=0.5, remat="full")
CONFIG = CompressionConfig(k=3, rate=4)
TRAINED = random_trained(TINY, CONFIG.k)
TEXTS = [np.random.default_rng(n).integers(3, 64, n).tolist() for n in (5, 12)]


@pytree
class Int8(quantize.QuantizedMatrix):
    """int8 with one scale for each output channel: values `[…, in, out]`, scales `[…, 1, out]`."""

    values: jax.Array
    scales: jax.Array

    @classmethod
    def of(cls, w):
        scales = jnp.abs(w).max(-2, keepdims=True) / 127
        return cls(jnp.round(w / scales).astype(jnp.int8), scales)

    def dequantize(self, dtype):
        return (self.values * self.scales).astype(dtype)

    def matmul(self, x, dtype=None):
        """The scales are applied to the result, so that no matrix of floats is formed."""
        y = quantize.linear(x, self.values, dtype)
        return y * jnp.squeeze(self.scales, -2).astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))


def is_matrix(path):
    return logical_axes(tuple(k.key for k in path)) != () and path[-1].key != "bias"


def quantized(params):
    return jax.tree_util.tree_map_with_path(
        lambda path, w: Int8.of(w) if is_matrix(path) else w, params
    )


def rounded(params):
    """The same numbers as arrays."""
    return jax.tree_util.tree_map_with_path(
        lambda path, w: Int8.of(w).dequantize(jnp.float32) if is_matrix(path) else w, params
    )


@pytest.fixture(scope="module", params=[False, True], ids=["head", "tied"])
def params(request):
    params = random_params(TINY)
    return {k: w for k, w in params.items() if k != "lm_head"} if request.param else params


CONTEXTS = Contexts(*segment_contexts(TEXTS, CONFIG), CONFIG.k)
PACKED = pack([[targets.ae_target(text, FRAMING)] for text in TEXTS], 1, 13, 13)


@jax.jit
@jax.value_and_grad
def loss_of(trained, params):
    base = FrozenModel(MODEL, params)
    memory = encoder.compress(base, trained, CONTEXTS, CONFIG)
    decoder, batch = Decoder.of(base, trained), {"ae": PACKED}
    losses = loss.label_losses(decoder, memory, batch, {"ae": ()}, CONFIG.position_layout, 5)
    return loss.objective_sums(losses, batch)["ae"][0]


@jax.jit
def restored(trained, params):
    base = FrozenModel(MODEL, params)
    decoder = Decoder.of(base, trained)
    prefix = encoder.compress(base, trained, CONTEXTS, CONFIG).read(decoder)
    prompts = generate.Prompts(jnp.full((2, 1), targets.AE), jnp.ones(2, int), prefix.end)
    return generate.greedy(decoder, prefix, prompts, max_new_tokens=6, stop_ids=(2,))


def test_a_quantised_base_computes_what_its_numbers_say(params):
    """Breaks when a matmul or an embedding bypasses `models.quantize`, or a leaf is refused."""
    stored, same = quantized(params), rounded(params)
    count = sum(
        isinstance(w, Int8) for w in jax.tree.leaves(stored, is_leaf=lambda w: isinstance(w, Int8))
    )
    assert count == 7 + ("lm_head" in params) + 1
    (got, d_got), (want, d_want) = loss_of(TRAINED, stored), loss_of(TRAINED, same)
    close(got, want)
    assert abs(float(loss_of(TRAINED, params)[0]) - float(want)) > 1e-3, (
        "quantising changed nothing"
    )
    for mine, theirs in zip(jax.tree.leaves(d_got), jax.tree.leaves(d_want), strict=True):
        if np.abs(theirs).max() > 0:
            close(mine, theirs, 1e-4)
    mine, theirs = restored(TRAINED, stored), restored(TRAINED, same)
    np.testing.assert_array_equal(mine.ids, theirs.ids)


def test_a_quantised_base_lies_on_a_mesh():
    """Breaks when sharding does not reach a leaf's arrays, or fails on axes of length 1."""
    stored = quantized(random_params(TINY))
    want, _ = loss_of(TRAINED, stored)
    with eight_devices():
        placement = sharding.Placement(
            sharding.make_mesh(sharding.MeshConfig(1, 2, 2), jax.devices()[:4]), TINY
        )
        shardings = placement.tree(stored)
        q = shardings["layers"]["self_attn"]["q_proj"]["kernel"]
        assert tuple(q.values.spec) == (None, "fsdp", "tensor")
        assert tuple(q.scales.spec) == (None, None, "tensor")
        with placement.active():
            got, _ = loss_of(
                jax.device_put(TRAINED, placement.tree(TRAINED)), jax.device_put(stored, shardings)
            )
        close(jax.device_get(got), want)
