"""Several sources in given proportions, still as a pure function of (seed, step)."""

import collections

import numpy as np

from icae_jax.data import batches


def interleave(position, shares):
    """(which of `shares`, how many earlier positions were its) for a position of an endless row that holds each by its share.

    shares: whole numbers >= 0, not all zero. Any stretch of the row holds each in proportion, but for less than two. Nothing is
    remembered: the first share takes positions at equal distances, the second those of what is left, and so on.
    """
    before, after, left = position, position + 1, sum(shares)
    for number, share in enumerate(shares):
        taken_before, taken_after = before * share // left, after * share // left
        if taken_after > taken_before:
            return number, taken_before
        before, after, left = before - taken_before, after - taken_after, left - share
    raise ValueError(f"shares are {shares}; at least one must be positive")


class Mixture:
    """The examples of several sources, each of which makes up its share of what is drawn; stands in for `batches.Examples`.

    parts: `{number of the source: (Examples, weight > 0)}`. A step draws one bucket for the whole batch: in pretraining by
    data.context_weights; in fine-tuning as often as the sources' contexts, in their proportions, have its length. Within the batch every
    source then has the share that its weight and its number of contexts of that length give it.
    """

    SCALE = 1 << 40  # shares as whole numbers, so that no rounding depends on how far training is

    def __init__(self, parts):
        self.numbers = list(parts)
        self.parts = [examples for examples, _ in parts.values()]
        weights = np.asarray([weight for _, weight in parts.values()], float)
        joint = (weights / weights.sum())[:, None] * np.stack(
            [examples.weights for examples in self.parts]
        )
        self.weights = joint.sum(0)
        self.shares = [
            [round(self.SCALE * share) for share in of_bucket.tolist()] for of_bucket in joint.T
        ]
        self.key, self.earlier_key = (
            ",".join(keys)
            for keys in zip(*((e.key, e.earlier_key) for e in self.parts), strict=True)
        )
        self.dropped = dict(
            sum(
                (collections.Counter(examples.dropped) for examples in self.parts),
                collections.Counter(),
            )
        )
        shapes = [examples.qa_shape for examples in self.parts if examples.qa_shape]
        self.qa_shape = (
            tuple(map(max, *shapes, (1, 1))) if shapes else None
        )  # one for all, so that they can be packed together

    @property
    def shapes(self):
        """Those of every part, see `Examples.shapes`, and that of questions."""
        return [*(part.shapes for part in self.parts), self.qa_shape]

    def draw(self, seed, step, batch_size):
        """The global batch of a step: (bucket number, (source, example) numbers `[batch_size, 2]`), see `Examples.draw`."""
        bucket = int(
            np.random.default_rng([seed, 0, step]).choice(len(self.weights), p=self.weights)
        )
        rows = []
        for at in range(step * batch_size, (step + 1) * batch_size):
            source, position = interleave(at, self.shares[bucket])
            count = len(self.parts[source].buckets[bucket].examples)
            rows.append(
                (source, batches.in_order(seed, bucket, position, count, self.numbers[source]))
            )
        return bucket, np.asarray(rows)

    def collate(self, bucket, rows):
        """Arrays of the given examples of one bucket, see `Examples.collate`."""
        return self.parts[0].pack(
            bucket, [self.parts[source].targets(bucket, row) for source, row in rows], self.qa_shape
        )
