"""Batches as a function of (seed, step): windows, questions, buckets, epochs, process shares,
held-out examples.
"""

import collections
import hashlib
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batch_helpers import (
    BOS,
    COMPRESSION,
    EOS,
    SHARES,
    TEMPLATE,
    context,
    finetune,
    make_tokens,
    pretrain,
    seq,
    target,
)

from icae_jax.compression.config import CompressionConfig
from icae_jax.data.config import DataConfig
from icae_jax.data.drawing import StaticInt, draw_k
from icae_jax.data.examples import Examples
from icae_jax.data.index import ExampleSpec
from icae_jax.data.prefetch import train_batches
from icae_jax.errors import UserError
from icae_jax.objectives.targets import AE, Framing

# ----------------------------------------------------------------------------------------- pretrain


def test_windows_and_the_windows_after_them():
    """Breaks when AE and LM are not on adjacent windows of one text, or the rule for rests, short
    texts or continuations is wrong.
    """
    # With <s>, a window of 80 holds 79 tokens. Texts: LM of a whole window, of 65, none of 63, a
    # rest under half, a short text.
    examples = pretrain([79 + 79, 79 + 65, 79 + 63, 79 + 39, 10], context_lengths=(80,))
    assert examples.buckets[0].examples.tolist() == [
        [0, 0, 79, 158], [0, 79, 158, 158],
        [1, 0, 79, 144], [1, 79, 144, 144],
        [2, 0, 79, 79], [2, 79, 142, 142],
        [3, 0, 79, 79],
        [4, 0, 10, 10],
    ]  # fmt: skip
    batch = examples.collate(0, np.asarray([2, 4, 7, -1]))
    assert batch["context"].shape == (4, 2, 40) and batch["lengths"].tolist() == [
        [40, 40],
        [40, 40],
        [11, 0],
        [0, 0],
    ]
    assert context(batch, 0) == [BOS, *seq(1, 0, 79)] and context(batch, 2) == [BOS, *seq(4, 0, 10)]
    assert target(batch, "ae", 0) == ([AE, BOS, *seq(1, 0, 79)], [BOS, *seq(1, 0, 79), EOS])
    assert target(batch, "lm", 0) == (seq(1, 79, 143), seq(1, 87, 144))
    assert target(batch, "lm", 1) is None and target(batch, "ae", 2) == (
        [AE, BOS, *seq(4, 0, 10)],
        [BOS, *seq(4, 0, 10), EOS],
    )
    assert target(batch, "ae", 3) is None and target(batch, "lm", 3) is None
    assert batch["targets"]["ae"]["ids"].shape == batch["targets"]["lm"]["ids"].shape, (
        "one shape, so that both run in one call"
    )


def test_windows_shorter_than_the_minimum_still_make_language_modelling():
    """Breaks when short context lengths leave LM without targets; there a full continuation
    suffices.
    """
    examples = pretrain([20 + 20 + 19], bos=(), context_lengths=(20,))
    assert examples.buckets[0].examples.tolist() == [
        [0, 0, 20, 40],
        [0, 20, 40, 40],
        [0, 40, 59, 59],
    ]


@pytest.mark.parametrize("length", [2, 4, 6, 7, 8, 9])
def test_windows_without_labels_for_language_modelling_are_refused(length):
    """Breaks when a length whose continuations hold no labels gives a traceback, or silently trains
    no LM.
    """
    with pytest.raises(
        UserError,
        match=f"^data.context_lengths holds {length}, too short for objectives.lm.* at least 10",
    ):
        pretrain([100], context_lengths=(length, 64))
    assert pretrain([100], ("ae",), context_lengths=(length,)).collate(0, np.asarray([0]))[
        "lengths"
    ].tolist() == [[length]]


def test_the_shortest_windows_of_language_modelling_have_labels():
    """Breaks when the bound on short windows refuses one with a label, or accepts one without."""
    batch = pretrain([100], context_lengths=(10,)).collate(0, np.asarray([0]))
    assert target(batch, "lm", 0) == (seq(0, 9, 17), [seq(0, 9, 18)[-1]])


def test_without_bos_and_with_one_objective():
    """Breaks when a tokenizer without <s> gets one, or an objective without a weight is made."""
    batch = pretrain([20], ("ae",), (), context_lengths=(20,)).collate(0, np.asarray([0]))
    assert set(batch["targets"]) == {"ae"} and context(batch, 0) == seq(0, 0, 20)


def test_every_text_fits_in_its_bucket():
    """Breaks when a bucket of 50 (two segments of 25) has no room for a text of 40 (one
    segment).
    """
    examples = pretrain([39, 49], context_lengths=(50,))
    batch = examples.collate(0, np.arange(2))
    assert [context(batch, b) for b in range(2)] == [[BOS, *seq(0, 0, 39)], [BOS, *seq(1, 0, 49)]]


def test_bucket_weights():
    """Breaks when bucket weights are ignored or permuted, or an empty bucket is drawn."""
    examples = pretrain([100], context_lengths=(16, 32, 64), context_weights=(0.0, 3.0, 1.0))
    assert [b.shape for b in examples.buckets] == [(1, 16), (1, 32), (2, 40)]
    drawn = collections.Counter(examples.draw(0, step, 1)[0] for step in range(400))
    assert set(drawn) == {1, 2} and 250 < drawn[1] < 350


# ----------------------------------------------------------------------------------------- finetune


def test_questions_of_a_context():
    """Breaks when questions go to another context or bucket, groups overlap, or an answer loses its
    stop.
    """
    pairs = [[(2, 1)] * 3, [(1, 2)], []]
    examples = finetune(
        [30, 9, 20], pairs, ("qa", "ae"), context_lengths=(10, 31), questions_per_context=2
    )
    assert [b.examples.tolist() for b in examples.buckets] == [[[1, 3, 4]], [[0, 0, 2], [0, 2, 3]]]
    assert examples.weights.tolist() == [1 / 3, 2 / 3] and examples.dropped == {
        "texts without a question": 1
    }
    batch = examples.collate(1, np.asarray([1, 0]))
    assert context(batch, 0) == context(batch, 1) == [BOS, *seq(0, 0, 30)]
    assert (
        target(batch, "qa", 0) == ([3, 300, 301, 4, 350], [350, EOS])
        and target(batch, "qa", 0, 1) is None
    )
    assert [target(batch, "qa", 1, g)[1] for g in range(2)] == [[150, EOS], [250, EOS]]
    assert target(batch, "ae", 0) == ([AE, BOS, *seq(0, 0, 30)], [BOS, *seq(0, 0, 30), EOS])
    assert target(examples.collate(0, np.asarray([0])), "qa", 0) == (
        [3, 400, 4, 450, 451],
        [450, 451, EOS],
    )


def test_what_is_too_long_is_left_out_and_counted():
    """Breaks when a text or question is cut or silently dropped, or an example without targets
    stays.
    """
    pairs = [[(1, 1), (1, 9), (8, 1)], [(9, 9)], [(1, 1), (1, 1)]]
    examples = finetune(
        [9, 9, 10], pairs, context_lengths=(10,), questions_per_context=2, max_target_tokens=10
    )
    assert examples.dropped == {
        "contexts longer than the largest of data.context_lengths": 1,
        "questions longer than data.max_target_tokens": 3,
    }
    assert examples.buckets[0].examples.tolist() == [[0, 0, 2]]
    batch = examples.collate(0, np.asarray([0]))
    assert (
        target(batch, "qa", 0) == ([3, 100, 4, 150], [150, EOS])
        and target(batch, "qa", 0, 1) is None
    )
    with pytest.raises(
        ValueError, match="no examples for phase finetune in the data: 1 context longer"
    ):
        finetune([40], [[(1, 1)]], context_lengths=(10,))
    with pytest.raises(
        ValueError, match="no examples for phase finetune in the data: 1 text without a question"
    ):
        finetune([5], [[]], context_lengths=(10,))


def test_questions_take_no_memory_until_they_are_drawn():
    """Breaks when the targets of all questions are made at the start and kept: kilobytes a question
    in each process.
    """
    count = 20_000
    data = make_tokens([9] * count, [[(20, 20)]] * count)
    config, framing = DataConfig(context_lengths=(10,)), Framing((BOS,), AE, EOS)
    spec = ExampleSpec(config, COMPRESSION, "finetune", ("qa",), TEMPLATE, framing)
    tracemalloc.start()
    try:
        examples = Examples(data, spec)
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(examples.buckets[0].examples) == count and kept < 100 * count
    assert examples.qa_shape == (1 + 20 + 1 + 20, 21) == TEMPLATE.target_sizes(20, 20)


# -------------------------------------------------------------------------------------------- draws


def test_epochs_cover_every_example_once():
    """Breaks when an example is drawn twice in an epoch, also where an epoch ends inside a
    batch.
    """
    examples = pretrain([5] * 10, ("ae",), context_lengths=(8,))
    drawn = np.concatenate([examples.draw(0, step, 4)[1] for step in range(10)]).reshape(4, 10)
    assert [sorted(epoch) for epoch in drawn.tolist()] == [list(range(10))] * 4
    assert len(set(map(tuple, drawn.tolist()))) == 4, "every epoch has its own order"


def test_draws_depend_on_seed_and_step_alone():
    """Breaks when a draw depends on earlier draws (a resumed run would see other batches), or not
    on the seed.
    """
    config = {"context_lengths": (16, 32), "objectives": ("ae",)}
    one, other = pretrain([70] * 30, **config), pretrain([70] * 30, **config)
    draws = {step: one.draw(3, step, 4) for step in range(20)}
    for step in reversed(range(20)):
        bucket, rows = other.draw(3, step, 4)
        assert bucket == draws[step][0] and rows.tolist() == draws[step][1].tolist()
    assert {bucket for bucket, _ in draws.values()} == {0, 1}
    assert any(one.draw(4, step, 4)[1].tolist() != draws[step][1].tolist() for step in range(20))


def test_process_shares_make_up_the_global_batch():
    """Breaks when processes overlap or disagree on the bucket, or a resumed run sees other
    batches.
    """
    examples = pretrain([70] * 9, context_lengths=(16, 32))

    def contexts(start, *rows):
        return [
            batch["context"]
            for batch in train_batches(examples, 5, 4, range(start, 8), (5,), *rows)
        ]

    every, shares = contexts(0), [contexts(0, np.asarray(rows)) for rows in SHARES]
    assert len(every) == 8 and all(len(b) == 4 for b in every)
    for whole, *parts in zip(every, *shares, strict=True):
        np.testing.assert_array_equal(whole[np.concatenate(SHARES)], np.concatenate(parts))
    for whole, later in zip(every[5:], contexts(5), strict=True):
        np.testing.assert_array_equal(whole, later)


def test_k_is_drawn_from_seed_and_step_alone():
    """Breaks when k is constant, depends on the process or on earlier draws, or is traced by
    jit.
    """
    examples = pretrain([70] * 9, context_lengths=(16,))

    def drawn(start, *rows):
        return [
            batch["k"]
            for batch in train_batches(examples, 5, 4, range(start, 40), (1, 4, 16), *rows)
        ]

    every = drawn(0)
    assert (
        set(every) == {1, 4, 16}
        and every[20:] == drawn(20)
        and every == drawn(0, np.asarray(SHARES[1]))
    )
    assert [draw_k(6, step, (1, 4, 16)) for step in range(40)] != every
    traced = []
    jitted = jax.jit(lambda batch: traced.append(batch["k"]) or jnp.arange(batch["k"]))
    assert [len(jitted({"k": StaticInt(k)})) for k in (4, 1, 4)] == [
        4,
        1,
        4,
    ] and traced == [4, 1]


def test_labels_on_the_padding_where_asked_for():
    """Breaks when labels on padding (as in the reference) do not cover exactly the padded segments
    and one eos, or are on by default.
    """
    compression = CompressionConfig(method="x500", layout="reference", k=5, rate=8)
    framing = Framing((), BOS, EOS)
    for pad, behind in ((True, 40 - 7), (False, 0)):
        config = DataConfig(context_lengths=(20,))
        spec = ExampleSpec(config, compression, "pretrain", ("ae",), TEMPLATE, framing, pad)
        examples = Examples(make_tokens([7]), spec)
        batch = examples.collate(0, np.asarray([0]))
        assert (
            batch["context"].shape == (1, 1, 40)
            and batch["context"][0, 0].tolist() == seq(0, 0, 7) + [EOS] * 33
        )
        ids, labels = target(batch, "ae", 0)
        assert labels == seq(0, 0, 7) + [EOS] * (behind + 1) and ids[: 1 + 7] == [
            BOS,
            *seq(0, 0, 7),
        ]


def test_held_out_examples_come_once_with_blank_rows():
    """Breaks when held-out batches repeat or lose examples, or differ between evaluations."""
    examples = pretrain([15] * 7, ("ae",), context_lengths=(16,))
    rows = [rows.tolist() for _, rows in examples.held_out(4, 100)]
    assert [len(r) for r in rows] == [4, 4] and rows[1][3] == -1
    assert sorted(r for part in rows for r in part) == [-1, *range(7)]
    assert rows == [rows.tolist() for _, rows in examples.held_out(4, 100)]
    assert sum(r >= 0 for _, rows in examples.held_out(4, 5) for r in rows) == 5
    both = pretrain([15] * 7, ("ae",), context_lengths=(8, 16))
    assert {bucket for bucket, _ in both.held_out(4, 100)} == {0, 1}


def digest(examples):
    """sha256 over everything in twelve batches."""
    result = hashlib.sha256()
    for batch in train_batches(examples, 7, 4, range(12), (1, 5)):
        for leaf in jax.tree.leaves(batch):
            result.update(
                str((leaf.dtype, leaf.shape)).encode() + np.ascontiguousarray(leaf).tobytes()
            )
        result.update(str(int(batch["k"])).encode())
    return result.hexdigest()


def test_batches_without_weights_are_those_of_earlier_versions():
    """Breaks when a run of an earlier version would see other batches when continued. The values
    were computed before sources had weights.
    """
    examples = pretrain(
        [70, 158, 33, 9, 120], context_lengths=(16, 32, 80), context_weights=(1.0, 2.0, 1.0)
    )
    assert [(b, r.tolist()) for b, r in (examples.draw(7, step, 4) for step in range(3))] == [
        (1, [9, 2, 6, 1]), (2, [6, 0, 4, 0]), (0, [25, 20, 24, 1]),
    ]  # fmt: skip
    assert digest(examples) == "f46183f7414ce4f1602d6a149aa3bc68f997b7e2855f1c2ceeeffc31bf7e5b6d"
    pairs = [[(2, 1)] * 3, [(1, 2)], [(3, 2)] * 5, [(1, 1)]]
    examples = finetune(
        [30, 9, 20, 15], pairs, ("qa", "ae"), context_lengths=(10, 31), questions_per_context=2
    )
    assert digest(examples) == "86807be5733d7aa0706f8f4dd2af89b894e83276074bc83726ce50bf1e737d4f"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"train": "a,b", "train_weights": (1.0,)},
            r"weights \(1\.0,\) must hold a weight >= 0 for each source of data\.train, a, b",
        ),
        ({"train": "a,b", "train_weights": (1.0, -1.0)}, "must hold a weight >= 0"),
        ({"train": "a,b", "train_weights": (1.0, float("nan"))}, "must hold a weight >= 0"),
        ({"train": "a,b", "train_weights": (1.0, float("inf"))}, "must hold a weight >= 0"),
        ({"train": "a", "train_weights": (0.0,)}, r"data\.train_weights \(0\.0,\) are all zero"),
        ({"context_lengths": ()}, "data.context_lengths is \\(\\)"),
        ({"context_lengths": (1,)}, "at least 2 tokens"),
        ({"context_lengths": (32, 16)}, "rising lengths"),
        ({"context_lengths": (16, 16)}, "rising lengths"),
        ({"context_weights": (1.0, 1.0)}, "one weight >= 0 for each"),
        ({"context_weights": (-1.0,)}, "one weight >= 0 for each"),
        ({"context_weights": (0.0,)}, "are all zero"),
        ({"questions_per_context": 0}, "data.questions_per_context is 0"),
        ({"max_target_tokens": 0}, "data.max_target_tokens is 0"),
        ({"max_row_bytes": 0}, "data.max_row_bytes is 0"),
        ({"no_answer": "  "}, "data.no_answer is '  '; give words"),
        ({"no_answer": "\ud83d"}, "data.no_answer is not valid text"),
    ],
)
def test_bad_configuration_is_named(fields, message):
    """Breaks when a bad value gets through, or the error does not name it."""
    with pytest.raises(ValueError, match=message):
        DataConfig(**fields)
