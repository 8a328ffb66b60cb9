"""Quantised leaves in an array's place: codes, products, losses, gradients, residuals, a mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FRAMING, TINY, close, eight_devices, random_trained

from icae_jax.cli import flags
from icae_jax.compression import encoder
from icae_jax.compression import trained as trained_tree
from icae_jax.compression.config import CompressionConfig
from icae_jax.compression.decoder import Decoder
from icae_jax.compression.segments import Contexts, segment_contexts
from icae_jax.errors import UserError
from icae_jax.models import llama, lora, quantize, schemes
from icae_jax.models.llama import FrozenModel
from icae_jax.models.quantize import NF4_LEVELS, linear, linear_transposed, take_rows
from icae_jax.objectives import loss, targets
from icae_jax.objectives.packing import pack
from icae_jax.runtime import sharding

WIDE = dataclasses.replace(TINY, hidden_size=64, intermediate_size=128, head_dim=16)
TEXTS = [np.random.default_rng(n).integers(3, 64, n).tolist() for n in (5, 12)]
TRAINED = random_trained(WIDE, 3)
RNG = np.random.default_rng(0)


def is_matrix(x):
    return isinstance(x, quantize.QuantizedMatrix)


def dequantized(params):
    """The same numbers as arrays."""
    return jax.tree.map(
        lambda w: quantize.as_array(w, jnp.float32) if is_matrix(w) else w,
        params,
        is_leaf=is_matrix,
    )


@functools.cache
def base(scheme, tied=False):
    """A quantised base, of weights moderate enough for float32's rounding to stay small."""
    every = schemes.parse_scheme("int8+ends")
    params = jax.tree_util.tree_map_with_path(
        lambda keys, w: w if every.block_axis(tuple(k.key for k in keys)) is None else 4 * w,
        llama.init_params(jax.random.key(0), WIDE),
    )
    if tied:
        params = {name: w for name, w in params.items() if name != "lm_head"}
    return schemes.quantize_params(params, scheme)


# ------------------------------------------------------------------------------------ one matrix


@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_matrix_is_the_nearest_that_its_codes_can_say(kind, axis):
    """Breaks when a level, a scale, the order of codes in a byte, or a rounding is wrong."""
    w = RNG.standard_normal((3, 128, 192)).astype(np.float32)
    w[0, :64, :64] = 0  # blocks of zeros
    stored = schemes.quantize_matrix(w, kind, axis)
    got = np.asarray(stored.dequantize(jnp.float32))
    assert stored.shape == w.shape and (got[0, :64, :64] == 0).all()
    assert all(leaf.ndim == 3 for leaf in jax.tree.leaves(stored))
    if kind == "int8":
        step = np.abs(w).max(axis, keepdims=True) / 127
        assert (np.abs(got - w) <= step / 2 * 1.001).all()
        return
    blocks = np.moveaxis(w, axis, -1).reshape(-1, 64)
    scales = np.abs(blocks).max(-1)
    whole = (
        scales.reshape(*np.moveaxis(w, axis, -1).shape[:-1], -1).max(-1).repeat(w.shape[axis] // 64)
    )
    scales = np.rint(scales / np.where(whole > 0, whole, 1) * 255) / 255 * whole
    levels = NF4_LEVELS[None, None] * scales[:, None, None]
    nearest = np.abs(levels - blocks[..., None]).min(-1)
    errors = np.abs(np.moveaxis(got, axis, -1).reshape(-1, 64) - blocks)
    np.testing.assert_allclose(errors, nearest, atol=1e-6)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(stored)) < w.size * 0.56


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["int8", "nf4", "blocks of 32"])
def test_products_are_those_of_the_dequantised_matrix(kind, dtype):
    """Breaks when scales go to the wrong side of a product, or a result has the wrong dtype."""
    w = RNG.standard_normal((128, 64)).astype(np.float32)
    for axis in (-2, -1):
        if kind == "blocks of 32":
            shapes = schemes.matrix_shapes(w.shape, "int8", axis, 32)
            scales = RNG.random(shapes.scales.shape).astype(np.float32)
            stored = quantize.Int8Matrix(RNG.integers(-9, 9, w.shape).astype(np.int8), scales)
        else:
            stored = schemes.quantize_matrix(w, kind, axis)
        stored = jax.tree.map(jnp.asarray, stored)
        array = stored.dequantize(jnp.float32)
        for product, n in ((linear, 128), (linear_transposed, 64)):
            x = jnp.asarray(RNG.standard_normal((2, 3, n)), dtype)
            want, pull = jax.vjp(functools.partial(product, w=array, dtype=jnp.float32), x)
            got, pull_stored = jax.vjp(functools.partial(product, w=stored, dtype=jnp.float32), x)
            bound = 1e-5 if dtype == "float32" else 2e-2
            assert got.dtype == jnp.float32 and product(x, stored).dtype == x.dtype
            close(got, want, bound)
            d = jnp.asarray(RNG.standard_normal(want.shape), jnp.float32)
            assert pull_stored(d)[0].dtype == x.dtype
            close(pull_stored(d)[0].astype(jnp.float32), pull(d)[0].astype(jnp.float32), bound)
        ids = np.asarray([[5, 127], [0, 5]])
        close(take_rows(stored, ids), np.asarray(array)[ids], 1e-6)


def test_rows_of_a_table_are_dequantised_alone():
    """Breaks when an embedding look-up forms the whole table in floats."""
    for kind in ("int8", "nf4"):
        table = schemes.quantize_matrix(np.ones((512, 64), np.float32), kind, -1)
        text = jax.jit(take_rows).lower(table, np.zeros(2, int)).as_text()
        assert "512x64xf32" not in text and "512x32x2xf32" not in text and "2x64xf32" in text


# --------------------------------------------------------------------------------- a whole model


def contexts(config):
    return Contexts(*segment_contexts(TEXTS, config), config.k)


PACKED = {"ae": pack([[targets.ae_target(text, FRAMING)] for text in TEXTS], 1, 13, 13)}


@functools.partial(jax.jit, static_argnames=("method", "remat"))
def losses(trained, params, method, remat):
    """(sum of losses, gradient)."""

    def total(trained):
        config = CompressionConfig(method, k=3, rate=4)
        frozen = FrozenModel(llama.Llama(WIDE, lora_scale=0.5, remat=remat), params)
        memory = encoder.compress(frozen, trained, contexts(config), config)
        decoder, heads = Decoder.of(frozen, trained), {"ae": ()}
        every = loss.label_losses(decoder, memory, PACKED, heads, config.position_layout, 5)
        return loss.objective_sums(every, PACKED)["ae"][0]

    return jax.value_and_grad(total)(trained)


def gradients_agree(got, want):
    """Each tensor's within 1e-5; those of LoRA's a are zero while b is."""
    largest = max(float(np.abs(theirs).max()) for theirs in jax.tree.leaves(want))
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.abs(mine - theirs).max() <= 1e-5 * max(np.abs(theirs).max(), 1e-3 * largest)


@pytest.mark.parametrize(
    ("scheme", "method", "remat", "tied"),
    [
        ("int8", "icae", "frozen", False),
        pytest.param("nf4+ends", "icae", "full", False, marks=pytest.mark.nightly),
        pytest.param("int8+ends", "x500", "dots", True, marks=pytest.mark.nightly),
    ],
)
def test_a_quantised_base_computes_what_its_numbers_say(scheme, method, remat, tied):
    """Breaks when a matmul, the head or an embedding bypasses `models.quantize`, when a gradient
    does not flow through a product, or where a policy changes the mathematics.
    """
    stored, ends = base(scheme, tied), 0
    if scheme.endswith("ends"):
        ends = 1 if tied else 2
    assert sum(map(is_matrix, jax.tree.leaves(stored, is_leaf=is_matrix))) == 7 + ends
    same = dequantized(stored)
    got, d_got = losses(TRAINED, stored, method, remat)
    want, d_want = losses(TRAINED, same, method, "none")  # one program for all schemes
    close(got, want)
    assert abs(float(want) - float(losses(TRAINED, base("", tied), method, "none")[0])) > 1e-3
    gradients_agree(d_got, d_want)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("remat", llama.REMAT_POLICIES)
def test_no_dequantised_matrix_is_saved_for_the_backward_pass(remat, kind):
    """Breaks when the residuals of a product hold its matrix in floats, for every layer."""
    params = base(kind)
    adapters = lora.init_lora(jax.random.key(1), WIDE, lora.LoraConfig(4))
    matrices = {w.shape[-2:] for w in jax.tree.leaves(params, is_leaf=is_matrix) if is_matrix(w)}
    at = None if kind == "int8" else np.asarray([3])  # the last block may keep some positions only

    def total(adapters):
        ids, positions, mask = jnp.ones((1, 5), int), jnp.arange(5)[None], llama.causal_mask(5)
        variables = {"params": params, "lora": adapters}
        hidden, _ = llama.Llama(WIDE, remat=remat).apply(variables, ids, positions, mask, at=at)
        return jnp.sum(hidden**2)

    saved = jax.eval_shape(lambda adapters: jax.vjp(total, adapters)[1], adapters)
    shapes = [x.shape for x in jax.tree.leaves(saved) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert shapes and not [shape for shape in shapes if shape[-2:] in matrices]


def test_layers_are_dequantised_one_at_a_time():
    """Breaks when XLA takes the dequantisation of all layers out of the scan, or saves it."""
    adapters, shapes = {}, []
    for layers in (4, 12):
        config = dataclasses.replace(
            WIDE, hidden_size=128, intermediate_size=512, num_layers=layers
        )
        plain = llama.param_shapes(config)
        adapters = jax.eval_shape(
            lambda config=config: lora.init_lora(jax.random.key(1), config, lora.LoraConfig(4))
        )
        params = schemes.quantized_shapes(plain, "nf4", jnp.float32)

        def total(adapters, params, config=config):
            variables, mask = {"params": params, "lora": adapters}, llama.causal_mask(2)
            x = jnp.ones((1, 2), int), jnp.arange(2)[None], mask
            return jnp.sum(llama.Llama(config, remat="none").apply(variables, *x)[0] ** 2)

        compiled = jax.jit(jax.grad(total)).lower(adapters, params).compile()
        one = sum(w.size * 4 for w in jax.tree.leaves(plain["layers"])) // layers
        shapes.append((compiled.memory_analysis().temp_size_in_bytes, one))
    (few, one), (many, _) = shapes
    assert many - few < one and many < 4 * one  # eight layers more would be 8 * one


@pytest.mark.nightly
def test_a_quantised_base_lies_on_a_mesh():
    """Breaks when sharding does not reach a leaf's arrays, or fails on axes of length 1."""
    stored = base("nf4+ends")
    want, d_want = losses(TRAINED, stored, "icae", "full")
    with eight_devices():
        mesh = sharding.make_mesh(sharding.MeshConfig(1, 2, 2), jax.devices()[:4])
        placement = sharding.Placement(mesh, WIDE)
        shardings = placement.tree(stored)
        q = shardings["layers"]["self_attn"]["q_proj"]["kernel"]
        assert tuple(q.codes.spec) == (None, "fsdp", "tensor")
        assert tuple(q.scales.spec) == (None, None, "tensor")
        assert tuple(shardings["embed"].codes.spec) == ("tensor", "fsdp")
        with placement.active():
            got, d_got = losses(
                jax.device_put(TRAINED, placement.tree(TRAINED)),
                jax.device_put(stored, shardings),
                "icae",
                "full",
            )
        close(jax.device_get(got), want)
        gradients_agree(jax.device_get(d_got), d_want)


def test_the_memory_table_starts_from_the_embeddings():
    """Breaks when a quantised table gives another mean, deviation or trigger than its numbers."""
    config = CompressionConfig(k=3, rate=4, memory_init="embedding")
    for scheme in ("int8+ends", "nf4+ends"):
        table = base(scheme)["embed"]
        got, want = (
            trained_tree.init_memory_table(jax.random.key(0), x, config, trigger_id=9)
            for x in (table, table.dequantize(jnp.float32))
        )
        close(got, want)


# --------------------------------------------------------------------------------------- schemes


def test_schemes():
    """Breaks when a scheme's text is read otherwise than written, or the flag lists others."""
    for text in ("", *schemes.SCHEMES):
        assert str(schemes.parse_scheme(text)) == text
    with pytest.raises(UserError, match=r"config\.quantize is 'int4'; choose from int8, nf4"):
        schemes.parse_scheme("int4", "config.quantize")
    assert ("float32", "bfloat16", *schemes.SCHEMES) == flags.BASE_DTYPES


def test_shapes_are_those_of_the_parameters():
    """Breaks when a plan counts other leaves than a load makes, or a bad width is not named."""
    for scheme in schemes.SCHEMES:
        shapes = schemes.quantized_shapes(llama.param_shapes(WIDE), scheme, jnp.float32)
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), base(scheme))
        assert shapes == like
    with pytest.raises(UserError, match=r"do not divide the width 48 of layers\.\S+; use int8$"):
        schemes.quantized_shapes(llama.param_shapes(TINY), "nf4", jnp.float32)
