"""Frozen matrices: every matmul with a weight of the base goes through the functions of this file.

A frozen matrix is an array, or a `QuantizedMatrix` in its place: a small pytree that knows how to
multiply. So a quantised base is the same tree of parameters with other leaves, and no module knows
of it.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int


class QuantizedMatrix:
    """A frozen matrix `[in, out]` in another representation than an array.

    Subclasses are pytrees (`models.pytree`) whose leaves all have the matrix's rank, with a layer
    axis in front where layers are stacked. A leaf's axis that does not match the matrix's has
    length 1 (such as `[1, out]` scales), so that slicing by layer and sharding by logical axis work
    leaf by leaf. `dequantize` is all that a subclass must define; it may override the others to
    multiply without forming the matrix.
    """

    def dequantize(self, dtype: DTypeLike) -> Float[Array, "in out"]:
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
        return w.matmul(x, dtype)
    return jnp.einsum("...i,io->...o", x, w.astype(x.dtype), preferred_element_type=dtype)


def linear_transposed(
    x: Float[Any, "... out"], w: "FrozenMatrix", dtype: DTypeLike | None = None
) -> Float[Array, "... in"]:
    """`x @ w.T` for a frozen matrix `w [in, out]`. dtype: of the result, x's by default."""
    if isinstance(w, QuantizedMatrix):
        return w.matmul_transposed(x, dtype)
    return jnp.einsum("...o,io->...i", x, w.astype(x.dtype), preferred_element_type=dtype)


def take_rows(w: "FrozenMatrix", ids: Int[Any, "..."]) -> Float[Array, "... out"]:
    """Rows of a frozen matrix `w [in, out]`, such as the embeddings of token ids."""
    if isinstance(w, QuantizedMatrix):
        return w.take_rows(ids)
    return jnp.take(w, ids, axis=0)


def as_array(w: "FrozenMatrix", dtype: DTypeLike) -> Float[Array, "in out"]:
    """A frozen matrix as an array."""
    return w.dequantize(dtype) if isinstance(w, QuantizedMatrix) else jnp.asarray(w, dtype)
