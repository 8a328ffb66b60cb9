"""Memories of several texts: choosing rows, and what they cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from icae_jax.compression.config import CompressionConfig
from icae_jax.compression.memory import KV, Slots, join

MASK = np.asarray([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]], bool)
SLOTS = Slots(
    slots=np.arange(3 * 4 * 5, dtype=np.float32).reshape(3, 4, 5),
    mask=MASK,
    positions=np.asarray([[0, 1, 2, 3]] * 3),
    end=np.asarray([4, 2, 4]),
    segment_lengths=np.asarray([[7, 6], [5, 0], [8, 8]]),
)
PLACED = {name: x for name, x in vars(SLOTS).items() if name != "slots"}
NUMBERS = np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 1, 5)
KVS = KV(k=NUMBERS, v=-NUMBERS, **PLACED)
choose = jax.jit(lambda memory, rows: memory[rows])


@pytest.mark.parametrize("memory", [SLOTS, KVS], ids=["slots", "kv"])
@pytest.mark.parametrize(
    ("rows", "want"),
    [
        (1, [1]),
        (-1, [2]),
        (slice(1, None), [1, 2]),
        ([2, 0], [2, 0]),
        (np.asarray([0]), [0]),
        (jnp.asarray([1, 1]), [1, 1]),
    ],
)
def test_choosing_rows(memory, rows, want):
    """Breaks when a single row loses its batch axis, a field is left behind, or K/V are cut along
    their layers.
    """
    chosen = memory[rows]
    assert len(chosen) == len(want) and type(chosen) is type(memory)
    for name, every in vars(memory).items():
        axis = memory.TEXT_AXIS if name in memory.CONTENTS else 0
        np.testing.assert_array_equal(getattr(chosen, name), np.take(np.asarray(every), want, axis))
    compiled = choose(memory, np.asarray(want))
    for got, every in zip(jax.tree.leaves(compiled), jax.tree.leaves(chosen), strict=True):
        np.testing.assert_array_equal(got, every)


def test_sizes():
    """Breaks when masked tokens are counted, bytes ignore the dtype, or K/V count one layer or K
    alone.
    """
    for memory, size in ((SLOTS, 20), (KVS, 80)):
        assert memory.lengths.tolist() == [13, 5, 16] and memory.tokens.tolist() == [4, 2, 4]
        assert memory.ratio.tolist() == [3.25, 2.5, 4.0] and memory.tokens_per_segment == 2
        assert memory.bytes_per_token == size and memory.bytes.tolist() == [
            4 * size,
            2 * size,
            4 * size,
        ]
        half = memory.replace(
            **{name: x.astype(jnp.bfloat16) for name, x in memory.contents.items()}
        )
        assert half.bytes.tolist() == [2 * size, size, 2 * size]


def test_what_cannot_be_joined():
    """Breaks when memories that no decoder could read together are put behind each other."""
    config = CompressionConfig(k=2, rate=4)
    for memories, message in (
        ([], "no memories to join"),
        ([SLOTS, KVS], "memories of Slots, KV kind cannot be joined"),
    ):
        with pytest.raises(ValueError, match=message):
            join(memories, config)
