"""Scores against cases worked out by hand, and against the packages that define them."""

import math

import numpy as np
import pytest
import sacrebleu
from rouge_score import rouge_scorer

from icae_jax.evaluation import scores

WORDS = [
    "the",
    "a",
    "memory",
    "of",
    "tokens",
    "holds",
    ",",
    "what",
    "text",
    "said",
    ".",
    "Zoë's",
    "3.5",
    "well-known",
]


def texts(rng, count, longest=12):
    """Random texts of 0 to `longest` words, so that some share nothing and some are too short for
    four-grams.
    """
    return [" ".join(rng.choice(WORDS, size=rng.integers(longest + 1))) for _ in range(count)]


def test_bleu():
    """Breaks when the order of arguments or the scale is off: precision punishes what is added, not
    what is missing.
    """
    assert scores.bleu(["a b c d e"], ["a b c d e"]) == pytest.approx(100)
    # 4 of 5 words, 3 of 4, 2 of 3, 1 of 2 n-grams are right.
    assert scores.bleu(["a b c d x"], ["a b c d e"]) == pytest.approx(
        100 * math.prod((4 / 5, 3 / 4, 2 / 3, 1 / 2)) ** 0.25
    )
    assert scores.bleu(["a b c d e"], ["a b c d e f g h i j"]) == pytest.approx(
        100 * math.exp(1 - 2)
    )


def test_exact_match():
    """Breaks when case or inner text is forgiven, or spaces at the ends are not."""
    assert scores.exact_match([" a b ", "c", "D"], ["a b", "c d", "D"]) == pytest.approx(200 / 3)


def test_unequal_or_empty_lists_are_refused():
    """Breaks when a score is made of lists that do not belong together, or of none."""
    for score in (scores.bleu, scores.exact_match):
        with pytest.raises(ValueError, match="1 texts against 2"):
            score(["a"], ["a", "b"])
        with pytest.raises(ValueError, match="at least one"):
            score([], [])


@pytest.mark.parametrize(
    ("prediction", "answers", "em", "f1"),
    [
        ("The Cat", ["a cat!"], 100, 100),  # articles, case, punctuation
        ("theory", ["ory"], 0, 0),  # an article inside a word stays
        ("an anthem", ["anthem"], 100, 100),
        ("U.S.A.", ["usa"], 100, 100),  # punctuation goes without leaving a space
        ("well-known", ["well known"], 0, 0),  # so a hyphen joins its words
        ("well-known", ["wellknown"], 100, 100),
        ("“Paris”", ["Paris"], 0, 0),  # only ASCII punctuation goes
        ("the“Paris”", ["“Paris”"], 100, 100),  # yet it ends a word, so "the" is an article
        ("x–the–y", ["x– –y"], 100, 100),  # and it leaves a space
        (
            "in Paris",
            ["Rome", "Paris", "in Lyon"],
            0,
            200 / 3,
        ),  # the best answer: 1 of 2 words, 1 of 1
        ("Rome", ["Lyon", "Rome"], 100, 100),
        (
            "x x y",
            ["x y y"],
            0,
            200 / 3,
        ),  # shared words are counted as often as both hold them: x, y
        ("x", ["x x x"], 0, 50),  # precision 1, recall 1/3
        ("  in   Paris\n", ["in\tParis"], 100, 100),
        ("", ["Paris"], 0, 0),
        ("The.", ["a", "an!"], 100, 0),  # nothing is left of either: equal, with no shared word
        ("", [""], 100, 0),
    ],
)
def test_squad(prediction, answers, em, f1):
    """Breaks when normalisation, the choice of the best answer or the count of shared words departs
    from SQuAD v1.1.
    """
    assert scores.squad_em(prediction, answers) == em
    assert scores.squad_f1(prediction, answers) == pytest.approx(f1)


def test_one_answer_as_text_is_refused():
    """Breaks when a text given for a list of answers is read letter by letter."""
    for score in (scores.squad_f1, scores.squad_em, scores.rouge):
        for answers in ("Paris", []):
            with pytest.raises(ValueError, match=r"answers is .* give a list"):
                score("Paris", answers)


def test_rouge():
    """Breaks when argument order, scale, stemming or the choice among references changes."""
    got = scores.rouge("cats ran home", ["no", "cat runs home today"])
    assert got == pytest.approx(
        {"rouge1": 200 / 7, "rouge2": 0, "rougeL": 200 / 7}
    )  # a stemmer would match "cats" with "cat"
    # Each kind has its own best reference: the first shares a bigram, the second more words.
    assert scores.rouge("a b c d", ["a b x x x", "d c b a"]) == pytest.approx(
        {"rouge1": 100, "rouge2": 200 / 7, "rougeL": 400 / 9}
    )
    rng = np.random.default_rng(0)
    direct = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
    for prediction, reference in zip(texts(rng, 30), texts(rng, 30), strict=True):
        expected = direct.score(reference, prediction)
        assert scores.rouge(prediction, [reference]) == pytest.approx(
            {k: 100 * v.fmeasure for k, v in expected.items()}
        )


def test_prefix_match():
    """Breaks when matches after the first difference count, or when the share is taken of the
    prediction.
    """
    assert scores.prefix_match([5, 6, 9, 8], [5, 6, 7, 8]) == 50
    assert scores.prefix_match([5, 6], [5, 6, 7, 8]) == 50
    assert scores.prefix_match([5, 6, 7], [5, 6]) == 100
    assert scores.prefix_match([], [5]) == 0 and scores.prefix_match([6], [5]) == 0
    assert scores.prefix_match(np.array([5, 6]), np.array([5, 7])) == 50
    with pytest.raises(ValueError, match="reference_ids is empty"):
        scores.prefix_match([1], np.array([], np.int32))


def test_sentence_bleu_is_sacrebleus():
    """Breaks when smoothing, effective order or the order of arguments departs from sacrebleu's."""

    def own(hypothesis, reference):
        return scores.sentence_bleu(scores.bleu_counts(hypothesis, reference))

    assert own("a b", "a b") == pytest.approx(100)  # without effective order this would be 0
    rng = np.random.default_rng(1)
    for hypothesis, reference in zip(texts(rng, 50), texts(rng, 50), strict=True):
        assert own(hypothesis, reference) == sacrebleu.sentence_bleu(hypothesis, [reference]).score


def test_bleu_counts():
    """Breaks when a count stands in another's place: what is made is not what was wanted."""
    assert scores.bleu_counts("a b c d x", "a b c d e f").tolist() == [4, 3, 2, 1, 5, 4, 3, 2, 5, 6]
    assert scores.bleu_counts("", "a b").tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 0, 2]


def test_bleu_from_counts_is_corpus_bleu():
    """Breaks when smoothing, the brevity penalty, or corpora without a match or without four-grams
    come out otherwise than sacrebleu's.
    """
    rng = np.random.default_rng(2)
    expected, sums, smoothed = [], [], 0
    for case in range(200):
        count, longest = rng.integers(1, 6), (3, 6, 12)[case % 3]
        hypotheses, references = texts(rng, count, longest), texts(rng, count, longest)
        result = sacrebleu.corpus_bleu(hypotheses, [references])
        smoothed += result.score > 0 and 0 in result.counts
        expected.append(result.score)
        sums.append(
            sum(scores.bleu_counts(h, r) for h, r in zip(hypotheses, references, strict=True))
        )
    assert expected.count(0) > 20 and smoothed > 20  # the cases are there
    np.testing.assert_allclose(
        scores.bleu_from_counts(np.reshape(sums, (20, 10, 10))).ravel(), expected, rtol=1e-12
    )
    for of, score in zip(sums, expected, strict=True):
        assert scores.bleu_from_counts(of) == pytest.approx(score, rel=1e-12)


def test_bleu_from_random_counts():
    """Breaks on counts that random texts seldom give: any order may be without a match, or lengths
    far apart.
    """
    rng = np.random.default_rng(3)
    for _ in range(300):
        total = np.sort(rng.integers(0, 9, size=4))[::-1]
        correct = [int(rng.integers(t + 1)) * int(rng.integers(2)) for t in total]
        lengths = [int(total[0]), int(rng.integers(1, 30))]
        expected = sacrebleu.BLEU.compute_bleu(
            list(correct), total.tolist(), *lengths, smooth_method="exp"
        ).score
        assert scores.bleu_from_counts([*correct, *total, *lengths]) == pytest.approx(
            expected, rel=1e-12
        )
    with pytest.raises(ValueError, match="last axis"):
        scores.bleu_from_counts(np.zeros((10, 3)))


def test_a_text_against_itself_scores_100():
    """Breaks when a score is not in percent or misses its greatest value."""
    text = "Anna was born in Paris, in 1931. It's well-known!"
    ids = [3, 1, 2]
    assert (
        scores.bleu([text], [text])
        == pytest.approx(100)
        == scores.sentence_bleu(scores.bleu_counts(text, text))
    )
    assert scores.bleu_from_counts(scores.bleu_counts(text, text)) == pytest.approx(100)
    assert (
        scores.exact_match([text], [text])
        == scores.squad_em(text, [text])
        == scores.squad_f1(text, [text])
        == 100
    )
    assert (
        set(scores.rouge(text, [text]).values()) == {100} and scores.prefix_match(ids, ids) == 100
    )
