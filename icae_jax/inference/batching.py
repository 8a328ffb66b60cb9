"""Batches of few shapes, so that few programs are compiled, and their memories joined again."""

from collections.abc import Sequence

import jax
import numpy as np

from icae_jax.compression import memory as memories
from icae_jax.compression.config import CompressionConfig
from icae_jax.compression.memory import Memory
from icae_jax.errors import UserError

SHAPE_STEP = 32  # lengths are padded to multiples of this


def round_up(n: int, step: int = SHAPE_STEP) -> int:
    """The smallest multiple of `step` that is not below n."""
    return -(-n // step) * step


def few_shapes(n: int, most: int) -> int:
    """The smallest power of two that is not below n, but at most `most`; n if it is above that."""
    return max(n, min(most, 1 << (n - 1).bit_length()))


def batch_starts(count: int, batch_size: int) -> range:
    """The first row of each batch; UserError if batch_size is not positive."""
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; it must be at least 1")
    return range(0, count, batch_size)


def concatenate(batches: Sequence[Memory], config: CompressionConfig) -> Memory:
    """The memory of all texts of several batches, padded to the most segments.

    What a batch held in its padding is set to zero, so that no trace of its shape is left.
    """
    memory = batches[0] if len(batches) == 1 else _concatenate(batches, config)
    axis = memory.TEXT_AXIS
    cleared = {}
    for name, x in memory.contents.items():
        mask = np.expand_dims(memory.mask, (*range(axis), *range(axis + 2, x.ndim)))
        cleared[name] = np.where(mask, x, 0)
    return memory.replace(**cleared)


def _concatenate(batches, config):
    kind, k = type(batches[0]), batches[0].tokens_per_segment
    segments = max(batch.segment_lengths.shape[1] for batch in batches)

    def joined(arrays, text_axis, size):
        """Joins along the axis of texts; the axis behind it is padded to `size`."""
        padded = [
            np.pad(x, [(0, size - n if i == text_axis + 1 else 0) for i, n in enumerate(x.shape)])
            for x in arrays
        ]
        return np.concatenate(padded, text_axis)

    lengths = joined([batch.segment_lengths for batch in batches], 0, segments)
    contents = {
        name: joined([batch.contents[name] for batch in batches], kind.TEXT_AXIS, segments * k)
        for name in kind.CONTENTS
    }
    return jax.device_get(memories.place(kind, contents, lengths, config))
