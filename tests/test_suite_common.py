"""For all suites: neighbours, padding and order change no score; bad options are refused."""

import dataclasses
import math

import pytest
import sacrebleu
from suite_helpers import by_example, compressor, made, near, question, reference_nats, same, text

from icae_jax.evaluation import scores
from icae_jax.evaluation.suites import SUITES, common
from icae_jax.evaluation.suites.common import Options

QUICK = Options(k=(4,), continuation_tokens=24, max_new_tokens=5, spans=(1, 2))


def asked(n, seed, count):
    return text(n, seed, [question(10 * n + i, n=2 + i % 3) for i in range(count)])


# Of mixed lengths, of one and of two segments, some with questions.
TEXTS = [asked(5, 0, 2), asked(14, 1, 1), text(56, 2), asked(20, 3, 2), text(51, 5), text(34, 4)]


def suite_of(name, path, method, options):
    if name == "ablate":
        return SUITES[name](dict.fromkeys(("one", "other"), compressor(path, method)), options)
    return SUITES[name](compressor(path, method), options)


# By day each suite with one method, in turn: what batches a suite makes hangs on the suite, how a
# memory is put into them on the method.
DAILY = {
    (name, ("icae", "x500")[number % 2]) for number, name in enumerate(SUITES) if name != "ablate"
} | {("ablate", "icae")}


@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(n, m, marks=[] if (n, m) in DAILY else [pytest.mark.nightly])
        for n in SUITES
        for m in ("icae", "x500")
        if (n, m) != ("ablate", "x500")
    ],
)
def test_batches_and_order_change_no_score(tiny_base, name, method):
    """Breaks when padding or a neighbour reaches a score, a partner depends on the batch, or
    results come back in another order.
    """
    whole = suite_of(name, tiny_base, method, dataclasses.replace(QUICK, batch_size=16))
    examples, _ = made(whole, *TEXTS)
    assert (
        len(examples) >= 2
        and len({(len(e.ids), len(e.continuation), len(e.questions)) for e in examples})
        >= (name != "span") + 1
    )
    want = by_example(whole, examples)
    turned = by_example(whole, examples[::-1])
    assert same(turned, want) == same(want, want) > len(examples)
    alone = suite_of(name, tiny_base, method, dataclasses.replace(QUICK, batch_size=1))
    again, _ = made(alone, *TEXTS[::-1])
    assert again == examples
    same(by_example(alone, examples, 1), want)


def test_every_suite_by_its_name():
    assert list(SUITES) == ["autoencode", "continue", "memorise", "qa", "ablate", "span", "tokens"]
    for suite in SUITES.values():
        assert all(metric in common.METRICS for metric in suite.METRICS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"k": (2, 2)}, r"--k is \(2, 2\)"),
        ({"context_lengths": (0,)}, "--context_lengths is"),
        ({"spans": ()}, "--spans is empty"),
        ({"spans": (2, -1)}, "--spans is"),
        ({"max_new_tokens": 0}, "--max_new_tokens is 0"),
        ({"batch_size": 0}, "--batch_size is 0"),
        ({"continuation_tokens": 1}, "--continuation_tokens is 1"),
    ],
)
def test_options_that_make_no_sense(given, message):
    with pytest.raises(ValueError, match=message):
        Options(**given)


@pytest.mark.parametrize("name", [n for n in SUITES if n not in ("ablate", "tokens")])
def test_unknown_arms_and_k(tiny_base, name):
    """Breaks when a misspelt arm, or a k that the adapter lacks, silently measures nothing."""
    with pytest.raises(
        ValueError, match=f"--arms 'memroy' is no arm of suite {name}; choose from "
    ):
        SUITES[name](compressor(tiny_base), Options(arms=("memroy",)))
    with pytest.raises(ValueError, match="k is 3; this compressor was trained with 2, 4"):
        SUITES[name](compressor(tiny_base), Options(k=(3,)))


def test_memory_tokens_and_arms_by_k(tiny_base):
    """Breaks when k's arms are not named after k, the most first, or <s> is not counted in a
    segment.
    """
    for method, start in (("icae", 1), ("x500", 0)):
        suite = SUITES["qa"](compressor(tiny_base, method), Options())
        assert suite.choices == [4, 2] and [suite.arm_of(k) for k in suite.choices] == [
            "memory",
            "memory k=2",
        ]
        assert suite.segment == 16 - start
        assert [suite.memory_tokens(n) for n in (1, 15, 16, 31, 32)] == [
            4,
            4,
            4 + 4 * start,
            8,
            8 + 4 * start,
        ]
        small = SUITES["qa"](compressor(tiny_base, method), Options(k=(2,)))
        assert small.choices == [2] and small.arm_of(2) == "memory" and small.memory_tokens(17) == 4


def test_buckets():
    assert [common.bucket(n) for n in (1, 100, 101, 200, 512)] == [
        "1-100",
        "1-100",
        "101-200",
        "101-200",
        "501-600",
    ]


def test_own_scores():
    """Breaks when an example's own score is not that of its numbers alone: BLEU of a short text
    with effective order.
    """
    for made_text, truth in (
        ("the cat", "the cat"),
        ("the cat sat on a mat", "a cat sat on the mat"),
        ("", "the cat"),
        ("so", "the cat"),
    ):
        own = common.own_score("bleu", list(scores.bleu_counts(made_text, truth)))
        assert own == sacrebleu.sentence_bleu(made_text, [truth]).score
    assert (
        common.own_score("perplexity", [6.0, 3]) == pytest.approx(math.exp(2))
        and common.own_score("f1", [50.0, 1.0]) == 50
    )


def test_one_text_alone_has_no_shuffled_memory(tiny_base):
    """Breaks when a text is its own partner: all its examples are of one text."""
    options = Options(
        context_lengths=(8, 16), continuation_tokens=18, arms=("shuffled memory", "no context")
    )
    suite = SUITES["continue"](compressor(tiny_base), options)
    examples, _ = made(suite, text(40, 1))
    assert len(examples) == 2 and [e.partner for e in examples] == [(), ()]
    for of in by_example(suite, examples).values():
        assert list(of[0]["sums"]["perplexity"]) == ["no context"]
    two, _ = made(suite, text(40, 1), text(41, 2))
    assert all(
        e.partner and e.partner not in [o.ids for o in two if o.cluster == e.cluster] for e in two
    )
    found = by_example(suite, two)
    assert all(
        list(of[0]["sums"]["perplexity"]) == ["no context", "shuffled memory"]
        for of in found.values()
    )
    for e in two:
        near(
            found[e.key][0]["sums"]["perplexity"]["no context"],
            reference_nats(tiny_base, [1, *e.continuation], 2),
        )
