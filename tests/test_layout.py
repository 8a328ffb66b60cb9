"""Position layouts, against positions written out by hand."""

import jax
import numpy as np
import pytest

from icae_jax.compression import layout
from icae_jax.compression.memory import Prefix

LENGTHS = np.asarray([[4, 4], [3, 0]], np.int32)  # two texts of up to two segments
spread = jax.jit(layout.spread, static_argnums=0)
encoder_positions = jax.jit(layout.encoder_positions, static_argnums=(0, 1, 2))
decoder_positions = jax.jit(layout.decoder_positions, static_argnums=(0, 1, 3))


def test_unknown_layout_is_named():
    """Breaks when a misspelt layout falls back to another one."""
    with pytest.raises(
        ValueError,
        match="layout is 'uniformly'; choose from sequential, uniform, servable, clean, reference, padded",
    ):
        layout.get("uniformly")


def test_spread():
    """Breaks when memory tokens do not stand at the centre of their share of the text, or leave it."""
    assert spread(2, np.asarray([8, 4, 1])).tolist() == [[3, 7], [2, 4], [1, 1]]
    assert spread(4, np.asarray(16)).tolist() == [3, 7, 11, 15]
    lengths = np.arange(1, 40)
    at = np.asarray(spread(5, lengths))
    assert at.min() >= 1 and (at.max(1) <= lengths).all() and (np.diff(at) >= 0).all()


@pytest.mark.parametrize(
    ("name", "want"),
    [
        (
            "sequential",
            [[0, 1, 2, 3, 4, 4, 5], [0, 1, 2, 3, 4, 2, 3]],
        ),  # memory follows the text, not the padding
        ("uniform", [[1, 2, 3, 4, 5, 2, 4], [1, 2, 3, 4, 5, 1, 2]]),
        ("servable", [[1, 2, 3, 4, 5, 2, 4], [1, 2, 3, 4, 5, 1, 2]]),
        ("clean", [[1, 2, 3, 4, 5, 2, 4], [1, 2, 3, 4, 5, 1, 2]]),
        (
            "reference",
            [[0, 1, 2, 3, 4, 4, 5], [0, 1, 2, 3, 4, 2, 3]],
        ),  # its callers give the padded length
        ("padded", [[0, 1, 2, 3, 4, 4, 5], [0, 1, 2, 3, 4, 2, 3]]),
    ],
)
def test_encoder_positions(name, want):
    """Breaks when text starts elsewhere, or memory positions count padded tokens (texts of 4 and 2 padded to 5)."""
    assert encoder_positions(layout.get(name), 5, 2, np.asarray([4, 2])).tolist() == want


@pytest.mark.parametrize(
    ("name", "positions", "end"),
    [
        ("sequential", [[0, 1, 2, 3], [0, 1]], [4, 2]),
        ("servable", [[0, 1, 2, 3], [0, 1]], [4, 2]),
        ("clean", [[0, 1, 2, 3], [0, 1]], [4, 2]),
        (
            "reference",
            [[10, 11, 12, 13], [10, 11]],
            [4, 2],
        ),  # behind the fixed length, in the future of every target
        ("padded", [[0, 1, 2, 3], [0, 1]], [4, 2]),
        (
            "uniform",
            [[2, 4, 6, 8], [1, 3]],
            [9, 4],
        ),  # text ids 1 … 8 and 1 … 3, running over the segments
    ],
)
def test_decoder_positions(name, positions, end):
    """Breaks when missing segments take positions, or uniform positions restart in every segment."""
    got, got_end = decoder_positions(layout.get(name), 2, LENGTHS, 10)
    assert got.shape == (2, 4) and got_end.tolist() == end
    assert [got[0].tolist(), got[1, :2].tolist()] == positions


@pytest.mark.parametrize("name", layout.LAYOUTS)
def test_target_starts(name):
    """Breaks when anything but uniform's AE starts elsewhere than behind the memory."""
    prefix = Prefix(None, None, None, None, np.asarray([9, 4]))
    starts = {
        o: layout.target_starts(layout.get(name), o, prefix).tolist() for o in ("ae", "lm", "qa")
    }
    assert starts == {"ae": [0, 0] if name == "uniform" else [9, 4], "lm": [9, 4], "qa": [9, 4]}


@pytest.mark.parametrize("name", layout.LAYOUTS)
def test_a_missing_segment_takes_no_positions_wherever_it_is(name):
    """Breaks when a gap is left before a segment that follows a missing one."""
    where = layout.get(name)
    got, end = map(np.asarray, decoder_positions(where, 2, np.asarray([[4, 0, 3]], np.int32), 10))
    want, want_end = map(
        np.asarray, decoder_positions(where, 2, np.asarray([[4, 3]] * 2, np.int32), 10)
    )
    assert got[0, [0, 1, 4, 5]].tolist() == want[0].tolist() and end[0] == want_end[0]


@pytest.mark.parametrize("name", layout.LAYOUTS)
@pytest.mark.parametrize("k", [1, 3])
def test_positions_needed_bound_the_positions_used(name, k):
    """Breaks when a text is let through whose positions the base does not have, or refused though it fits."""
    where, sizes, fixed = layout.get(name), [5, 5, 4], 8
    lengths = np.asarray([sizes])
    encoder, memory, start = layout.positions_needed(where, 14, 3, 5, k, fixed)
    reach = np.asarray([fixed] * 3 if where.fixed_length else sizes)
    N = fixed if where.fixed_length else 5
    used = np.asarray(encoder_positions(where, N, k, reach))
    positions, end = map(np.asarray, decoder_positions(where, k, lengths, fixed))
    assert int(used.max()) < encoder <= int(used.max()) + 1 + (k if where.spread_encoder else 0)
    assert int(positions.max()) < memory and start == int(end[0])
    assert where.spread_decoder or memory == int(positions.max()) + 1
