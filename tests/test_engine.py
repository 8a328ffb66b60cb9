"""The engine: rows that come and go, memories that are shared, chunks, stops and errors."""

import dataclasses

import decoding_helper
import greedy_loop
import jax
import numpy as np
import pytest
from conftest import TINY, eight_devices
from test_generate import MODEL, NEW, TABLE, padded, prompts, slow_greedy

from icae_jax.compression.decoder import Decoder, Prefix
from icae_jax.errors import UserError
from icae_jax.evaluation.plain import no_prefix
from icae_jax.inference import decoding
from icae_jax.inference.devices import Devices
from icae_jax.inference.engine import Engine
from icae_jax.inference.requests import Request
from icae_jax.inference.sampling import Sampling
from icae_jax.models import llama
from icae_jax.models.llama import FrozenModel
from icae_jax.runtime import sharding
from icae_jax.runtime.sharding import MeshConfig

LIMIT = Sampling(max_new_tokens=NEW)


@pytest.fixture(scope="module")
def decoder(tiny_params):
    return Decoder(FrozenModel(MODEL, tiny_params), TABLE)


@pytest.fixture(scope="module")
def engine_of(decoder):
    """Makes engines of two rows, of one shape, so that their programs are compiled once."""

    def make(**given):
        sizes = {"rows": 2, "tokens": 24, "memory_tokens": 5, "chunk": 8}
        return Engine(decoder, Devices(None, TINY), **(sizes | given))

    return make


@pytest.fixture(scope="module")
def memories(tiny_params):
    """K/V of three texts of 5, 3 and 4 tokens, and the ids that they stand for."""
    heads, lengths = np.random.default_rng(1).integers(8, 64, (3, 5)), np.asarray([5, 3, 4])
    positions = np.tile(np.arange(5), (3, 1))

    @jax.jit
    def kv():
        variables = {"params": tiny_params}
        mask = llama.causal_mask(5)
        how = {"return_kv": True, "rotated": True}
        return MODEL.apply(variables, heads, positions[:1], mask, **how)[1]

    prefix = Prefix(*jax.device_get(kv()), np.arange(5) < lengths[:, None], positions, lengths)
    return prefix, [row[:n].tolist() for row, n in zip(heads, lengths, strict=True)]


def test_rows_that_come_and_go_decode_what_they_would_alone(decoder):
    """Breaks when a row is left with its last tenant's tokens, or neighbours disturb each other."""
    rows = [*prompts(), *prompts(4), *prompts(5)]
    limits = np.asarray([6, 1, 4, 2, 6, 3, 5, 6, 1])
    batch = greedy_loop.Prompts(*padded(rows), np.zeros(9, np.int32), limits)
    how = {"max_new_tokens": NEW, "stop_ids": (63,)}
    want = jax.device_get(greedy_loop.greedy(decoder, no_prefix(TINY, 9), batch, **how))
    for at_once in (2, 9):
        got = decoding_helper.greedy(
            decoder, no_prefix(TINY, 9), batch, at_once=at_once, chunk=8, **how
        )
        np.testing.assert_allclose(got.log_probs, want.log_probs, rtol=1e-5)
        for mine, theirs in zip(got[:-1], want[:-1], strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_stacked_layers_and_layers_apart_decode_alike(decoder, memories, monkeypatch):
    """Breaks when a cache in one array per layer is written or read otherwise than a stacked one,
    which accelerators use.
    """
    prefix, texts = memories
    rows = prompts(2)
    batch = greedy_loop.Prompts(*padded(rows), prefix.end)
    how = {"max_new_tokens": NEW, "stop_ids": (-1,), "chunk": 4}
    apart = decoding_helper.greedy(decoder, prefix, batch, **how)
    assert isinstance(Devices(None, TINY).for_decoding(decoder).base.params["layers"], tuple)
    monkeypatch.setattr(Devices, "for_decoding", lambda self, decoder: decoder)
    stacked = decoding_helper.greedy(decoder, prefix, batch, **how)
    want = [slow_greedy(decoder.base.params, [*t, *r]) for t, r in zip(texts, rows, strict=True)]
    assert apart.ids.tolist() == stacked.ids.tolist() == want


def test_memories_are_shared_and_their_places_used_again(engine_of, memories, decoder):
    """Breaks when a row reads another's memory or one that was in its place before, when requests
    without a memory see one, or when questions about one memory do not share its place.
    """
    prefix, texts = memories
    engine, loaded = engine_of(rows=3), []
    load = engine._programs.load

    def noted(cache, prefix, which, places):
        if prefix is memories[0]:
            loaded.extend(int(i) for i, place in zip(which, places, strict=True) if place < 3)
        return load(cache, prefix, which, places)

    engine._programs = engine._programs._replace(load=noted)
    rows = [*prompts(2), *prompts(6), *prompts(7)]
    order = [0, 0, 0, 1, 2, None, 1, 1, 0]
    requests = [
        Request(row, LIMIT, 0 if text is None else len(texts[text]), *behind, tag=i)
        for i, (row, text) in enumerate(zip(rows, order, strict=True))
        for behind in [(None, 0) if text is None else (prefix, text)]
    ]
    ended = {running.request.tag: running.ids for running in engine.run(requests)}
    for i, text in enumerate(order):
        before = [] if text is None else texts[text]
        assert ended[i] == slow_greedy(decoder.base.params, [*before, *rows[i]]), i
    # The first of three about one memory ends at once; the others read on in its place.
    three = [Request(row, LIMIT, 5, prefix, 0, tag=i) for i, row in enumerate(rows[:3])]
    three[0] = three[0]._replace(sampling=Sampling(1))
    for running in engine.run(three):
        want = slow_greedy(decoder.base.params, [*texts[0], *running.request.prompt])
        assert running.ids == want[: running.request.sampling.max_new_tokens]
    assert 1 <= loaded.count(0) <= 3 and 1 <= loaded.count(1) <= 2, loaded  # of 4 and 3 requests


@pytest.mark.parametrize("places", [1, 2])
def test_fewer_places_than_rows(engine_of, memories, decoder, places):
    """Breaks when a request takes a place that others read, or waits for ever for one."""
    prefix, texts = memories
    engine = engine_of(rows=3, memories=places)
    assert engine._cache.memory_mask.shape[0] == places
    order = [0, 0, 1, 0, 2, 2, None]
    requests = [
        Request(row, LIMIT, len(texts[text]) if text is not None else 0, *behind, tag=i)
        for i, (row, text) in enumerate(zip([*prompts(2), *prompts(6), [9, 8]], order, strict=True))
        for behind in [(None, 0) if text is None else (prefix, text)]
    ]
    ended = {running.request.tag: running for running in engine.run(requests)}
    for i, text in enumerate(order):
        before = [] if text is None else texts[text]
        want = slow_greedy(decoder.base.params, [*before, *requests[i].prompt])
        assert ended[i].ids == want, i


def test_a_long_prompt_does_not_stop_the_others(engine_of, decoder):
    """Breaks when chunks are put at the wrong places, the others wait for the whole prompt, or a
    chunk sees what a step of the others wrote into its row.
    """
    # Chunks look back at 4, 8, 16 and 16 tokens: the fourth at more than were written.
    long, short = np.random.default_rng(3).integers(8, 64, 17).tolist(), prompts()[0]
    engine = engine_of(tokens=32, chunk=4)
    first = engine.insert(Request(short, LIMIT))
    while not first.ids:
        engine.step()
    second, between = engine.insert(Request(long, LIMIT)), []
    while not second.ids:
        engine.step()
        between.append(len(first.ids))
    assert between[-1] >= 5  # five chunks of at most four, and a step between any two
    while not (first.done and second.done):
        engine.step()
    assert first.ids == slow_greedy(decoder.base.params, short)
    assert second.ids == slow_greedy(decoder.base.params, long)


@pytest.mark.parametrize("memory_tokens", [5, 0])
def test_a_request_can_be_ended_early(engine_of, decoder, memory_tokens):
    """Breaks when the row is not free then, or what was left in it disturbs the next request."""
    engine = engine_of(rows=1, memory_tokens=memory_tokens)
    gone = engine.insert(Request(prompts()[1], LIMIT))
    assert engine.insert(Request(prompts()[0], LIMIT)) is None  # no row is free
    engine.step(), engine.step()
    engine.remove(gone)
    engine.remove(gone)  # does nothing
    assert gone.done and engine.free == 1 and not len(engine)
    (running,) = engine.run([Request(prompts()[2], LIMIT)])
    assert running.ids == slow_greedy(decoder.base.params, prompts()[2])


def test_two_streams_share_an_engine(engine_of, decoder):
    """Breaks when what ends during another's step is never yielded, or a stream that its caller
    leaves keeps its rows.
    """
    engine, rows = engine_of(), prompts()
    quick = engine.stream([Request(rows[0], Sampling(2))])
    assert next(quick).ids == slow_greedy(decoder.base.params, rows[0])[:1]
    (slow,) = engine.run([Request(rows[1], LIMIT)])  # whose steps end the other's text
    ended = list(quick)
    assert ended[-1].done and ended[-1].ids == slow_greedy(decoder.base.params, rows[0])[:2]
    assert slow.ids == slow_greedy(decoder.base.params, rows[1]) and engine.free == 2
    left = engine.stream([Request(rows[2], LIMIT)])
    next(left)
    assert engine.free == 1
    left.close()
    assert engine.free == 2 and not len(engine)


def test_what_does_not_fit_is_a_requests_own_error(engine_of, memories, decoder):
    """Breaks when one bad request ends the others, or is cut without a word."""
    prefix, _ = memories
    longer = dataclasses.replace(prefix, mask=np.ones((3, 50), bool))
    good = Request(prompts()[0], LIMIT, tag="good")
    bad = {
        "has no tokens|no tokens": Request([], LIMIT),
        "exceed the 32 tokens of a row": Request([9] * 30, LIMIT),
        "exceeds the engine's 16": Request([9], LIMIT, 0, longer),
        "make it with a tokenizer": Request([9], Sampling(4, stop=["."])),
    }
    engine = engine_of()
    for match, request in bad.items():
        ended = list(engine.run([request, good]))
        assert [running.request.tag for running in ended] == [None, "good"]
        with pytest.raises(UserError, match=match):
            raise ended[0].error
        assert ended[1].ids == slow_greedy(decoder.base.params, prompts()[0])
    with pytest.raises(UserError, match="rows of the engine is 0"):
        engine_of(rows=0)


def test_alternatives_are_the_models_own_probabilities(engine_of, decoder):
    """Breaks when log-probabilities are not of the tokens that they stand beside."""
    (running,) = engine_of().run(
        [Request(prompts()[0], dataclasses.replace(LIMIT, alternatives=3))]
    )
    assert len(running.alternatives) == len(running.ids) == NEW
    for token, log_prob, (ids, log_probs) in zip(
        running.ids, running.log_probs, running.alternatives, strict=False
    ):
        assert ids[0] == token and log_probs[0] == pytest.approx(log_prob, abs=1e-5)
        assert len(ids) == 3 and log_probs == sorted(log_probs, reverse=True)


def test_draws_depend_on_the_seed_alone(engine_of):
    """Breaks when a draw depends on the row, on neighbours, or on how many steps were made before;
    or when a seed does nothing.
    """
    hot = [Sampling(NEW, temperature=1.5, seed=seed, top_k=40) for seed in (1, 2, 1, 3)]
    engine = engine_of()
    requests = [Request(prompts()[1], how, tag=i) for i, how in enumerate(hot)]
    mixed = [requests[0], Request(prompts()[0], LIMIT, tag="greedy"), *requests[1:]]
    ended = {running.request.tag: running.ids for running in engine.run(mixed)}
    assert ended[0] == ended[2] and len({tuple(ended[i]) for i in (0, 1, 3)}) == 3
    (alone,) = engine_of().run([requests[3]])
    assert alone.ids == ended[3]
    (greedy,) = engine_of().run([mixed[1]])
    assert ended["greedy"] == greedy.ids


def test_a_penalty_counts_prompt_and_answer(engine_of, decoder):
    """Breaks when tokens of the prompt, of the answer, or of another request are penalised wrongly:
    with a large penalty no token comes twice, and none of the prompt.
    """
    strict = dataclasses.replace(LIMIT, repetition_penalty=1000.0)
    prompt = prompts()[1]
    plain = slow_greedy(decoder.base.params, prompt)
    requests = [Request(prompt, strict), Request(plain[:1], strict), Request(prompt, strict)]
    ended = [running.ids for running in engine_of(rows=1).run(requests)]
    for ids, request in zip(ended, requests, strict=True):
        assert len(set(ids)) == NEW and not set(ids) & set(request.prompt)
    assert ended[0] == ended[2]


def test_on_a_mesh(decoder, memories):
    """Breaks when rows that are split over devices are written or read at the wrong places."""
    prefix, texts = memories
    rows = [*prompts(2), *prompts(6)]
    requests = [
        Request(row, LIMIT, len(texts[i % 3]), prefix, i % 3, tag=i) for i, row in enumerate(rows)
    ]
    with eight_devices():
        devices = Devices(sharding.make_mesh(MeshConfig(2, 2, 2)), TINY)
        params = devices.put_parameters(decoder.base.params)
        sizes = {"rows": 3, "tokens": 24, "memory_tokens": 5, "chunk": 4}
        engine = Engine(Decoder(FrozenModel(MODEL, params), TABLE), devices, **sizes)
        assert engine.rows == 4
        ended = {running.request.tag: running.ids for running in engine.run(requests)}
        assert len(engine._cache.k.sharding.device_set) == 8
    for i, row in enumerate(rows):
        assert ended[i] == slow_greedy(decoder.base.params, [*texts[i % 3], *row])


def test_one_program_for_each_bucket(engine_of):
    """Breaks when a request compiles a program of its own, or a step one for each state of rows."""
    programs, counts = decoding.programs(), []
    rng = np.random.default_rng(9)
    for lengths in ([3, 7, 5, 4, 2], [1, 6, 8, 2, 7, 3, 5], [8, 8, 1, 2, 4]):
        engine = engine_of(rows=5)
        rows = [rng.integers(8, 64, n).tolist() for n in lengths]
        list(engine.run(Request(row, Sampling(1 + i % 4)) for i, row in enumerate(rows)))
        counts.append([program._cache_size() for program in (programs.prefill, programs.step)])
    first, *later = counts
    # Prompts of up to eight tokens are one bucket; groups of them have one row, four or five.
    assert all(prefill - first[0] <= 2 and step == first[1] for prefill, step in later), counts


def test_what_is_not_finite_ends_with_its_request(engine_of, memories, decoder):
    """Breaks when NaN in a memory is answered to without a word, or reaches the next in its row."""
    prefix, texts = memories
    broken = prefix.replace(v=np.full_like(prefix.v, np.nan))
    good = Request(prompts()[1], LIMIT, len(texts[0]), prefix, 0, tag="good")
    other = Request(prompts()[0], LIMIT, tag="other")
    longer = [*good.prompt, *good.prompt]  # the next one in its row writes over a part of it
    bad = good._replace(prompt=longer, prefix=broken, tag="bad")
    engine = engine_of()
    ended = {running.request.tag: running for running in engine.run([bad, other, good])}
    with pytest.raises(UserError, match="not finite"):
        raise ended["bad"].error
    assert ended["other"].ids == slow_greedy(decoder.base.params, prompts()[0])
    assert ended["good"].ids == slow_greedy(decoder.base.params, [*texts[0], *prompts()[1]])


def test_a_shared_memory_stays_while_others_read_it(decoder, memories):
    """Breaks when a request that ends with an error takes the memory from those that share it."""
    broken = dataclasses.replace(decoder, table=np.full_like(decoder.table, np.nan))
    engine = Engine(broken, Devices(None, TINY), rows=2, tokens=24, memory_tokens=5, chunk=8)
    prefix, texts = memories
    good = Request(prompts()[1], LIMIT, len(texts[0]), prefix, 0, tag="good")
    bad = good._replace(prompt=[-1, *good.prompt], tag="bad")  # reads the table
    ended = {running.request.tag: running for running in engine.run([bad, good])}
    assert ended["bad"].error is not None and ended["good"].error is None
    want = slow_greedy(decoder.base.params, [*texts[0], *prompts()[1]])
    assert ended["good"].ids == want


def test_what_is_not_finite_leaves_with_one_removed_early(engine_of, memories, decoder):
    """Breaks when a request that is removed before its first token leaves NaN to the next in its
    row, or in the place of its memory.
    """
    prefix, texts = memories
    damaged = prefix.replace(v=np.full_like(prefix.v, np.nan))
    engine = engine_of(rows=1)
    removed = engine.insert(Request([*prompts()[1]] * 3, LIMIT, len(texts[0]), damaged, 0))
    engine.step()  # the first of two chunks
    assert removed.waiting and not removed.done
    engine.remove(removed)
    of_three = prefix.replace(
        k=prefix.k[:, :, :3],
        v=prefix.v[:, :, :3],
        mask=prefix.mask[:, :3],
        positions=prefix.positions[:, :3],
    )
    (after,) = engine.run([Request(prompts()[1], LIMIT, len(texts[1]), of_three, 1)])
    assert after.error is None
    assert after.ids == slow_greedy(decoder.base.params, [*texts[1], *prompts()[1]])


def test_ids_and_positions_are_the_bases(engine_of):
    """Breaks when an id without an embedding, or a position that the base lacks, is decoded."""
    engine = engine_of()
    for match, request in {
        "holds id 100000": Request([9, 100_000], LIMIT),
        "holds id -9": Request([-9], LIMIT),
        "exceed the base's": Request([9], LIMIT, TINY.max_position_embeddings - 3),
    }.items():
        with pytest.raises(UserError, match=match):
            engine.insert(request)
