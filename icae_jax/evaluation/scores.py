"""Scores of generated text against the truth, all in percent (0 to 100)."""

import collections
import functools
import re
import string
from collections.abc import Sequence
from typing import Any

import numpy as np
import sacrebleu
from jaxtyping import Float
from sacrebleu.metrics import BLEU

ROUGE = ("rouge1", "rouge2", "rougeL")
Ids = Sequence[int] | np.ndarray
_ORDERS = 4  # BLEU-4: n-grams of one to four words
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


# ----------------------------------------------------------------------------- whole lists of texts


def bleu(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU-4, sacrebleu's defaults (13a tokens, exponential smoothing), one reference."""
    _same_length(hypotheses, references)
    return sacrebleu.corpus_bleu(list(hypotheses), [list(references)]).score


def exact_match(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Share of texts that equal their reference but for spaces at the ends."""
    _same_length(hypotheses, references)
    pairs = zip(hypotheses, references, strict=True)
    return 100 * sum(h.strip() == r.strip() for h, r in pairs) / len(references)


# ----------------------------------------------------------------------------- answers to questions


def squad_f1(prediction: str, answers: Sequence[str]) -> float:
    """F1 of the words shared with a reference answer, the best over `answers` (SQuAD v1.1).

    Words are those of the lower-cased text without ASCII punctuation and the articles a, an, the,
    as multisets. An empty prediction against an empty answer scores 0, as in the v1.1 script
    (v2.0's gives 100). Source: Rajpurkar et al., arXiv 1606.05250, section 6.1; the F1 of
    500xCompressor's QA tables. ValueError where no answer is given.
    """
    words = _squad_words(prediction)
    return max(_overlap_f1(words, _squad_words(answer)) for answer in _checked(answers))


def squad_em(prediction: str, answers: Sequence[str]) -> float:
    """100 if the prediction equals one of `answers` after `squad_f1`'s normalisation, else 0.

    Two texts of which nothing is left, such as "" and "The.", are equal, as in the v1.1 script.
    """
    words = _squad_words(prediction)
    return 100.0 * any(words == _squad_words(answer) for answer in _checked(answers))


def rouge(prediction: str, answers: Sequence[str]) -> dict[str, float]:
    """F-measures "rouge1", "rouge2" and "rougeL", each the best over `answers`.

    By the rouge_score package without its stemmer. Its words are runs of a-z and 0-9 in lower
    case, so text in other scripts scores 0; rouge2 of one word is 0. ValueError where no answer
    is given.
    """
    best = _rouge_scorer().score_multi(_checked(answers), prediction)
    return {kind: 100 * best[kind].fmeasure for kind in ROUGE}


# ---------------------------------------------------------------------------------- restored texts


def prefix_match(predicted_ids: Ids, reference_ids: Ids) -> float:
    """Length of the matching prefix over that of the reference: ICAE's "EM".

    Source: arXiv 2307.06945, section 3. Tokens after a complete reference cost nothing.
    ValueError for an empty reference.
    """
    if len(reference_ids) == 0:
        raise ValueError(
            "reference_ids is empty; a prefix of nothing has no share, so leave such texts out"
        )
    same = 0
    for predicted, reference in zip(predicted_ids, reference_ids, strict=False):
        if predicted != reference:
            break
        same += 1
    return 100 * same / len(reference_ids)


def bleu_counts(hypothesis: str, reference: str) -> Float[np.ndarray, "10"]:
    """One text's share in corpus BLEU, to be summed over texts and given to `bleu_from_counts`.

    Matching n-grams (n = 1 to 4), n-grams of the hypothesis (n = 1 to 4), words of the
    hypothesis, words of the reference (13a tokens).
    """
    counts = _sentence(hypothesis, reference)
    return np.array([*counts.counts, *counts.totals, counts.sys_len, counts.ref_len], np.float64)


def sentence_bleu(counts: Sequence[float | int] | Float[np.ndarray, "10"]) -> float:
    """BLEU-4 of one text from its `bleu_counts`, as `sacrebleu.sentence_bleu`.

    With exponential smoothing and effective order: a text under four words is scored on the
    n-grams that it has. An empty text scores 0.
    """
    matches, totals = ([int(n) for n in part] for part in (counts[:_ORDERS], counts[_ORDERS:-2]))
    return BLEU.compute_bleu(
        matches, totals, int(counts[-2]), int(counts[-1]), smooth_method="exp", effective_order=True
    ).score


def bleu_from_counts(sums: Any) -> Float[np.ndarray, "..."] | np.float64:
    """Corpus BLEU-4 [...] from summed `bleu_counts` [..., 10]: equals `bleu` of the same texts.

    0 where no text has four words, or no word matches. ValueError if the last axis is not 10.
    """
    sums = np.asarray(sums, np.float64)
    if sums.shape[-1:] != (2 * _ORDERS + 2,):
        raise ValueError(
            f"sums has the shape {sums.shape}; its last axis must be the 10 numbers of bleu_counts"
        )
    matches, totals = sums[..., :_ORDERS], sums[..., _ORDERS:-2]
    length, reference_length = sums[..., -2], sums[..., -1]
    none = matches == 0
    # The first order without a match counts 1/2, the next 1/4, …
    smoothed = np.where(none, 0.5 ** np.cumsum(none, -1), matches)
    precision = smoothed / np.maximum(totals, 1)
    brevity = np.minimum(0, 1 - reference_length / np.maximum(length, 1))
    score = 100 * np.exp(brevity + np.log(precision).mean(-1))
    return np.where(none.all(-1) | (totals == 0).any(-1), 0.0, score)


# ----------------------------------------------------------------------------------------- helpers


def _squad_words(text: str) -> list[str]:
    # Punctuation goes before articles: "U.S.A." becomes "usa", not "us".
    # An article beside other scripts' punctuation still is one.
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def _overlap_f1(predicted: list[str], reference: list[str]) -> float:
    shared = (collections.Counter(predicted) & collections.Counter(reference)).total()
    return 200 * shared / (len(predicted) + len(reference)) if shared else 0.0


def _checked(answers: Sequence[str]) -> list[str]:
    if isinstance(answers, str) or not len(answers):
        raise ValueError(f"answers is {answers!r}; give a list of at least one reference text")
    return list(answers)


@functools.cache
def _rouge_scorer():
    from rouge_score import rouge_scorer  # imports nltk, which takes a second

    return rouge_scorer.RougeScorer(list(ROUGE), use_stemmer=False)


def _sentence(hypothesis: str, reference: str):
    return _sentence_metric().sentence_score(hypothesis, [reference])


@functools.cache
def _sentence_metric() -> BLEU:
    return BLEU(effective_order=True)


def _same_length(hypotheses, references) -> None:
    if len(hypotheses) != len(references) or not references:
        raise ValueError(
            f"{len(hypotheses)} texts against {len(references)} references; "
            "give one each, and at least one"
        )
