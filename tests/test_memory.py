"""Memories of several texts: choosing rows, and what they cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from icae_jax.compression.memory import Slots

MASK = np.asarray([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]], bool)
SLOTS = Slots(
    slots=jnp.arange(3 * 4 * 5, dtype=jnp.float32).reshape(3, 4, 5),
    mask=jnp.asarray(MASK),
    positions=jnp.asarray([[0, 1, 2, 3]] * 3),
    end=jnp.asarray([4, 2, 4]),
    segment_lengths=jnp.asarray([[7, 6], [5, 0], [8, 8]]),
)


@pytest.mark.parametrize(
    ("rows", "want"), [(1, [1]), (-1, [2]), (slice(1, None), [1, 2]), ([2, 0], [2, 0]), (np.asarray([0]), [0])]
)
def test_choosing_rows(rows, want):
    """Breaks when a single row loses its batch axis, or a field is left behind."""
    chosen = SLOTS[rows]
    assert len(chosen) == len(want) and len(jax.tree.leaves(chosen)) == 5
    for got, every in zip(jax.tree.leaves(chosen), jax.tree.leaves(SLOTS), strict=True):
        np.testing.assert_array_equal(got, np.asarray(every)[want])


def test_sizes():
    """Breaks when masked slots are counted, or bytes ignore the dtype."""
    assert SLOTS.lengths.tolist() == [13, 5, 16] and SLOTS.tokens.tolist() == [4, 2, 4]
    assert SLOTS.ratio.tolist() == [3.25, 2.5, 4.0]
    assert SLOTS.bytes.tolist() == [80, 40, 80]
    assert SLOTS.replace(slots=SLOTS.slots.astype(jnp.bfloat16)).bytes.tolist() == [40, 20, 40]
