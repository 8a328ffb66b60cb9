"""Greedy decoding: the cached loop against running the whole sequence anew for every token."""

import dataclasses
import functools

import decoding_helper
import greedy_loop
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, head_kernel

from icae_jax.compression.decoder import Decoder, Prefix
from icae_jax.evaluation.plain import no_prefix
from icae_jax.models import llama, rope
from icae_jax.models.llama import FrozenModel

NEW = 6
MODEL = llama.Llama(TINY)
WINDOWED = llama.Llama(dataclasses.replace(TINY, windows=(6, 0)))
TABLE = np.zeros((4, TINY.hidden_size), np.float32)


LONGEST = 24


@functools.partial(jax.jit, static_argnums=2)
def full_pass(params, ids, model):
    """The best next token behind every position of one padded sequence (the causal mask hides the
    padding).
    """
    hidden, _ = model.apply(
        {"params": params}, ids[None], jnp.arange(LONGEST)[None], llama.causal_mask(LONGEST)
    )
    return jnp.argmax(hidden[0] @ head_kernel(params), -1)


def slow_greedy(params, ids, model=MODEL):
    """New tokens one by one, each from a full pass without a cache."""
    ids = list(ids)
    for _ in range(NEW):
        row = np.zeros(LONGEST, np.int32)
        row[: len(ids)] = ids
        ids.append(int(full_pass(params, row, model)[len(ids) - 1]))
    return ids[-NEW:]


def prompts(seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(8, 64, n).tolist() for n in (3, 7, 5)]


def padded(rows, width=8):
    ids, lengths = (
        np.zeros((len(rows), width), np.int32),
        np.asarray([len(r) for r in rows], np.int32),
    )
    for row, to in zip(rows, ids, strict=True):
        to[: len(row)] = row
    return ids, lengths


def run(params, prefix, starts, rows, model=MODEL, limits=None, **kw):
    kw = {"max_new_tokens": NEW, "stop_ids": (63,)} | kw
    decoder = Decoder(FrozenModel(model, params), TABLE)
    return decoding_helper.greedy(
        decoder, prefix, greedy_loop.Prompts(*padded(rows), starts, limits), **kw
    )


def test_cached_batched_decoding_equals_full_passes(tiny_params):
    """Breaks when the cache, its positions or its mask are off, or when padding or neighbours are
    seen.
    """
    rows = prompts()
    out = run(tiny_params, no_prefix(TINY, 3), np.zeros(3, np.int32), rows, stop_ids=(-1,))
    want = [slow_greedy(tiny_params, row) for row in rows]
    assert out.ids.tolist() == want and len({tuple(w) for w in want}) == 3
    assert out.lengths.tolist() == [NEW] * 3 and not out.stopped.any()


@pytest.mark.parametrize("model", [MODEL, WINDOWED], ids=["plain", "windowed"])
def test_decoding_behind_a_prefix_shared_by_rows(model, tiny_params):
    """Breaks when rows of one memory read another's, or as much as another holds, its positions are
    lost, or a layer's window is not kept to.
    """
    rng = np.random.default_rng(1)
    heads, lengths = rng.integers(8, 64, (2, 5)), np.asarray([5, 3])
    positions = np.tile(np.arange(5), (2, 1))

    @jax.jit
    def kv():
        _, (k, v) = model.apply(
            {"params": tiny_params}, heads, positions[:1], llama.causal_mask(5), return_kv=True
        )
        return rope.rotate_keys(TINY, k, positions), v

    prefix = Prefix(*kv(), np.arange(5) < lengths[:, None], positions, lengths)
    rows = [*prompts(2), prompts(3)[0]]
    out = run(tiny_params, prefix, np.repeat(lengths, 2), rows, model, stop_ids=(-1,))
    want = {
        m: [
            slow_greedy(tiny_params, [*heads[i // 2, : lengths[i // 2]], *row], m)
            for i, row in enumerate(rows)
        ]
        for m in (MODEL, WINDOWED)
    }
    assert out.ids.tolist() == want[model] and want[MODEL] != want[WINDOWED]


@pytest.fixture(scope="module")
def seven(tiny_params):
    """Seven prompts, what each brings forth without a stop, and two stop ids: in the middle of some
    texts, at once in one.
    """
    rows = [*prompts(), *prompts(4), prompts(5)[0]]
    free = [slow_greedy(tiny_params, row) for row in rows]
    return rows, free, (free[0][2], free[5][0])


def in_one_batch(params, seven, limits):
    rows, _, stops = seven
    start = np.zeros(len(rows), np.int32)
    return jax.device_get(
        run(
            params,
            no_prefix(TINY, len(rows)),
            start,
            rows,
            stop_ids=stops,
            limits=np.asarray(limits),
        )
    )


def alone(params, seven, i, limit):
    return jax.device_get(
        run(
            params,
            no_prefix(TINY, 1),
            np.zeros(1, np.int32),
            [seven[0][i]],
            stop_ids=seven[2],
            max_new_tokens=limit,
        )
    )


def test_stops_at_any_stop_id_and_leaves_it_out(tiny_params, seven):
    """Breaks when a stop id is missed, kept in the text, or ends other rows too."""
    _, free, stops = seven
    out = in_one_batch(tiny_params, seven, [NEW] * 7)
    for row, want in enumerate(free):
        ends = [i for i, token in enumerate(want) if token in stops]
        length = ends[0] if ends else NEW
        assert out.lengths[row] == length and bool(out.stopped[row]) == bool(ends)
        assert out.ids[row, :length].tolist() == want[:length] and not out.ids[row, length:].any()
    assert out.stopped[[0, 5]].all() and not out.stopped.all()


def test_ties_are_counted(tiny_params):
    """Breaks when two equal best logits pass for a sure choice."""
    rows = prompts()
    plain = run(tiny_params, no_prefix(TINY, 3), np.zeros(3, np.int32), rows, stop_ids=(-1,))
    assert plain.ties.tolist() == [0, 0, 0]
    best, head = int(plain.ids[0, 0]), np.array(tiny_params["lm_head"])
    head[:, 5 if best != 5 else 6] = head[:, best]
    tied = run(
        tiny_params | {"lm_head": head},
        no_prefix(TINY, 3),
        np.zeros(3, np.int32),
        rows,
        stop_ids=(-1,),
    )
    assert tied.ties[0] >= 1


def same_row(one, many, i):
    """That one row alone is row i of many: its log-probability but for rounding."""
    np.testing.assert_allclose(one.log_probs[0], many.log_probs[i], rtol=1e-5)
    assert jax.tree.map(lambda x: x[0].tolist(), one[:-1]) == jax.tree.map(
        lambda x: x[i].tolist(), many[:-1]
    )


def test_one_row_and_many_rows_agree(tiny_params, seven):
    many = in_one_batch(tiny_params, seven, [NEW] * 7)
    for i in range(7):
        one = alone(tiny_params, seven, i, NEW)
        same_row(one, many, i)


def test_each_row_ends_by_its_own_limit(tiny_params, seven):
    """Breaks when a row's limit is another's, text goes on behind it, or what ends a row at its
    limit is counted otherwise than alone.
    """
    _, free, stops = seven
    limits = [2, 1, 2, NEW, NEW, 1, 2]  # a stop right behind a limit, in the middle, at once
    # Twins of one stop and of what a row repeats: two equal best logits wherever these are chosen.
    head = np.array(tiny_params["lm_head"])
    head[:, 60], head[:, 63] = head[:, stops[0]], head[:, free[2][0]]
    assert (
        stops[0] < 60
        and free[2][0] < 63
        and not {60, 63} & {token for row in free for token in row}
    )
    for params in (tiny_params, tiny_params | {"lm_head": head}):
        out = in_one_batch(params, seven, limits)
        for i, limit in enumerate(limits):
            one = alone(params, seven, i, limit)
            assert (
                out.ids[i, :limit].tolist() == one.ids[0].tolist() and not out.ids[i, limit:].any()
            )
            for name in ("lengths", "stopped", "ties"):
                assert getattr(out, name)[i] == getattr(one, name)[0], name
            np.testing.assert_allclose(out.log_probs[i], one.log_probs[0], rtol=1e-5)
        assert out.lengths.tolist() == [2, 1, 2, NEW, 3, 0, 2]
        assert out.stopped.tolist() == [True, False, False, False, True, True, False]
        # A tie behind the limit counts where it decided whether the row had come to its end.
        assert out.ties.tolist() == ([0] * 7 if params is tiny_params else [1, 0, 2, 0, 1, 0, 0])
