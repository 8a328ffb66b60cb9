"""`memorise`: three contents of one length, each scored as itself."""

import dataclasses

import numpy as np
import pytest
from suite_helpers import compressor, made, measured, near, text

from icae_jax.evaluation import scores
from icae_jax.evaluation.suites.common import Options
from icae_jax.evaluation.suites.memorise import NORMAL, PATTERNED, RANDOM, Memorise


def test_contents(tiny_base):
    """Breaks when a successor is a special id or runs off the vocabulary, lengths differ, or random
    ids are not the text's own.
    """
    suite = Memorise(compressor(tiny_base), Options())
    context = text(8, content="<unk> [INST] sun sky cat the the unheard-of")
    [one] = suite.examples(context)
    assert list(one.ids) == [0, 3, 63, 62, 9, 8, 8, 0]
    one = dataclasses.replace(
        one, ids=(0, 2, *one.ids[1:])
    )  # what a text spells is no control token: put in by hand
    contents = suite.contents(one)
    # 0, 1 and 2 are special: [INST], 3, is the first that is not, and follows the last, 63.
    assert contents[NORMAL] == list(one.ids) and contents[PATTERNED] == [
        3,
        3,
        4,
        3,
        63,
        10,
        9,
        9,
        3,
    ]
    assert (
        len(contents[RANDOM]) == 9
        and not {0, 1, 2} & set(contents[RANDOM])
        and max(contents[RANDOM]) < 64
    )
    again = Memorise(compressor(tiny_base, "x500"), Options(batch_size=3))
    assert again.contents(dataclasses.replace(one, partner=(5,), id="other")) == contents
    [other] = suite.examples(text(9, 5))
    assert suite.contents(other)[RANDOM] != contents[RANDOM]
    [elsewhere] = suite.examples(dataclasses.replace(context, set="another file"))
    elsewhere = dataclasses.replace(elsewhere, ids=one.ids)
    assert suite.contents(elsewhere) == contents, "where a text is from changes nothing"
    drawn = [i for n in range(200) for i in suite.contents(suite.examples(text(15, n))[0])[RANDOM]]
    counts = np.bincount(drawn, minlength=64)
    assert counts[:3].sum() == 0 and counts[3:].min() > 20 and counts.max() < 90, (
        "every other id alike"
    )


@pytest.mark.parametrize("method", ["icae", "x500"])
def test_every_content_is_restored_from_its_own_memory(tiny_base, method):
    """Breaks when an arm's memory, labels or original are another content's."""
    one = compressor(tiny_base, method)
    suite = Memorise(one, Options(k=(4,)))
    examples, records = measured(suite, text(6, 1), text(12, 2), text(30, 3))
    every = [suite.contents(e) for e in examples]
    for arm in (NORMAL, PATTERNED, RANDOM):
        texts = [one.base.tokenizer.decode(contents[arm]) for contents in every]
        memory = one.compress(texts)
        losses, restored = one.score_restoring(memory, texts), one.restore(memory, details=True)
        for e, [r], said, loss, again in zip(
            examples, records, texts, losses, restored, strict=True
        ):
            near(r["sums"]["ae_loss"][arm], loss)
            assert (
                loss.tokens == len(one.framed(e.ids)) + 1 and r["texts"][f"original, {arm}"] == said
            )
            assert again.ties or r["ties"][arm] or r["texts"][arm] == again.text
            assert r["sums"]["bleu"][arm] == scores.bleu_counts(r["texts"][arm], said).tolist()
    assert all(list(r["sums"]["ae_loss"]) == [NORMAL, PATTERNED, RANDOM] for [r] in records)
    assert all(len({tuple(ids) for ids in contents.values()}) == 3 for contents in every)


def test_arms_and_lengths(tiny_base):
    """Breaks when an arm that was not asked for is run, one that this suite lacks measures nothing,
    or a length is not taken.
    """
    one = compressor(tiny_base)
    suite = Memorise(one, Options(k=(4,), context_lengths=(7,), arms=(RANDOM,)))
    examples, left_out = made(suite, text(20, 1), text(5, 2), text(0, content=" "))
    assert [len(e.ids) for e in examples] == [5, 7] and left_out == {"texts without a token": 1}
    [[record], _] = suite.measure(examples)
    assert list(record["sums"]["ae_loss"]) == [RANDOM]
    with pytest.raises(ValueError, match="--arms 'memory' is no arm of suite memorise"):
        Memorise(one, Options(arms=("memory",)))
    with pytest.raises(
        ValueError, match=r"--context_lengths is \(7, 9\); suite memorise takes one"
    ):
        Memorise(one, Options(context_lengths=(7, 9)))
