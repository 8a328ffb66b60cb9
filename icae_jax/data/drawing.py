"""Random choices as pure functions of (seed, step): buckets, the order of examples, k."""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float, Int


@jax.tree_util.register_static
class StaticInt(int):
    """An int of a batch that is static under jit, which compiles once for each of its values."""


@jax.tree_util.register_static
class StaticInts(tuple):
    """As `StaticInt`, several ints."""


def draw_bucket(seed: int, step: int, weights: Float[np.ndarray, " buckets"]) -> int:
    """The bucket of a step's global batch, drawn with the given probabilities."""
    return int(np.random.default_rng([seed, 0, step]).choice(len(weights), p=weights))


def draw_k(seed: int, step: int, choices: Sequence[int]) -> StaticInt:
    """Memory tokens per segment in a step's batch, drawn uniformly from `choices`."""
    return StaticInt(np.random.default_rng([seed, 3, step]).choice(choices))


def positions(step: int, batch_size: int) -> range:
    """The positions that a step's global batch takes in the endless sequence of examples."""
    return range(step * batch_size, (step + 1) * batch_size)


def example_at(seed: int, bucket: int, position: int, count: int, *source: int) -> int:
    """The example at a position of the endless sequence of epochs over a bucket.

    Each epoch visits the bucket's `count` examples once, in an order of its own. In a mixture
    `source` is the number of the source, so that sources of one size differ in their order.
    """
    epoch, index = divmod(position, count)
    return int(_permutation(seed, bucket, epoch, count, *source)[index])


@functools.lru_cache(maxsize=32)
def _permutation(seed, bucket, epoch, count, *source) -> Int[np.ndarray, " count"]:
    return np.random.default_rng([seed, 1, bucket, epoch, *source]).permutation(count)
