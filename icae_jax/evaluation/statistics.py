"""How sure a score is: means, perplexities and BLEU with 95 % intervals, from resampling the contexts (the bootstrap)."""

from typing import NamedTuple

import numpy as np

from icae_jax.evaluation import scores

REPLICATES = 1000
LEVELS = (0.025, 0.975)  # a 95 % interval
_CHUNK = 64  # replicates multiplied at a time: weights stay bytes but for these


class Estimate(NamedTuple):
    """A value with its 95 % interval (bootstrap percentiles), in the units of its aggregate, from n examples."""

    mean: float
    low: float
    high: float
    n: int


# ------------------------------------------------------------------------------------------------------------ resampling
def resample(clusters, seed, replicates=REPLICATES):
    """Bootstrap weights [replicates, n], uint8: how often each example was drawn in each replicate.

    clusters: [n], what each example stands or falls with, such as the id of its context: whole clusters are drawn with replacement, as many
    as there are, since questions on one context are no independent witnesses. seed: an integer, or a sequence of them; give every set of
    examples a seed of its own. The draws belong to the sorted ids, so that the order of the examples changes no interval (beyond
    rounding). Raises ValueError if there is no example or no replicate.
    """
    if len(clusters) == 0:
        raise ValueError("clusters is empty; a score needs at least one example")
    if replicates < 1:
        raise ValueError(f"replicates is {replicates}; it must be at least 1")
    _, member = np.unique(np.asarray(clusters), return_inverse=True)
    if member.shape != (len(clusters),):
        raise ValueError(f"clusters has the shape {member.shape}; give one id for each example")
    count = member.max() + 1
    rng = np.random.default_rng(seed)
    weights = np.empty(
        (replicates, len(member)), np.uint8
    )  # a cluster drawn over 255 times: odds of 1 in 10**500
    for replicate in weights:
        replicate[:] = np.bincount(rng.integers(count, size=count), minlength=count)[member]
    return weights


# ------------------------------------------------------------------------------------------ from summed vectors to a value
def ratio(sums):
    """First sum over the second [...], from sums [..., 2]: a mean, or nats per token from (nats, tokens). 0 / 0 is nan."""
    sums = np.asarray(sums, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return sums[..., 0] / sums[..., 1]


def perplexity(sums):
    """Token-weighted perplexity exp(nats / tokens) [...], from sums [..., 2] of negative log-likelihoods and of labelled tokens."""
    return np.exp(ratio(sums))


def corpus_bleu(sums):
    """Corpus BLEU-4 in percent [...], from sums [..., 10] of `scores.bleu_counts`."""
    return scores.bleu_from_counts(sums)


# -------------------------------------------------------------------------------------------------------------- estimates
def estimate(vectors, aggregate, weights):
    """The `Estimate` of aggregate(sum of the vectors).

    vectors: [n, d], one for each example. aggregate: a function of sums [..., d] -> values [...]: `ratio`, `perplexity`, `corpus_bleu`.
    weights: [replicates, n] of `resample`. Replicates without a value (nan: 0 tokens drawn) are left out of the interval. Raises ValueError
    if there is no example, if shapes differ, if a vector is not finite, or if the plain sum has no value.
    """
    return _estimate(
        *(aggregate(sums) for sums in _sums("vectors", vectors, weights)), len(vectors)
    )


def difference(vectors_a, vectors_b, aggregate, weights):
    """The `Estimate` of aggregate(sum of a) - aggregate(sum of b), paired: both arms on the same resampled examples.

    vectors_a, vectors_b: [n, d] of the same examples in the same order. An interval without 0 tells the arms apart. The rest: `estimate`.
    """
    a, b = _sums("vectors_a", vectors_a, weights), _sums("vectors_b", vectors_b, weights)
    return _estimate(
        *(aggregate(x) - aggregate(y) for x, y in zip(a, b, strict=True)), len(vectors_a)
    )


def retention(per_set):
    """What an arm keeps of the full context's score: the unweighted mean over sets of score(arm) / score(full context), in percent.

    per_set: `{set: (arm, full, weights)}`: [n] scores of the same examples under both arms, and that set's weights [replicates, n] of
    `resample` (by a seed of its own). Both arms share the resampled examples; each set is resampled by itself. A set whose full context
    scores 0 has no ratio and is left out. Returns (`Estimate`, whose n counts the examples of the sets that are in; names of the sets left
    out). Source: 500xCompressor, arXiv 2408.03094: "62.26-72.89 %" of the F1. Raises ValueError as `estimate` does, if replicates differ
    in number, and if no set is left.
    """
    points, spreads, left_out, n = [], [], [], 0
    for name, (arm, full, weights) in per_set.items():
        if len(arm) != len(full):
            raise ValueError(
                f"{name}: {len(arm)} scores against {len(full)} of the full context; give both for the same examples"
            )
        point, spread = (
            100 * ratio(sums) for sums in _sums(name, np.stack([arm, full], -1), weights)
        )
        if not np.any(full):
            left_out.append(name)
            continue
        points.append(point)
        spreads.append(
            np.where(np.isfinite(spread), spread, np.nan)
        )  # a draw in which the full context scores 0 has no share
        n += len(arm)
    if not points:
        raise ValueError(
            f"no set of {list(per_set)} has a full context that scores above 0; there is nothing to retain"
        )
    if len({len(spread) for spread in spreads}) > 1:
        raise ValueError(
            f"sets have {[len(spread) for spread in spreads]} replicates; resample all of them as often"
        )
    return _estimate(np.mean(points), np.mean(spreads, 0), n), left_out


def win_lose_tie(scores_a, scores_b):
    """(win, lose, tie) of a against b over the same examples, in percent; equal scores tie.

    Raises ValueError if lengths differ or are 0, or if a score is not finite.
    """
    a, b = np.asarray(scores_a, np.float64), np.asarray(scores_b, np.float64)
    if a.shape != b.shape or a.ndim != 1 or not a.size:
        raise ValueError(
            f"scores have the shapes {a.shape} and {b.shape}; give one of each arm for the same examples, and at least one"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError(
            "scores hold values that are not finite; leave out those examples in both arms"
        )
    return tuple(float(100 * np.mean(of)) for of in (a > b, a < b, a == b))


def _sums(name, vectors, weights):
    """(plain sum [d], resampled sums [replicates, d]) of checked vectors."""
    vectors = np.asarray(vectors, np.float64)
    if vectors.ndim != 2 or not len(vectors):
        raise ValueError(
            f"{name} has the shape {vectors.shape}; give [examples, numbers] of at least one example"
        )
    if np.ndim(weights) != 2 or not len(weights) or weights.shape[1] != len(vectors):
        raise ValueError(
            f"weights has the shape {np.shape(weights)} for {len(vectors)} examples in {name}; resample those examples"
        )
    bad = np.flatnonzero(~np.isfinite(vectors).all(-1))
    if bad.size:
        raise ValueError(
            f"{name}[{bad[0]}] is {vectors[bad[0]].tolist()}; every number must be finite ({bad.size} examples are not)"
        )
    chunks = [
        weights[at : at + _CHUNK].astype(np.float64) @ vectors
        for at in range(0, len(weights), _CHUNK)
    ]
    return vectors.sum(0), np.concatenate(chunks)


def _estimate(point, replicates, n):
    if np.isnan(point):
        raise ValueError(
            "the sums have no value (0 / 0); give examples of which at least one counts, such as one with a labelled token"
        )
    low, high = np.nanquantile(replicates, LEVELS)
    return Estimate(float(point), float(low), float(high), n)
