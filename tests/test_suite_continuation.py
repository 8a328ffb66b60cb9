"""`continue`: all arms have the same labels; controls match transformers, memories `score`."""

import dataclasses
import math

import pytest
from suite_helpers import (
    arms_of_k,
    by_example,
    compressor,
    made,
    measured,
    near,
    reference_nats,
    text,
)

from icae_jax.evaluation import run
from icae_jax.evaluation.suites import common
from icae_jax.evaluation.suites.common import CUT, FULL, MEMORY, NONE, SHUFFLED, Options
from icae_jax.evaluation.suites.continuation import Continue

LENGTHS = (8, 30, 20)
OPTIONS = Options(context_lengths=LENGTHS, continuation_tokens=20)
TEXTS = [text(100, 1), text(48, 2)]  # the second has 18 tokens to continue


@pytest.mark.parametrize("method", ["icae", pytest.param("x500", marks=pytest.mark.nightly)])
def test_every_arm_scores_the_same_labels(tiny_base, method):
    """Breaks when a context does not end where the continuation begins, an arm has other labels,
    the cut context is not the last M tokens, or a loss is not that of transformers (without a
    memory) or `Compressor.score` (with one).
    """
    one, ks = compressor(tiny_base, method), arms_of_k(method)
    suite = Continue(one, dataclasses.replace(OPTIONS, k=tuple(ks.values())))
    examples, records = measured(suite, *TEXTS)
    ids = {t.key: one.ids(t.text) for t in TEXTS}
    assert sorted(len(e.ids) for e in examples) == [8, 8, 20, 20, 30, 30]
    memory_tokens = {8: 4, 20: 8, 30: 8}
    framed, partners = (
        [one.framed(e.ids) for e in examples],
        [one.framed(e.partner[: len(e.ids)]) for e in examples],
    )
    memories = {arm: one.compress_ids(framed, k=k) for arm, k in ks.items()} | {
        SHUFFLED: one.compress_ids(partners)
    }
    rests = [one.base.tokenizer.decode(e.continuation) for e in examples]
    behind = {arm: one.score(memory, rests) for arm, memory in memories.items()}
    total = {}
    for i, (e, [r]) in enumerate(zip(examples, records, strict=True)):
        rest = ids[e.cluster][30:50]
        assert list(e.continuation) == rest
        assert list(e.ids) == ids[e.cluster][30 - len(e.ids) : 30] and r["group"] == {
            "tokens": str(len(e.ids))
        }
        got = r["sums"]["perplexity"]
        assert set(got) == {FULL, CUT, NONE, SHUFFLED, *ks} and {n for _, n in got.values()} == {
            len(rest) - 1
        }
        seen = {FULL: e.ids, CUT: e.ids[-memory_tokens[len(e.ids)] :], NONE: ()}
        for arm, context in seen.items():
            want = reference_nats(tiny_base, [1, *context, *rest], 2 + len(context))
            near(got[arm], want)
            if len(e.ids) == 30:
                total[arm] = [a + b for a, b in zip(total.get(arm, (0, 0)), want, strict=True)]
        for arm, of in behind.items():
            near(got[arm], of[i])
        assert len({round(nats, 3) for nats, _ in got.values()}) == len(got), "the arms differ"
    result = run.summarise(suite, [r for of in records for r in of], 0)
    for arm, (nats, labels) in total.items():
        assert labels == 19 + 17 and result["scores"]["perplexity"][arm]["mean"] == pytest.approx(
            math.exp(nats / labels), rel=1e-4
        )
    assert list(result["groups"]["tokens"]) == ["8", "20", "30"]
    assert result["scores"]["perplexity"] == result["groups"]["tokens"]["30"]["perplexity"]


def test_texts_too_short_or_too_long_are_left_out(tiny_base):
    """Breaks when a text that just fits is left out, or one that does not is measured."""
    one = compressor(tiny_base)
    suite = Continue(one, Options(k=(4,), continuation_tokens=20, arms=(MEMORY, NONE)))
    assert (
        isinstance(suite.examples(text(15 + 15, 1)), str)
        and len(suite.examples(text(15 + 16, 1))[0].ids) == 15
    )
    assert "shorter than 31 tokens" in suite.examples(text(3, 1))
    # 20 segments of 16 tokens, the last one <s>'s: a memory of 80; and 1000 tokens have one of 63
    # segments and 252 tokens.
    assert isinstance(
        Continue(one, Options(k=(4,), context_lengths=(1000,), arms=(MEMORY,))).examples(
            text(1100, 1)
        ),
        str,
    )
    for arms, most in (((FULL,), 235), ((MEMORY, CUT, NONE), 943)):
        for n, fits in ((most, True), (most + 1, False)):
            suite = Continue(
                one, Options(k=(4,), context_lengths=(n,), continuation_tokens=20, arms=arms)
            )
            found = suite.examples(text(n + 30, 1))
            assert isinstance(found, list) == fits and (
                fits or found == "texts too long for the base's 256 positions"
            )
            if fits:
                [[record]] = suite.measure(found)
                assert set(record["sums"]["perplexity"]) == set(arms)


def test_the_shortest_continuation(tiny_base):
    """Breaks when a continuation of two tokens has no label, or fewer texts are taken than have
    one.
    """
    suite = Continue(
        compressor(tiny_base), Options(k=(4,), continuation_tokens=2, arms=(NONE, MEMORY))
    )
    examples, left_out = made(suite, text(16, 1), text(17, 1))
    assert list(left_out.values()) == [1] and [len(e.continuation) for e in examples] == [2]
    [[record]] = by_example(suite, examples).values()
    assert [n for _, n in record["sums"]["perplexity"].values()] == [1, 1]
    assert common.own_score("perplexity", record["sums"]["perplexity"][NONE]) == pytest.approx(
        math.exp(reference_nats(tiny_base, [1, *examples[0].continuation], 2)[0]), rel=1e-4
    )
