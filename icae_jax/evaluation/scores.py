"""Scores of generated text against the truth."""

import sacrebleu


def bleu(hypotheses, references):
    """Corpus BLEU-4 in percent, sacrebleu's defaults (13a tokens, exponential smoothing). One reference each."""
    _same_length(hypotheses, references)
    return sacrebleu.corpus_bleu(list(hypotheses), [list(references)]).score


def exact_match(hypotheses, references):
    """Share of texts, in percent, that equal their reference but for spaces at the ends."""
    _same_length(hypotheses, references)
    return 100 * sum(h.strip() == r.strip() for h, r in zip(hypotheses, references, strict=True)) / len(references)


def _same_length(hypotheses, references):
    if len(hypotheses) != len(references) or not references:
        raise ValueError(f"{len(hypotheses)} texts against {len(references)} references; give one each, and at least one")
