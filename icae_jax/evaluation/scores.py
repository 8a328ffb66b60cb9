"""Scores of generated text against the truth, all in percent (0 to 100)."""

import collections
import functools
import re
import string

import numpy as np
import sacrebleu
from sacrebleu.metrics import BLEU

ROUGE = ("rouge1", "rouge2", "rougeL")
_ORDERS = 4  # BLEU-4: n-grams of one to four words
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


# ------------------------------------------------------------------------------------------------ whole lists of texts
def bleu(hypotheses, references):
    """Corpus BLEU-4 in percent, sacrebleu's defaults (13a tokens, exponential smoothing). One reference each."""
    _same_length(hypotheses, references)
    return sacrebleu.corpus_bleu(list(hypotheses), [list(references)]).score


def exact_match(hypotheses, references):
    """Share of texts, in percent, that equal their reference but for spaces at the ends."""
    _same_length(hypotheses, references)
    return (
        100
        * sum(h.strip() == r.strip() for h, r in zip(hypotheses, references, strict=True))
        / len(references)
    )


# ------------------------------------------------------------------------------------------------- answers to questions
def squad_f1(prediction, answers):
    """F1 of the words shared with a reference answer, in percent: the best over `answers`, a list of texts (SQuAD v1.1's metric).

    Words are what is left of the text in lower case without ASCII punctuation and the articles a, an, the; one that stands twice on both
    sides is shared twice. No shared word is 0: so is an empty prediction against an empty answer, as in the v1.1 script (v2.0's gives
    100). Source: Rajpurkar et al., arXiv 1606.05250, section 6.1; the F1 of 500xCompressor's QA tables. Raises ValueError where no answer
    is given.
    """
    words = _squad_words(prediction)
    return max(_shared(words, _squad_words(answer)) for answer in _several(answers))


def squad_em(prediction, answers):
    """100 if the prediction equals one of `answers`, a list of texts, after `squad_f1`'s normalisation, and 0 if not.

    Two texts of which nothing is left, such as "" and "The.", are equal, as in the v1.1 script. Source and errors: as `squad_f1`.
    """
    words = _squad_words(prediction)
    return 100.0 * any(words == _squad_words(answer) for answer in _several(answers))


def rouge(prediction, answers):
    """`{"rouge1", "rouge2", "rougeL"}`: F-measures in percent, each the best over `answers`, a list of texts.

    The rouge_score package's, without its stemmer; its words are runs of a-z and 0-9 in lower case, so text in other scripts scores 0.
    rouge2 of a text of one word is 0. Raises ValueError where no answer is given.
    """
    best = _rouge_scorer().score_multi(_several(answers), prediction)
    return {kind: 100 * best[kind].fmeasure for kind in ROUGE}


# ---------------------------------------------------------------------------------------------------- restored texts
def prefix_match(predicted_ids, reference_ids):
    """Length of the exactly matching prefix over the length of the reference, in percent: ICAE's "EM" (arXiv 2307.06945, section 3).

    Both are sequences of token ids. What a prediction adds after a complete reference costs nothing. Raises ValueError for an empty
    reference.
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


def bleu_counts(hypothesis, reference):
    """What corpus BLEU is made of, for one text, to be summed over texts and given to `bleu_from_counts`.

    A float array [10]: n-grams that are right (n = 1 to 4), n-grams made (n = 1 to 4), words made, words of the reference (13a tokens).
    """
    result = _sentence(hypothesis, reference)
    return np.array([*result.counts, *result.totals, result.sys_len, result.ref_len], np.float64)


def sentence_bleu(counts):
    """BLEU-4 of one text in percent, from its `bleu_counts`, as `sacrebleu.sentence_bleu`: exponential smoothing, effective order.

    Effective order: a text under four words is scored on the n-grams that it has. An empty text scores 0.
    """
    right, made = ([int(n) for n in part] for part in (counts[:_ORDERS], counts[_ORDERS:-2]))
    return BLEU.compute_bleu(
        right, made, int(counts[-2]), int(counts[-1]), smooth_method="exp", effective_order=True
    ).score


def bleu_from_counts(sums):
    """Corpus BLEU-4 in percent [...] from summed `bleu_counts` [..., 10]: equal to `bleu` of the same texts.

    Where no text has four words, or no word is right, it is 0. Raises ValueError if the last axis is not 10.
    """
    sums = np.asarray(sums, np.float64)
    if sums.shape[-1:] != (2 * _ORDERS + 2,):
        raise ValueError(
            f"sums has the shape {sums.shape}; its last axis must be the 10 numbers of bleu_counts"
        )
    right, made, length, wanted = (
        sums[..., :_ORDERS],
        sums[..., _ORDERS:-2],
        sums[..., -2],
        sums[..., -1],
    )
    none = right == 0
    right_or_smoothed = np.where(
        none, 0.5 ** np.cumsum(none, -1), right
    )  # the first order without a match counts 1/2, the next 1/4, …
    precision = right_or_smoothed / np.maximum(made, 1)
    brevity = np.minimum(0, 1 - wanted / np.maximum(length, 1))
    score = 100 * np.exp(brevity + np.log(precision).mean(-1))
    return np.where(none.all(-1) | (made == 0).any(-1), 0.0, score)


# ------------------------------------------------------------------------------------------------------------- helpers
def _squad_words(text):
    # The order counts: "U.S.A." becomes "usa" before articles go, and an article next to other scripts' punctuation still is one.
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def _shared(predicted, reference):
    shared = (collections.Counter(predicted) & collections.Counter(reference)).total()
    return 200 * shared / (len(predicted) + len(reference)) if shared else 0.0


def _several(answers):
    if isinstance(answers, str) or not len(answers):
        raise ValueError(f"answers is {answers!r}; give a list of at least one reference text")
    return list(answers)


@functools.cache
def _rouge_scorer():
    from rouge_score import (
        rouge_scorer,  # it imports nltk, which takes a second, so only who asks for ROUGE pays for it
    )

    return rouge_scorer.RougeScorer(list(ROUGE), use_stemmer=False)


def _sentence(hypothesis, reference):
    return _sentence_metric().sentence_score(hypothesis, [reference])


@functools.cache
def _sentence_metric():
    return BLEU(effective_order=True)


def _same_length(hypotheses, references):
    if len(hypotheses) != len(references) or not references:
        raise ValueError(
            f"{len(hypotheses)} texts against {len(references)} references; give one each, and at least one"
        )
