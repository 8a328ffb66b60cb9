"""Batches made ahead of use."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import grain
import numpy as np

from icae_jax.data import drawing
from icae_jax.data.collate import Batch
from icae_jax.data.examples import TrainingExamples

T = TypeVar("T")
AHEAD = 4  # batches


def train_batches(
    examples: TrainingExamples,
    seed: int,
    batch_size: int,
    steps: range,
    k_choices: Sequence[int],
    rows: slice | np.ndarray = slice(None),
) -> Iterator[Batch]:
    """Iterates over the batches of steps, each with the `k` of its step.

    Args:
      examples: what is drawn from.
      seed: the run's seed.
      batch_size: rows of the global batch.
      steps: the steps to make batches for.
      k_choices: memory tokens per segment to draw from; all processes draw the same.
      rows: the rows of the global batch to make, such as those of one process.
    """

    def make(step):
        bucket, drawn = examples.draw(seed, step, batch_size)
        return examples.collate(bucket, drawn[rows]) | {"k": drawing.draw_k(seed, step, k_choices)}

    return prefetch(make, steps)


def prefetch(make: Callable[[int], T], steps: range) -> Iterator[T]:
    """Iterates over `make(step)` of consecutive steps, made ahead of use in another thread."""
    dataset = grain.MapDataset.range(steps.start, steps.stop).map(lambda step: make(int(step)))
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=AHEAD)
    return iter(dataset.to_iter_dataset(options))
