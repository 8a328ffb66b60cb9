"""Batches of few shapes, so that few programs are compiled, and their memories joined again."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from icae_jax.compression import memory as memories
from icae_jax.compression.config import CompressionConfig
from icae_jax.compression.memory import Memory
from icae_jax.errors import UserError

SHAPE_STEP = 32  # lengths are padded to multiples of this
LENGTHS = 16  # to which segments are padded where many documents are written


def round_up(n: int, step: int = SHAPE_STEP) -> int:
    """The smallest multiple of `step` that is not below n."""
    return -(-n // step) * step


def few_shapes(n: int, most: int) -> int:
    """The smallest power of two that is not below n, but at most `most`; n if it is above that."""
    return max(n, min(most, 1 << (n - 1).bit_length()))


class SegmentBatch(NamedTuple):
    """Segments that are encoded at once.

    segments: their numbers. rows: of the program, at least as many. tokens: of a row, at least as
    many as each segment has.
    """

    segments: list[int]
    rows: int
    tokens: int


def segment_batches(
    lengths: Sequence[int],
    config: CompressionConfig,
    batch_size: int,
    rounded: Callable[[int], int] = int,
) -> list[SegmentBatch]:
    """Batches of segments of like lengths, so that little is padding and few programs are compiled.

    A batch has about the tokens of `batch_size` whole segments. Rows are padded to one of about 16
    lengths. What the last batch lacks is not filled up: it is cut into batches of a half, a quarter
    and an eighth, and only what these leave is padded with rows.

    Args:
      lengths: tokens of each segment.
      config: how long a segment may be, and whether all are padded to that.
      batch_size: whole segments of a batch.
      rounded: a number of rows, rounded up to one that the devices can split.
    """
    batch_starts(0, batch_size)  # checks it
    longest = config.segment_tokens
    step = round_up(-(-longest // LENGTHS), 8)
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches, start = [], 0
    while start < len(order):
        tokens = min(round_up(lengths[order[start]], step), longest)
        if config.position_layout.fixed_length:
            tokens = longest
        most = rounded(1 << (max(1, batch_size * longest // tokens).bit_length() - 1))
        least = rounded(-(-most // 8))
        rows, left = most, len(order) - start
        while rows > left and rows > least:
            rows = max(least, rounded(-(-rows // 2)))
        batches.append(SegmentBatch(order[start : start + rows], rows, tokens))
        start += rows
    return batches


def batch_starts(count: int, batch_size: int) -> range:
    """The first row of each batch; UserError if batch_size is not positive."""
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; it must be at least 1")
    return range(0, count, batch_size)


def concatenate(batches: Sequence[Memory], config: CompressionConfig, segments: int = 0) -> Memory:
    """The memory of all texts of several batches, padded to the most segments.

    What a batch held in its padding is set to zero, so that no trace of its shape is left.

    segments: to which memories are padded at least.
    """
    if len(batches) == 1 and batches[0].segment_lengths.shape[1] >= segments:
        memory = batches[0]
    else:
        memory = _concatenate(batches, config, segments)
    axis = memory.TEXT_AXIS
    cleared = {}
    for name, x in memory.contents.items():
        mask = np.expand_dims(memory.mask, (*range(axis), *range(axis + 2, x.ndim)))
        cleared[name] = np.where(mask, x, 0)
    return memory.replace(**cleared)


def _concatenate(batches, config, segments):
    kind, k = type(batches[0]), batches[0].tokens_per_segment
    segments = max(segments, *(batch.segment_lengths.shape[1] for batch in batches))

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
