"""Frozen matrices: every matmul with a weight of the base goes through the functions of this file.

A frozen matrix is an array, or a `QuantizedMatrix` in its place: a small pytree that knows how to
multiply. So a quantised base is the same tree of parameters with other leaves, and no module knows
of it.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from icae_jax.errors import UserError
from icae_jax.models.axes import PROJECTION_AXES
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


def _in_blocks(values, count, axis):
    """Splits an axis into `count` blocks: `[…, n, out]` into `[…, count, n / count, out]`."""
    shape = list(values.shape)
    at = len(shape) + axis
    shape[at : at + 1] = [count, shape[at] // count]
    return values.reshape(shape)


def _scale(values, scales, axis):
    """Values times the scale of their block; blocks lie along `axis`."""
    blocks = _in_blocks(values, scales.shape[axis], axis)
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


# ---------------------------------------------------------------------------------------- schemes


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How a base is quantised.

    Attributes:
        kind: "" (not at all), "int8" or "nf4".
        ends: whether the embedding table and the head are too, beside the projections of layers.
    """

    kind: str = ""
    ends: bool = False

    def __str__(self):
        return self.kind + "+ends" * self.ends

    def block_axis(self, path: tuple[str, ...]) -> int | None:
        """The axis along which values share a scale; None if a parameter is not quantised.

        path: such as ("layers", "mlp", "up_proj", "kernel").
        """
        if path == ("embed",):  # a row is a token's, and an output of a tied head
            return -1 if self.kind and self.ends else None
        if path == ("lm_head",):
            return -2 if self.kind and self.ends else None
        is_kernel = path[-1] == "kernel" and path[-2] in PROJECTION_AXES
        return -2 if self.kind and is_kernel else None


SCHEMES = ("int8", "nf4", "int8+ends", "nf4+ends")


def parse_scheme(text: str, what: str = "quantize") -> Scheme:
    """The `Scheme` of its text: "" or one of `SCHEMES`. UserError naming `what` otherwise."""
    if text and text not in SCHEMES:
        raise UserError(f"{what} is {text!r}; choose from {', '.join(SCHEMES)}, or '' for none")
    kind, _, ends = text.partition("+")
    return Scheme(kind, bool(ends))


LEAVES = ("codes", "block_scales", "scales")  # the names of the leaves of quantised matrices


def make_matrix(kind: str, axis: int, leaves: dict[str, Any]) -> Int8Matrix | NF4Matrix:
    """A matrix of its leaves by name. kind: "int8" or "nf4". axis: of the blocks."""
    return Int8Matrix(**leaves) if kind == "int8" else NF4Matrix(**leaves, axis=axis)


def matrix_shapes(
    shape: tuple[int, ...], kind: str, axis: int, block: int = 0
) -> Int8Matrix | NF4Matrix:
    """The matrix of `jax.ShapeDtypeStruct` of a quantised parameter.

    Args:
        shape: of the parameter, layers included.
        kind: "int8" or "nf4".
        axis: along which values share a scale.
        block: of int8, how many values do; 0 for all.
    """

    def divided(by, dtype):
        return jax.ShapeDtypeStruct(
            tuple(n // by if i == len(shape) + axis else n for i, n in enumerate(shape)), dtype
        )

    whole = shape[axis]
    if kind == "int8":
        blocks = {"codes": (1, jnp.int8), "scales": (block or whole, jnp.float32)}
    else:
        blocks = {
            "codes": (2, jnp.uint8),
            "block_scales": (NF4_BLOCK, jnp.uint8),
            "scales": (whole, jnp.float32),
        }
    return make_matrix(kind, axis, {name: divided(*how) for name, how in blocks.items()})


def quantized_shapes(
    shapes: Any, scheme: str, dtype: DTypeLike, blocks: dict[tuple[str, ...], int] | None = None
) -> Any:
    """The tree of `jax.ShapeDtypeStruct` of a quantised base.

    Args:
        shapes: the base's parameters, `llama.param_shapes`.
        scheme: see `parse_scheme`.
        dtype: of what is not quantised.
        blocks: by path, the block length of int8 parameters that do not have one scale per output.

    Raises:
        UserError: nf4's blocks do not divide a parameter.
    """
    parsed, blocks = parse_scheme(scheme), blocks or {}

    def of_leaf(keys, leaf):
        path = tuple(key.key for key in keys)
        axis = parsed.block_axis(path)
        if axis is None:
            return jax.ShapeDtypeStruct(leaf.shape, dtype)
        if parsed.kind == "nf4" and leaf.shape[axis] % NF4_BLOCK:
            raise UserError(
                f"nf4 has blocks of {NF4_BLOCK}, which do not divide the width "
                f"{leaf.shape[axis]} of {'.'.join(path)}; use int8{'+ends' * parsed.ends}"
            )
        return matrix_shapes(leaf.shape, parsed.kind, axis, blocks.get(path, 0))

    return jax.tree_util.tree_map_with_path(of_leaf, shapes)


# ---------------------------------------------------------------------------- quantising, on hosts


def host_scales(
    w: Float[np.ndarray, "*layers in out"], kind: str, axis: int
) -> dict[str, np.ndarray]:
    """All leaves but the codes of a quantised matrix; magnitudes are taken along `axis`."""
    if kind == "int8":
        return {"scales": np.abs(w).max(axis, keepdims=True) / np.float32(127)}
    blocks = np.abs(_in_blocks(w, w.shape[axis] // NF4_BLOCK, axis)).max(axis)
    scales = blocks.max(axis, keepdims=True)
    parts = blocks / np.where(scales > 0, scales, np.float32(1))
    return {"block_scales": np.rint(parts * np.float32(255)).astype(np.uint8), "scales": scales}


def host_codes(
    w: Float[np.ndarray, "*layers in out"],
    scales: dict[str, np.ndarray],
    kind: str,
    axis: int,
    start: int = 0,
) -> np.ndarray:
    """The codes of (a part of) a matrix: the nearest representable values.

    Args:
        w: the matrix, or the part from `start` along `axis`.
        scales: from `host_scales`, of the whole length of `axis`.
        kind: "int8" or "nf4".
        axis: of the blocks.
        start: an even number.
    """
    scale = scales["scales"]
    if kind == "nf4":
        scale = scales["block_scales"] * (scale * np.float32(1 / 255))
        scale = np.take(scale, np.arange(start, start + w.shape[axis]) // NF4_BLOCK, axis)
    unit = w / np.where(scale > 0, scale, np.float32(1))
    if kind == "int8":
        return np.clip(np.rint(unit), -127, 127).astype(np.int8)
    codes = np.zeros(unit.shape, np.uint8)
    for middle in (NF4_LEVELS[1:] + NF4_LEVELS[:-1]) / 2:
        codes += unit > middle
    even, odd = (codes[(..., slice(i, None, 2)) + (slice(None),) * (-1 - axis)] for i in (0, 1))
    return even | odd << 4


def quantize_matrix(w: Any, kind: str, axis: int = -2) -> Int8Matrix | NF4Matrix:
    """A matrix, or a stack of them, quantised on the host; its leaves are numpy arrays."""
    w = np.asarray(w, np.float32)
    scales = host_scales(w, kind, axis)
    return make_matrix(kind, axis, {"codes": host_codes(w, scales, kind, axis), **scales})


def quantize_params(params: Any, scheme: str) -> Any:
    """A base's parameters, quantised in memory.

    Args:
        params: arrays; what is not quantised stays as it is.
        scheme: see `parse_scheme`.

    Raises:
        UserError: nf4's blocks do not divide a parameter.
    """
    parsed = parse_scheme(scheme)
    quantized_shapes(params, scheme, jnp.float32)  # checks the widths

    def of_leaf(keys, w):
        axis = parsed.block_axis(tuple(key.key for key in keys))
        if axis is None:
            return w
        return jax.tree.map(jnp.asarray, quantize_matrix(w, parsed.kind, axis))

    return jax.tree_util.tree_map_with_path(of_leaf, params)
