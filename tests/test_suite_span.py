"""`span`: memories of segments, compressed apart and joined, before one continuation."""

import dataclasses

import numpy as np
import pytest
from suite_helpers import compressor, made, measured, near, reference_nats, text

from icae_jax.evaluation.suites.common import CUT, FULL, MEMORY, NONE, Options
from icae_jax.evaluation.suites.span import Span

OPTIONS = Options(context_lengths=(12,), continuation_tokens=20, spans=(4, 1, 2))
TEXTS = [text(80, 1), text(66, 2)]


def joined(memories):
    """Memories of one segment each, put in a row by hand."""
    axis = memories[0].TEXT_AXIS + 1
    contents = {
        name: np.concatenate([m.contents[name] for m in memories], axis)
        for name in memories[0].CONTENTS
    }
    mask = np.concatenate([m.mask for m in memories], 1)
    texts, tokens = mask.shape
    assert mask.all()
    return dataclasses.replace(
        memories[0],
        **contents,
        mask=mask,
        positions=np.tile(np.arange(tokens), (texts, 1)),
        end=np.full(texts, tokens),
        segment_lengths=np.concatenate([m.segment_lengths for m in memories], 1),
    )


@pytest.mark.parametrize("method", [pytest.param("icae", marks=pytest.mark.nightly), "x500"])
def test_the_last_segments_before_one_continuation(tiny_base, method):
    """Breaks when segments see each other, are joined in another order, are the first instead of
    the last, or labels differ.
    """
    one = compressor(tiny_base, method)
    k = 4
    suite = Span(one, dataclasses.replace(OPTIONS, k=(k,)))
    examples, records = measured(suite, *TEXTS)
    apart = [
        one.compress([one.base.tokenizer.decode(e.ids[at : at + 12]) for e in examples], k=k)
        for at in (0, 12, 24, 36)
    ]
    rests = [one.base.tokenizer.decode(e.continuation) for e in examples]
    behind = {s: one.score(joined(apart[-s:]), rests) for s in (1, 2, 4)}
    for i, (e, of) in enumerate(zip(examples, records, strict=True)):
        ids = one.ids(next(t.text for t in TEXTS if t.key == e.cluster))
        rest = ids[48:68]
        assert [r["group"]["segments"] for r in of] == ["1", "2", "4"] and list(
            e.continuation
        ) == rest
        assert list(e.ids) == ids[:48]
        for r, s in zip(of, (1, 2, 4), strict=True):
            got = r["sums"]["perplexity"]
            assert set(got) == {MEMORY, FULL, CUT, NONE} and {n for _, n in got.values()} == {
                len(rest) - 1
            }
            near(got[MEMORY], behind[s][i])
            for arm, n in ((FULL, 12 * s), (CUT, k * s), (NONE, 0)):
                near(got[arm], reference_nats(tiny_base, [1, *ids[48 - n : 48], *rest], 2 + n))
        assert len({round(r["sums"]["perplexity"][MEMORY][0], 3) for r in of}) == 3
    assert [r["group"]["segments"] for r in suite.main([r for of in records for r in of])] == [
        "4",
        "4",
    ]


def test_segments_and_texts_that_cannot_be(tiny_base):
    """Breaks when segments are cut in two by a length over one segment's, or texts without room get
    through.
    """
    one = compressor(tiny_base)
    assert Span(one, Options()).tokens == 15, "<s> takes a place in every segment"
    with pytest.raises(ValueError, match=r"--context_lengths is \(8, 12\); suite span takes one"):
        Span(one, dataclasses.replace(OPTIONS, context_lengths=(8, 12)))
    with pytest.raises(
        ValueError, match="--context_lengths is 16, but one segment of this adapter holds 15 tokens"
    ):
        Span(one, dataclasses.replace(OPTIONS, context_lengths=(16,)))
    assert "shorter than 64 tokens, 4 segments" in Span(one, OPTIONS).examples(text(63, 1))
    assert len(Span(one, OPTIONS).examples(text(64, 1))) == 1
    for arms, most in (((FULL,), 19), ((MEMORY, CUT), 59)):
        for spans, fits in ((most, True), (most + 1, False)):
            suite = Span(
                one,
                Options(
                    k=(4,), context_lengths=(12,), spans=(spans,), continuation_tokens=20, arms=arms
                ),
            )
            examples = suite.examples(text(12 * spans + 20, 1))
            assert isinstance(examples, list) == fits and (fits or "256 positions" in examples)
            if fits:
                [[record]] = suite.measure(examples)
                assert set(record["sums"]["perplexity"]) == set(arms)
    with pytest.raises(ValueError, match="no text for --suite span: 1 text shorter than"):
        made(Span(one, OPTIONS), text(5, 1))
