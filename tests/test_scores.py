"""Scores against cases worked out by hand."""

import math

import pytest

from icae_jax.evaluation import scores


def test_bleu():
    """Breaks when the order of arguments or the scale is off: precision punishes what is added, not what is missing."""
    assert scores.bleu(["a b c d e"], ["a b c d e"]) == pytest.approx(100)
    # 4 of 5 words, 3 of 4, 2 of 3, 1 of 2 n-grams are right.
    assert scores.bleu(["a b c d x"], ["a b c d e"]) == pytest.approx(100 * math.prod((4 / 5, 3 / 4, 2 / 3, 1 / 2)) ** 0.25)
    assert scores.bleu(["a b c d e"], ["a b c d e f g h i j"]) == pytest.approx(100 * math.exp(1 - 2))


def test_exact_match():
    assert scores.exact_match([" a b ", "c", "D"], ["a b", "c d", "D"]) == pytest.approx(200 / 3)


def test_unequal_or_empty_lists_are_refused():
    for score in (scores.bleu, scores.exact_match):
        with pytest.raises(ValueError, match="1 texts against 2"):
            score(["a"], ["a", "b"])
        with pytest.raises(ValueError, match="at least one"):
            score([], [])
