"""Frozen matrices: every matmul with a weight of the base goes through the functions of this file.

A frozen matrix is an array, or a `QuantizedMatrix` in its place: a small pytree that knows how to
multiply. So a quantised base is the same tree of parameters with other leaves, and no module knows
of it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from icae_jax.models.pytree import pytree, static


class QuantizedMatrix:
    """A frozen matrix `[in, out]` in another representation than an array.

    Subclasses are pytrees (`models.pytree`) whose leaves all have the matrix's rank, with a layer
    axis in front where layers are stacked. A leaf's axis is as long as the matrix's or a fraction
    of it (such as `[1, out]` scales), so that slicing by layer and sharding by logical axis work
    leaf by leaf. `shape` and `dequantize` are all that a subclass must define; it may override the
    others to multiply without forming the matrix.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """The matrix's shape, layers included."""
        raise NotImplementedError

    def dequantize(self, dtype: DTypeLike) -> Float[Array, "*layers in out"]:
        """The matrix as an array."""
        raise NotImplementedError

    def matmul(
        self, x: Float[Any, "... in"], dtype: DTypeLike | None = None
    ) -> Float[Array, "... out"]:
        """`x @ w`; see `linear`."""
        return linear(x, self.dequantize(x.dtype), dtype)

    def matmul_transposed(
        self, x: Float[Any, "... out"], dtype: DTypeLike | None = None
    ) -> Float[Array, "... in"]:
        """`x @ w.T`; see `linear_transposed`."""
        return linear_transposed(x, self.dequantize(x.dtype), dtype)

    def take_rows(self, ids: Int[Any, "..."]) -> Float[Array, "... out"]:
        """Rows of the matrix; see `take_rows`."""
        return jnp.take(self.dequantize(jnp.float32), ids, axis=0)


FrozenMatrix = Array | np.ndarray | QuantizedMatrix


def linear(
    x: Float[Any, "... in"], w: "FrozenMatrix", dtype: DTypeLike | None = None
) -> Float[Array, "... out"]:
    """`x @ w` for a frozen matrix `w [in, out]`. dtype: of the result, x's by default."""
    if isinstance(w, QuantizedMatrix):
        return _product(x, w, jnp.dtype(x.dtype), dtype, False)
    return jnp.einsum("...i,io->...o", x, w.astype(x.dtype), preferred_element_type=dtype)


def linear_transposed(
    x: Float[Any, "... out"], w: "FrozenMatrix", dtype: DTypeLike | None = None
) -> Float[Array, "... in"]:
    """`x @ w.T` for a frozen matrix `w [in, out]`. dtype: of the result, x's by default."""
    if isinstance(w, QuantizedMatrix):
        return _product(x, w, jnp.dtype(x.dtype), dtype, True)
    return jnp.einsum("...o,io->...i", x, w.astype(x.dtype), preferred_element_type=dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _product(x, w, x_dtype, dtype, transposed):
    """`x @ w`, or `x @ w.T`, whose backward pass keeps `w` and dequantises it again.

    Without a rule of its own, the dequantised matrix of every layer would be saved.
    """
    return (w.matmul_transposed if transposed else w.matmul)(x, dtype)


def _product_fwd(x, w, x_dtype, dtype, transposed):
    return _product(x, w, x_dtype, dtype, transposed), w


def _product_bwd(x_dtype, dtype, transposed, w, dy):
    dy = dy.astype(x_dtype)
    return (w.matmul if transposed else w.matmul_transposed)(dy, x_dtype), None


_product.defvjp(_product_fwd, _product_bwd)


def take_rows(w: "FrozenMatrix", ids: Int[Any, "..."]) -> Float[Array, "... out"]:
    """Rows of a frozen matrix `w [in, out]`, such as the embeddings of token ids."""
    if isinstance(w, QuantizedMatrix):
        return w.take_rows(ids)
    return jnp.take(w, ids, axis=0)


def as_array(w: "FrozenMatrix", dtype: DTypeLike) -> Float[Array, "*layers in out"]:
    """A frozen matrix as an array."""
    return w.dequantize(dtype) if isinstance(w, QuantizedMatrix) else jnp.asarray(w, dtype)


def is_quantized(w: Any) -> bool:
    """Whether a node of a tree of parameters is a `QuantizedMatrix`."""
    return isinstance(w, QuantizedMatrix)


# ------------------------------------------------------------------------------------------- int8


@pytree
class Int8Matrix(QuantizedMatrix):
    """Symmetric int8: `codes * scales`, where a scale is the largest magnitude it covers / 127.

    codes: int8 `[…, in, out]`. scales: float32 `[…, in / b, out]` for blocks of b along `in`, by
    default one for each output (b = in); or, in a table, `[…, in, out / b]`.
    """

    codes: Any
    scales: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The matrix's shape, layers included."""
        return self.codes.shape

    def dequantize(self, dtype: DTypeLike) -> Float[Array, "*layers in out"]:
        """The matrix as an array."""
        axis = _block_axis(self.codes, self.scales)
        return _scale(self.codes.astype(jnp.float32), self.scales, axis).astype(dtype)

    def matmul(
        self, x: Float[Any, "... in"], dtype: DTypeLike | None = None
    ) -> Float[Array, "... out"]:
        """`x @ w`; see `linear`."""
        return self._multiply(linear, x, dtype, ends=(-2, -1))

    def matmul_transposed(
        self, x: Float[Any, "... out"], dtype: DTypeLike | None = None
    ) -> Float[Array, "... in"]:
        """`x @ w.T`; see `linear_transposed`."""
        return self._multiply(linear_transposed, x, dtype, ends=(-1, -2))

    def _multiply(self, product, x, dtype, ends):
        """A product with the codes, scaled before or after it, where scales are a vector.

        ends: the axes of the matrix that x and the result have last.
        """
        inner, outer = ends
        if 1 not in self.scales.shape[-2:]:
            return product(x, self.dequantize(x.dtype), dtype)
        if self.scales.shape[inner] == 1:
            y = product(x, self.codes.astype(x.dtype), jnp.float32)
            y = y * _as_row(self.scales, inner, y.ndim)
        else:
            scaled = (x * _as_row(self.scales, outer, x.ndim)).astype(x.dtype)
            y = product(scaled, self.codes.astype(x.dtype), dtype)
        return y.astype(dtype or x.dtype)

    def take_rows(self, ids: Int[Any, "..."]) -> Float[Array, "... out"]:
        """Rows of the matrix; see `take_rows`. Only these are dequantised."""
        axis = _block_axis(self.codes, self.scales)
        codes = jnp.take(self.codes, ids, axis=0).astype(jnp.float32)
        if axis == -2:
            blocks = ids // (self.codes.shape[0] // self.scales.shape[0])
            return codes * jnp.take(self.scales, blocks, axis=0)
        return _scale(codes, jnp.take(self.scales, ids, axis=0), -1)


def _as_row(scales, axis, ndim):
    """Scales `[1, n]` or `[n, 1]` (axis: the one of length 1) as `[1, …, n]`."""
    return jnp.squeeze(scales, axis).reshape((1,) * (ndim - 1) + (-1,))


def _block_axis(codes, scales):
    """The axis of a matrix along which values share a scale."""
    return -2 if codes.shape[-1] == scales.shape[-1] else -1


def in_blocks(values, count, axis):
    """Splits an axis into `count` blocks: `[…, n, out]` into `[…, count, n / count, out]`."""
    shape = list(values.shape)
    at = len(shape) + axis
    shape[at : at + 1] = [count, shape[at] // count]
    return values.reshape(shape)


def _scale(values, scales, axis):
    """Values times the scale of their block; blocks lie along `axis`."""
    blocks = in_blocks(values, scales.shape[axis], axis)
    # The blocks' own axis follows the one that counts them.
    return (blocks * jnp.expand_dims(scales, axis)).reshape(values.shape)


# -------------------------------------------------------------------------------------------- nf4

NF4_BLOCK = 64  # values that share a scale
# The 16 levels of NormalFloat, arXiv 2305.14314, appendix E.
NF4_LEVELS = np.asarray(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)


@pytree
class NF4Matrix(QuantizedMatrix):
    """4-bit NormalFloat in blocks of 64, with block scales of 8 bits (arXiv 2305.14314).

    A value is `NF4_LEVELS[code] * block_scale / 255 * scale`. Blocks lie along `axis`: -2 for
    kernels, where

    codes: uint8 `[…, in / 2, out]`; the low half is the even row's code, the high half the odd's.
    block_scales: uint8 `[…, in / 64, out]`. scales: float32 `[…, 1, out]`, the largest magnitude.

    In a table (axis -1) they are `[…, in, out / 2]`, `[…, in, out / 64]` and `[…, in, 1]`.
    """

    codes: Any
    block_scales: Any
    scales: Any
    axis: int = static()

    @property
    def shape(self) -> tuple[int, ...]:
        """The matrix's shape, layers included."""
        shape = list(self.codes.shape)
        shape[self.axis] *= 2
        return tuple(shape)

    def dequantize(self, dtype: DTypeLike) -> Float[Array, "*layers in out"]:
        """The matrix as an array."""
        # Broadcast and shifted, not stacked: XLA would branch on every element of a stack.
        at = self.codes.ndim + self.axis + 1
        halves = jnp.expand_dims(self.codes, at)
        shifts = jnp.arange(2, dtype=jnp.uint8) * 4
        shifts = shifts.reshape([2 if i == at else 1 for i in range(halves.ndim)])
        codes = ((halves >> shifts) & 15).reshape(self.shape)
        scales = self.block_scales.astype(jnp.float32) * (self.scales * np.float32(1 / 255))
        return _scale(_levels(codes), scales, self.axis).astype(dtype)

    def take_rows(self, ids: Int[Any, "..."]) -> Float[Array, "... out"]:
        """Rows of the matrix; see `take_rows`. Of a table, only these are dequantised."""
        if self.axis == -2:
            return super().take_rows(ids)
        rows = jax.tree.map(lambda leaf: jnp.take(leaf, ids, axis=0), self)
        return rows.dequantize(jnp.float32)


def _levels(codes):
    """NF4's level of each code.

    A table look-up takes half the time of selections on CPUs; TPUs have no fast one.
    """
    return jax.lax.platform_dependent(codes, tpu=_select_level, default=_look_up_level)


def _look_up_level(codes):
    return jnp.take(jnp.asarray(NF4_LEVELS), codes.astype(jnp.int32), mode="clip")


def _select_level(codes):
    values = [jnp.float32(level) for level in NF4_LEVELS]
    for bit in range(4):  # a tree of selections, one level of it per bit
        is_odd = (codes >> bit) & 1 != 0
        values = [
            jnp.where(is_odd, odd, even)
            for even, odd in zip(values[::2], values[1::2], strict=True)
        ]
    return values[0]
