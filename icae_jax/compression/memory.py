"""What a context is compressed into, and what the decoder reads of it."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct


@struct.dataclass
class Slots:
    """ICAE's memory: the encoder's last hidden states at the memory tokens (arXiv 2307.06945, section 2.2.1).

    slots: `[B, M, D]`, M = segments x k. mask: `[B, M]`, false at segments that a shorter text lacks.
    positions: `[B, M]`, in the decoder, counted from the memory's start. end: `[B]`, the position after the memory.
    segment_lengths: `[B, S]`, tokens of the context that each segment stands for.
    """

    slots: jnp.ndarray
    mask: jnp.ndarray
    positions: jnp.ndarray
    end: jnp.ndarray
    segment_lengths: jnp.ndarray

    def __len__(self):
        return self.slots.shape[0]

    def __getitem__(self, rows):
        """The memories of some texts: a number, a slice or a list of row numbers."""
        rows = [rows] if isinstance(rows, int | np.integer) else rows
        return jax.tree.map(lambda x: x[rows] if isinstance(rows, slice) else x[np.asarray(rows)], self)

    @property
    def lengths(self):
        """Context tokens of each text, `[B]`."""
        return np.asarray(self.segment_lengths).sum(1)

    @property
    def tokens(self):
        """Memory tokens of each text, `[B]`."""
        return np.asarray(self.mask).sum(1)

    @property
    def bytes(self):
        """Bytes of each text's memory, `[B]`, in the dtype it is held in."""
        return self.tokens * self.slots.shape[-1] * self.slots.dtype.itemsize

    @property
    def ratio(self):
        """Context tokens per memory token, `[B]`."""
        return self.lengths / self.tokens


@struct.dataclass
class Prefix:
    """Head and memory as the decoder's targets see them: per-layer K/V.

    k, v: `[L, B, P, K, H]`, k rotated to its positions. mask: `[B, P]`. end: `[B]`, the position after the memory.
    """

    k: jnp.ndarray
    v: jnp.ndarray
    mask: jnp.ndarray
    end: jnp.ndarray
