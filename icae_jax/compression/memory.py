"""What a context is compressed into, and what the decoder reads of it."""

import jax.numpy as jnp
import numpy as np
from flax import struct


@struct.dataclass
class Slots:
    """ICAE's memory: the encoder's last hidden states at the memory tokens (arXiv 2307.06945, section 2.2.1).

    slots: `[B, M, D]`, M = segments x k. mask: `[B, M]`, false at segments that a shorter text lacks.
    positions: `[B, M]`, in the decoder, counted from the memory's start. end: `[B]`, the position after the memory.
    lengths: `[B]`, tokens of the context that each row stands for.
    """

    slots: jnp.ndarray
    mask: jnp.ndarray
    positions: jnp.ndarray
    end: jnp.ndarray
    lengths: jnp.ndarray

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
        return np.asarray(self.lengths) / self.tokens


@struct.dataclass
class Prefix:
    """Head and memory as the decoder's targets see them: per-layer K/V.

    k, v: `[L, B, P, K, H]`, k rotated to its positions. mask: `[B, P]`. end: `[B]`, the position after the memory.
    """

    k: jnp.ndarray
    v: jnp.ndarray
    mask: jnp.ndarray
    end: jnp.ndarray
