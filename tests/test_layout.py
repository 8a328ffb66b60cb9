"""Position layouts, against positions written out by hand."""

import jax
import numpy as np
import pytest

from icae_jax.compression import layout
from icae_jax.compression.config import CompressionConfig
from icae_jax.compression.layout import Layout
from icae_jax.compression.method import METHODS
from icae_jax.compression.segments import position_budget

LENGTHS = np.asarray([[4, 4], [3, 0]], np.int32)  # two texts of up to two segments
spread = jax.jit(layout.spread, static_argnums=0)
encoder_positions = jax.jit(Layout.encoder_positions, static_argnums=(0, 1, 2))
decoder_positions = jax.jit(Layout.decoder_positions, static_argnums=(0, 1, 3))
LAYOUTS = {name: layout for m in METHODS.values() for name, layout in m.layouts.items()}


def test_one_layout_has_two_names():
    """Breaks when "servable" and "clean" come apart: files of either name hold the same
    positions.
    """
    assert LAYOUTS["servable"] is LAYOUTS["clean"] is layout.SPREAD
    assert len(set(LAYOUTS.values())) == len(LAYOUTS) - 1


def test_spread():
    """Breaks when memory tokens do not stand at the centre of their share of the text, or leave
    it.
    """
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
    """Breaks when text starts elsewhere, or memory positions count padded tokens (texts of 4 and 2
    padded to 5).
    """
    assert encoder_positions(LAYOUTS[name], 5, 2, np.asarray([4, 2])).tolist() == want


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
    """Breaks when missing segments take positions, or uniform positions restart in every
    segment.
    """
    got, got_end = decoder_positions(LAYOUTS[name], 2, LENGTHS, 10)
    assert got.shape == (2, 4) and got_end.tolist() == end
    assert [got[0].tolist(), got[1, :2].tolist()] == positions


@pytest.mark.parametrize("name", LAYOUTS)
def test_target_starts(name):
    """Breaks when anything but uniform's AE starts elsewhere than behind the memory."""
    end = np.asarray([9, 4])
    starts = {o: LAYOUTS[name].target_starts(o, end).tolist() for o in ("ae", "lm", "qa")}
    assert starts == {"ae": [0, 0] if name == "uniform" else [9, 4], "lm": [9, 4], "qa": [9, 4]}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_missing_segment_takes_no_positions_wherever_it_is(name):
    """Breaks when a gap is left before a segment that follows a missing one."""
    where = LAYOUTS[name]
    got, end = map(np.asarray, decoder_positions(where, 2, np.asarray([[4, 0, 3]], np.int32), 10))
    want, want_end = map(
        np.asarray, decoder_positions(where, 2, np.asarray([[4, 3]] * 2, np.int32), 10)
    )
    assert got[0, [0, 1, 4, 5]].tolist() == want[0].tolist() and end[0] == want_end[0]


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("k", [1, 3])
def test_the_budget_bounds_the_positions_used(name, k):
    """Breaks when a text is let through whose positions the base does not have, or refused though
    it fits.
    """
    where, sizes, fixed = LAYOUTS[name], [5, 5, 4], 8
    method = next(m.name for m in METHODS.values() if name in m.layouts)
    config = CompressionConfig(method, k=k, rate=fixed / k, layout=name)
    budget = position_budget(config, 14, segments=3)
    reach = np.asarray([fixed] * 3 if where.fixed_length else sizes)
    N = fixed if where.fixed_length else 5
    last = int(np.asarray(encoder_positions(where, N, k, reach)).max())
    positions, end = map(np.asarray, decoder_positions(where, k, np.asarray([sizes]), fixed))
    assert last < budget.encoder <= last + 1 + (k if where.spread_encoder else 0)
    assert int(positions.max()) < budget.decoder and budget.start == int(end[0])
    assert where.spread_decoder or budget.decoder == int(positions.max()) + 1


def test_the_budget_counts_what_stands_around_the_memory():
    """Breaks when a head, a bucket's longer segments or the targets behind the memory take no
    positions.
    """
    config = CompressionConfig(k=4, rate=4, layout="sequential")
    assert position_budget(config, 20) == (10 + 4, 8, 8)  # two segments of 10 tokens
    budget = position_budget(config, 20, segment_tokens=16, head=3)
    assert budget == (16 + 4, 11, 11)
    assert (budget.needed(), budget.needed(9), budget.needed(30)) == (20, 20, 41)
