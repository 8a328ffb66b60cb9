"""Schemes of a quantised base: which of its matrices become which `QuantizedMatrix`, and how.

Values are rounded on the host, in NumPy, so that every machine makes the same codes.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float

from icae_jax.errors import UserError
from icae_jax.models.axes import PROJECTION_AXES
from icae_jax.models.quantize import NF4_BLOCK, NF4_LEVELS, Int8Matrix, NF4Matrix, in_blocks


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
    blocks = np.abs(in_blocks(w, w.shape[axis] // NF4_BLOCK, axis)).max(axis)
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
