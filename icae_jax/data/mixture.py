"""Several sources in given proportions, still as a pure function of (seed, step)."""

import collections
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from icae_jax.data import drawing
from icae_jax.data.collate import Batch, collate
from icae_jax.data.examples import Examples


def interleave(position: int, shares: Sequence[int]) -> tuple[int, int]:
    """Maps a global position to (source index, position within that source), at the given shares.

    Any stretch of positions holds each source in proportion to its share, to within two positions.
    The result needs no history: the first source takes evenly spaced positions, the second evenly
    spaced ones of those that remain, and so on.

    shares: integers >= 0 that are not all zero.
    """
    before, after, left = position, position + 1, sum(shares)
    for source, share in enumerate(shares):
        taken_before, taken_after = before * share // left, after * share // left
        if taken_after > taken_before:
            return source, taken_before
        before, after, left = before - taken_before, after - taken_after, left - share
    raise ValueError(f"shares are {shares}; at least one must be positive")


class Mixture:
    """The examples of several sources, drawn by weight; a `data.examples.TrainingExamples`.

    A step draws one bucket for the whole batch: in pretraining by data.context_weights, in
    fine-tuning as often as the sources' contexts, in their proportions, have its length. Within the
    batch each source has the share that its weight and its contexts of that length give it.

    Args:
      parts: `{number of the source: (its examples, its weight > 0)}`, all of one `ExampleSpec`.
    """

    SCALE = 1 << 40  # shares are integers, so that rounding does not depend on the position

    def __init__(self, parts: dict[int, tuple[Examples, float]]):
        self._numbers = list(parts)
        self._parts = [examples for examples, _ in parts.values()]
        weights = np.asarray([weight for _, weight in parts.values()], float)
        bucket_weights = np.stack([examples.weights for examples in self._parts])
        joint = (weights / weights.sum())[:, None] * bucket_weights
        self.weights = joint.sum(0)
        self._shares = [[round(self.SCALE * w) for w in column] for column in joint.T.tolist()]
        self.key = ",".join(examples.key for examples in self._parts)
        self.earlier_key = ",".join(examples.earlier_key for examples in self._parts)
        counts = (collections.Counter(examples.dropped) for examples in self._parts)
        self.dropped = dict(sum(counts, collections.Counter()))
        # One shape for all, so that questions of several sources are packed together.
        shapes = [examples.qa_shape for examples in self._parts if examples.qa_shape]
        self.qa_shape = tuple(map(max, *shapes, (1, 1))) if shapes else None

    @property
    def shapes(self) -> list:
        """`shapes` of each source, and `qa_shape`."""
        return [*(part.shapes for part in self._parts), self.qa_shape]

    def draw(self, seed: int, step: int, batch_size: int) -> tuple[int, Int[np.ndarray, "B 2"]]:
        """The global batch of a step: (number of its bucket, (source, example) of each row)."""
        bucket = drawing.draw_bucket(seed, step, self.weights)
        rows = []
        for position in drawing.positions(step, batch_size):
            source, own_position = interleave(position, self._shares[bucket])
            count = len(self._parts[source].buckets[bucket].examples)
            number = self._numbers[source]
            rows.append((source, drawing.example_at(seed, bucket, own_position, count, number)))
        return bucket, np.asarray(rows)

    def collate(self, bucket: int, rows: Int[np.ndarray, "B 2"]) -> Batch:
        """`context [B, S, N]`, `lengths [B, S]` and `targets` of the given examples of a bucket."""
        examples = [self._parts[source].example(bucket, number) for source, number in rows.tolist()]
        spec = self._parts[0].spec
        return collate(examples, spec.data.context_lengths[bucket], spec, self.qa_shape)
