"""Batches as a function of (seed, step): windows, questions, buckets, epochs, process shares, held-out examples."""

import collections
import dataclasses
import hashlib
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from icae_jax.compression.config import CompressionConfig
from icae_jax.data.config import DataConfig
from icae_jax.data.drawing import StaticInt, draw_k, example_at
from icae_jax.data.examples import Examples
from icae_jax.data.index import ExampleSpec
from icae_jax.data.mixture import Mixture, interleave
from icae_jax.data.prefetch import train_batches
from icae_jax.data.tokens import Tokens
from icae_jax.errors import UserError
from icae_jax.objectives.targets import AE, Framing, Template

BOS, EOS = 1, 2
TEMPLATE = Template("plain", (), (3,), (4,), EOS)
COMPRESSION = CompressionConfig(k=5, rate=8)  # 40 tokens a segment
SHARES = ([0, 3], [1, 2])  # rows of a batch of four that two processes make


def flat(pieces):
    return np.concatenate(
        [np.zeros(0, np.int32), *(np.asarray(p, np.int32) for p in pieces)]
    ), np.cumsum([0, *map(len, pieces)])


def make_tokens(lengths, questions=()):
    """Texts of the given lengths (text i holds 1000 i, 1000 i + 1, …); questions: for each text (prompt, answer) lengths."""
    questions = [*questions, *[[]] * (len(lengths) - len(questions))]
    pairs = [pair for group in questions for pair in group]
    texts = flat([range(1000 * (i + 1), 1000 * (i + 1) + n) for i, n in enumerate(lengths)])
    prompts, answers = (
        flat(
            [
                range(100 * (q + 1) + 50 * j, 100 * (q + 1) + 50 * j + p[j])
                for q, p in enumerate(pairs)
            ]
        )
        for j in (0, 1)
    )
    return Tokens(*texts, *prompts, *answers, np.cumsum([0, *map(len, questions)]), "key")


def pretrain(lengths, objectives=("ae", "lm"), bos=(BOS,), **config):
    framing = Framing(bos, AE, EOS)
    data = DataConfig(**config)
    spec = ExampleSpec(data, COMPRESSION, "pretrain", objectives, TEMPLATE, framing)
    return Examples(make_tokens(lengths), spec)


def finetune(lengths, questions, objectives=("qa",), **config):
    framing = Framing((BOS,), AE, EOS)
    data = DataConfig(**config)
    spec = ExampleSpec(data, COMPRESSION, "finetune", objectives, TEMPLATE, framing)
    return Examples(make_tokens(lengths, questions), spec)


def target(batch, objective, b, g=0):
    """(input ids, labels) of one packed target, None where it is absent."""
    t = batch["targets"][objective]
    count = int(t["label_mask"][b, g].sum())
    inputs = t["label_at"][b, g, count - 1] + 1
    return (t["ids"][b, g, :inputs].tolist(), t["labels"][b, g, :count].tolist()) if count else None


def context(batch, b):
    return [
        t
        for ids, n in zip(batch["context"][b], batch["lengths"][b], strict=True)
        for t in ids[:n].tolist()
    ]


def seq(text, start, stop):
    return list(range(1000 * (text + 1) + start, 1000 * (text + 1) + stop))


# ------------------------------------------------------------------------------------------------------------- pretrain


def test_windows_and_the_windows_after_them():
    """Breaks when AE and LM are not on neighbouring windows of one text, or a rest, short text or continuation is misjudged."""
    # With <s>, a window of 80 holds 79 tokens. Texts: LM of a whole window, of 65, none of 63, a rest under half, a short text.
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
    """Breaks when small context lengths leave LM without any target: there, a whole window after the window is enough."""
    examples = pretrain([20 + 20 + 19], bos=(), context_lengths=(20,))
    assert examples.buckets[0].examples.tolist() == [
        [0, 0, 20, 40],
        [0, 20, 40, 40],
        [0, 40, 59, 59],
    ]


@pytest.mark.parametrize("length", [2, 4, 6, 7, 8, 9])
def test_windows_without_labels_for_language_modelling_are_refused(length):
    """Breaks when a length whose continuations are all within the unlabelled tokens ends in a traceback, or trains no LM in silence."""
    with pytest.raises(
        UserError,
        match=f"^data.context_lengths holds {length}, too short for objectives.lm.*give at least 10",
    ):
        pretrain([100], context_lengths=(length, 64))
    assert pretrain([100], ("ae",), context_lengths=(length,)).collate(0, np.asarray([0]))[
        "lengths"
    ].tolist() == [[length]]


def test_the_shortest_windows_of_language_modelling_have_labels():
    """Breaks when the bound on short windows refuses one that has a label, or lets one through that has none."""
    batch = pretrain([100], context_lengths=(10,)).collate(0, np.asarray([0]))
    assert target(batch, "lm", 0) == (seq(0, 9, 17), [seq(0, 9, 18)[-1]])


def test_without_bos_and_with_one_objective():
    """Breaks when a tokenizer without <s> gets one, or an objective without weight is made."""
    batch = pretrain([20], ("ae",), (), context_lengths=(20,)).collate(0, np.asarray([0]))
    assert set(batch["targets"]) == {"ae"} and context(batch, 0) == seq(0, 0, 20)


def test_every_text_fits_in_its_bucket():
    """Breaks when a bucket of 50, two segments of 25, has no room for a text of 40 tokens, which is one segment."""
    examples = pretrain([39, 49], context_lengths=(50,))
    batch = examples.collate(0, np.arange(2))
    assert [context(batch, b) for b in range(2)] == [[BOS, *seq(0, 0, 39)], [BOS, *seq(1, 0, 49)]]


def test_bucket_weights():
    """Breaks when weights are ignored or given to another bucket, or a bucket without examples is drawn."""
    examples = pretrain([100], context_lengths=(16, 32, 64), context_weights=(0.0, 3.0, 1.0))
    assert [b.shape for b in examples.buckets] == [(1, 16), (1, 32), (2, 40)]
    drawn = collections.Counter(examples.draw(0, step, 1)[0] for step in range(400))
    assert set(drawn) == {1, 2} and 250 < drawn[1] < 350


# ------------------------------------------------------------------------------------------------------------- finetune


def test_questions_of_a_context():
    """Breaks when questions go to another context or bucket, groups overlap, or an answer loses its stop."""
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
    """Breaks when a text or question is cut or dropped silently, or an example without any target left stays."""
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
        ValueError, match="no examples for phase finetune in the data: 1 contexts longer"
    ):
        finetune([40], [[(1, 1)]], context_lengths=(10,))
    with pytest.raises(
        ValueError, match="no examples for phase finetune in the data: 1 texts without a question"
    ):
        finetune([5], [[]], context_lengths=(10,))


def test_questions_take_no_memory_until_they_are_drawn():
    """Breaks when every question's target is made at the start and kept, which takes kilobytes a question in every process."""
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


# ---------------------------------------------------------------------------------------------------------------- draws


def test_epochs_cover_every_example_once():
    """Breaks when an example is drawn twice before all were drawn, also where an epoch ends inside a batch."""
    examples = pretrain([5] * 10, ("ae",), context_lengths=(8,))
    drawn = np.concatenate([examples.draw(0, step, 4)[1] for step in range(10)]).reshape(4, 10)
    assert [sorted(epoch) for epoch in drawn.tolist()] == [list(range(10))] * 4
    assert len(set(map(tuple, drawn.tolist()))) == 4, "every epoch has its own order"


def test_draws_depend_on_seed_and_step_alone():
    """Breaks when a draw depends on what was drawn before (a resumed run would then see other batches), or not on the seed."""
    config = {"context_lengths": (16, 32), "objectives": ("ae",)}
    one, other = pretrain([70] * 30, **config), pretrain([70] * 30, **config)
    draws = {step: one.draw(3, step, 4) for step in range(20)}
    for step in reversed(range(20)):
        bucket, rows = other.draw(3, step, 4)
        assert bucket == draws[step][0] and rows.tolist() == draws[step][1].tolist()
    assert {bucket for bucket, _ in draws.values()} == {0, 1}
    assert any(one.draw(4, step, 4)[1].tolist() != draws[step][1].tolist() for step in range(20))


def test_process_shares_make_up_the_global_batch():
    """Breaks when processes overlap, disagree on the bucket, or a run that starts later sees other batches."""
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
    """Breaks when k is never drawn, depends on the process or on what was drawn before, or is an array that jit would trace."""
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
    """Breaks when the reference's loss on padding covers less or more than the padded segments and one eos, or anything by default."""
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
    """Breaks when the last held-out batch repeats or loses examples, or evaluation sees others every time."""
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
    """Breaks when a run that was started with an earlier version would see other batches after it is continued: the values are those of
    the code before sources could be weighted."""
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


# -------------------------------------------------------------------------------------------------------------- mixtures


@pytest.mark.parametrize(
    "shares",
    [(1,), (3, 1), (1, 3), (1, 0, 1), (50, 30, 20), (1, 1, 1, 1, 1), (997, 2, 1), (0, 7, 31, 11)],
)
def test_interleaving_is_exact_over_any_stretch(shares):
    """Breaks when a share comes too seldom or too often anywhere, a position of a source is left out or doubled, or 0 is drawn."""
    row = [interleave(i, shares) for i in range(3000)]
    for number, share in enumerate(shares):
        assert [before for chosen, before in row if chosen == number] == list(
            range(sum(chosen == number for chosen, _ in row))
        )
        surplus = np.cumsum([0, *(chosen == number for chosen, _ in row)]) - np.arange(
            3001
        ) * share / sum(shares)
        assert surplus.max() - surplus.min() < 2
    far = 10**12
    assert interleave(far, shares) == interleave(far, shares) and sum(interleave(far + i, shares)[0] == 0 for i in range(sum(shares))) in (
        shares[0] - 1, shares[0], shares[0] + 1,
    )  # fmt: skip


def tagged(examples, number):
    """Examples whose texts can be told from those of other sources."""
    text_ids = examples.tokens.text_ids + 100_000 * (number + 1)
    tokens = dataclasses.replace(examples.tokens, text_ids=text_ids, key=f"key{number}")
    return Examples(tokens, examples.spec)


def sources_of(batch):
    """The source of each row of a batch, from its text."""
    return [context(batch, b)[-1] // 100_000 - 1 for b in range(len(batch["context"]))]


def mixed(weights, made):
    return Mixture(
        {
            n: (tagged(examples, n), w)
            for n, (examples, w) in enumerate(zip(made, weights, strict=True))
        }
    )


def drawn(mixture, steps, size=8):
    return collections.Counter(
        s
        for batch in train_batches(mixture, 5, size, range(steps), (5,))
        for s in sources_of(batch)
    )


def test_sources_are_drawn_by_their_weights():
    """Breaks when a large source takes the place of a small one, epochs leave examples out, or the bucket ignores context_weights."""
    config = {"context_lengths": (16, 40), "context_weights": (1.0, 3.0), "objectives": ("ae",)}
    mixture = mixed((3, 1), [pretrain([30] * 5, **config), pretrain([70] * 90, **config)])
    assert mixture.weights.tolist() == [0.25, 0.75] and drawn(mixture, 20) == {0: 120, 1: 40}
    one = mixed((1, 1, 2), [pretrain([9] * n, ("ae",), context_lengths=(16,)) for n in (4, 5, 7)])
    rows = np.concatenate([one.draw(5, step, 8)[1] for step in range(8)])
    for source, count in enumerate((4, 5, 7)):
        of_source = rows[rows[:, 0] == source, 1]
        assert sorted(of_source[:count]) == list(range(count)) and sorted(
            of_source[count : 2 * count]
        ) == list(range(count))


def test_fine_tuning_keeps_the_weights_over_buckets():
    """Breaks when a source whose contexts are mostly long, or many, is drawn more or less often than its weight says."""
    asked = [[(1, 1)]]
    made = [
        finetune([9] * 30 + [30] * 10, asked * 40, context_lengths=(10, 31, 50)),
        finetune([30] * 3 + [45], asked * 4, context_lengths=(10, 31, 50)),
    ]
    mixture = mixed((2, 1), made)
    np.testing.assert_allclose(mixture.weights, [2 / 3 * 3 / 4, 2 / 3 / 4 + 1 / 4, 1 / 3 / 4])
    count = drawn(mixture, 1200)
    assert abs(count[0] / (8 * 1200) - 2 / 3) < 0.02
    longest = [
        b
        for b in train_batches(mixture, 5, 8, range(300), (5,))
        if b["context"].shape[1:] == made[0].buckets[2].shape
    ]
    assert longest and all(set(sources_of(b)) == {1} for b in longest), (
        "the first source has no context of this length"
    )


def test_a_mixture_is_a_function_of_seed_and_step():
    """Breaks when a resumed run or another process sees other batches, or sources of one size are read in one order."""
    config = {"context_lengths": (16, 32), "objectives": ("ae", "lm")}
    mixture = mixed((1, 2), [pretrain([70] * 9, **config), pretrain([70] * 9, **config)])

    def contexts(start, *rows):
        return [
            batch["context"] for batch in train_batches(mixture, 5, 4, range(start, 8), (5,), *rows)
        ]

    every, shares, later = (
        contexts(0),
        [contexts(0, np.asarray(rows)) for rows in SHARES],
        contexts(5),
    )
    for step, (whole, *parts) in enumerate(zip(every, *shares, strict=True)):
        np.testing.assert_array_equal(whole[np.concatenate(SHARES)], np.concatenate(parts))
        if step >= 5:
            np.testing.assert_array_equal(whole, later[step - 5])
    assert any(
        mixture.draw(6, s, 4)[1].tolist() != mixture.draw(5, s, 4)[1].tolist() for s in range(8)
    )
    assert [example_at(5, 0, i, 9, 0) for i in range(9)] != [
        example_at(5, 0, i, 9, 1) for i in range(9)
    ]


def test_questions_of_several_sources_have_one_shape():
    """Breaks when a batch of two sources cannot be packed, processes disagree on its shape, or a source's own key or losses are lost."""
    made = [
        finetune([9], [[(2, 1), (1, 3), (1, 90)]], context_lengths=(10,), max_target_tokens=20),
        finetune([9, 15], [[(6, 1)], [(1, 1)]], context_lengths=(10,)),
    ]
    shapes = [examples.qa_shape for examples in made]
    mixture = mixed((1, 1), made)
    assert (
        mixture.qa_shape == tuple(map(max, *shapes))
        and shapes[0] != shapes[1]
        and shapes[0] != mixture.qa_shape != shapes[1]
    )
    assert mixture.key == "key0,key1"
    assert mixture.dropped == {
        "questions longer than data.max_target_tokens": 1, "contexts longer than the largest of data.context_lengths": 1,
    }  # fmt: skip
    batch = mixture.collate(0, np.asarray([[1, 0], [0, 0]]))
    assert (
        sources_of(batch) == [1, 0]
        and target(batch, "qa", 0)[1] == [150, EOS]
        and target(batch, "qa", 1)[1] == [150, EOS]
    )
    assert target(batch, "qa", 1, 1) == ([3, 200, 4, 250, 251, 252], [250, 251, 252, EOS])


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
