"""Greedy decoding: the cached loop against running the whole sequence anew for every token."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY

from icae_jax.compression.memory import Prefix
from icae_jax.evaluation.plain import no_prefix
from icae_jax.inference import generate
from icae_jax.models import llama, rope

NEW = 6
MODEL = llama.Llama(TINY)
WINDOWED = llama.Llama(dataclasses.replace(TINY, windows=(6, 0)))
TABLE = jnp.zeros((4, TINY.hidden_size))


LONGEST = 24


@functools.partial(jax.jit, static_argnums=2)
def full_pass(params, ids, model):
    """The best next token behind every position of one padded sequence (the causal mask hides the padding)."""
    hidden, _ = model.apply({"params": params}, ids[None], jnp.arange(LONGEST)[None], llama.causal_mask(LONGEST))
    return jnp.argmax(hidden[0] @ llama.head_kernel(params), -1)


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
    ids, lengths = np.zeros((len(rows), width), np.int32), np.asarray([len(r) for r in rows], np.int32)
    for row, to in zip(rows, ids, strict=True):
        to[: len(row)] = row
    return ids, lengths


def run(params, prefix, starts, rows, model=MODEL, **kw):
    kw = {"max_new_tokens": NEW, "stop_ids": (63,)} | kw
    return generate.greedy(model, params, TABLE, prefix, starts, *padded(rows), **kw)


def test_cached_batched_decoding_equals_full_passes(tiny_params):
    """Breaks when the cache, its positions or its mask are off, or when padding or neighbours are seen."""
    rows = prompts()
    out = run(tiny_params, no_prefix(TINY, 3), jnp.zeros(3, jnp.int32), rows, stop_ids=(-1,))
    want = [slow_greedy(tiny_params, row) for row in rows]
    assert out.ids.tolist() == want and len({tuple(w) for w in want}) == 3
    assert out.lengths.tolist() == [NEW] * 3 and not out.stopped.any()


@pytest.mark.parametrize("model", [MODEL, WINDOWED], ids=["plain", "windowed"])
def test_decoding_behind_a_prefix_shared_by_rows(model, tiny_params):
    """Breaks when rows of one memory read another's, or as much as another holds, its positions are lost, or a layer's window is not
    kept to.
    """
    rng = np.random.default_rng(1)
    heads, lengths = rng.integers(8, 64, (2, 5)), np.asarray([5, 3])
    _, (k, v) = model.apply({"params": tiny_params}, jnp.asarray(heads), jnp.arange(5)[None], llama.causal_mask(5), return_kv=True)
    positions = jnp.broadcast_to(jnp.arange(5), (2, 5))
    prefix = Prefix(rope.rotate_keys(TINY, k, positions), v, jnp.asarray(np.arange(5) < lengths[:, None]), positions, jnp.asarray(lengths))
    rows = [*prompts(2), prompts(3)[0]]
    out = run(tiny_params, prefix, jnp.repeat(prefix.end, 2), rows, model, stop_ids=(-1,))
    want = {
        m: [slow_greedy(tiny_params, [*heads[i // 2, : lengths[i // 2]], *row], m) for i, row in enumerate(rows)] for m in (MODEL, WINDOWED)
    }
    assert out.ids.tolist() == want[model] and want[MODEL] != want[WINDOWED]


def test_stops_at_any_stop_id_and_leaves_it_out(tiny_params):
    """Breaks when a stop id is missed, kept in the text, or ends other rows too."""
    rows = prompts()
    free = [slow_greedy(tiny_params, row) for row in rows]
    first, second = free[0][2], free[1][4]
    out = run(tiny_params, no_prefix(TINY, 3), jnp.zeros(3, jnp.int32), rows, stop_ids=(first, second))
    for row, want in enumerate(free):
        ends = [i for i, token in enumerate(want) if token in (first, second)]
        length = ends[0] if ends else NEW
        assert out.lengths[row] == length and bool(out.stopped[row]) == bool(ends)
        assert out.ids[row, :length].tolist() == want[:length] and not out.ids[row, length:].any()
    assert out.stopped[:2].all()


def test_ties_are_counted(tiny_params):
    """Breaks when two equal best logits pass for a sure choice."""
    rows = prompts()
    plain = run(tiny_params, no_prefix(TINY, 3), jnp.zeros(3, jnp.int32), rows, stop_ids=(-1,))
    assert plain.ties.tolist() == [0, 0, 0]
    best = int(plain.ids[0, 0])
    twin = 5 if best != 5 else 6
    head = tiny_params["lm_head"].at[:, twin].set(tiny_params["lm_head"][:, best])
    tied = run(tiny_params | {"lm_head": head}, no_prefix(TINY, 3), jnp.zeros(3, jnp.int32), rows, stop_ids=(-1,))
    assert tied.ties[0] >= 1


def test_one_row_and_many_rows_agree(tiny_params):
    rows = prompts()
    many = run(tiny_params, no_prefix(TINY, 3), jnp.zeros(3, jnp.int32), rows)
    for i, row in enumerate(rows):
        one = run(tiny_params, no_prefix(TINY, 1), jnp.zeros(1, jnp.int32), [row])
        assert jax.tree.map(lambda x: x[0].tolist(), one) == jax.tree.map(lambda x, i=i: x[i].tolist(), many)


def test_each_row_ends_by_its_own_limit(tiny_params):
    """Breaks when a row's limit is another's, text goes on behind it, or what ends a row at its limit is counted otherwise than alone."""
    rows = [*prompts(), *prompts(4), prompts(5)[0]]
    free = [slow_greedy(tiny_params, row) for row in rows]
    limits, stops = [2, 1, 2, NEW, NEW, 1, 2], (free[0][2], free[5][0])  # a stop right behind a limit, in the middle, at once
    # Twins of one stop and of what a row repeats: two equal best logits wherever these are chosen.
    head, start = tiny_params["lm_head"], jnp.zeros(len(rows), jnp.int32)
    head = head.at[:, 60].set(head[:, stops[0]]).at[:, 63].set(head[:, free[2][0]])
    assert stops[0] < 60 and free[2][0] < 63 and not {60, 63} & {token for row in free for token in row}
    for params in (tiny_params, tiny_params | {"lm_head": head}):
        out = run(params, no_prefix(TINY, len(rows)), start, rows, stop_ids=stops, limits=np.asarray(limits))
        for i, (row, limit) in enumerate(zip(rows, limits, strict=True)):
            alone = run(params, no_prefix(TINY, 1), start[:1], [row], stop_ids=stops, max_new_tokens=limit)
            assert out.ids[i, :limit].tolist() == alone.ids[0].tolist() and not out.ids[i, limit:].any()
            for name in ("lengths", "stopped", "ties"):
                assert getattr(out, name)[i] == getattr(alone, name)[0], name
        assert out.lengths.tolist() == [2, 1, 2, NEW, 3, 0, 2]
        assert out.stopped.tolist() == [True, False, False, False, True, True, False]
        # A tie behind the limit counts where it decided whether the row had come to its end.
        assert out.ties.tolist() == ([0] * 7 if params is tiny_params else [1, 0, 2, 0, 1, 0, 0])
