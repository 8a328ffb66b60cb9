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
    all_k: bool = False,
) -> Iterator[Batch]:
    """Iterates over the batches of consecutive steps, each with a `k` drawn from `k_choices`.

    rows: the rows of the global batch to make, such as those of one process. All processes draw the
    same bucket and k. all_k: every batch has all of `k_choices` instead.
    """

    def make(step):
        bucket, drawn = examples.draw(seed, step, batch_size)
        k = drawing.StaticInts(k_choices) if all_k else drawing.draw_k(seed, step, k_choices)
        return examples.collate(bucket, drawn[rows]) | {"k": k}

    return prefetch(make, steps)


def prefetch(make: Callable[[int], T], steps: range) -> Iterator[T]:
    """Iterates over `make(step)` of consecutive steps, made ahead of use in another thread."""
    dataset = grain.MapDataset.range(steps.start, steps.stop).map(lambda step: make(int(step)))
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=AHEAD)
    return iter(dataset.to_iter_dataset(options))
