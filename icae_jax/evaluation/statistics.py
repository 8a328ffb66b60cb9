"""How sure scores are: means, perplexities and BLEU with 95 % bootstrap intervals over contexts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from icae_jax.evaluation import scores

REPLICATES = 1000
LEVELS = (0.025, 0.975)  # a 95 % interval
_CHUNK = 64  # replicates multiplied at a time: weights stay bytes but for these

Weights = UInt8[np.ndarray, "replicates n"]
Values = Float[np.ndarray, "..."] | np.float64 | float


class Estimate(NamedTuple):
    """A value with its 95 % interval (bootstrap percentiles), in its aggregate's unit.

    n: the number of examples.
    """

    mean: float
    low: float
    high: float
    n: int


# -------------------------------------------------------------------------------------- resampling


def resample(clusters: Sequence | np.ndarray, seed: Any, replicates: int = REPLICATES) -> Weights:
    """Bootstrap weights: how often each example is drawn in each replicate.

    Whole clusters are drawn with replacement, as many as there are, since questions on one
    context are not independent. Draws belong to the sorted cluster ids, so the order of examples
    changes no interval (beyond rounding).

    Args:
      clusters: for each example, what it depends on, such as the id of its context.
      seed: an integer, or a sequence of them; give every set of examples its own.
      replicates: how many.

    Raises:
      ValueError: there is no example or no replicate.
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
    # Bytes: a cluster is drawn over 255 times with odds of 1 in 10**500.
    weights = np.empty((replicates, len(member)), np.uint8)
    for replicate in weights:
        replicate[:] = np.bincount(rng.integers(count, size=count), minlength=count)[member]
    return weights


# ---------------------------------------------------------------- from summed vectors to a value


def ratio(sums: Any) -> Values:
    """First sum over the second, from sums [..., 2]: a mean, or nats per token. 0 / 0 is nan."""
    sums = np.asarray(sums, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return sums[..., 0] / sums[..., 1]


def perplexity(sums: Any) -> Values:
    """Token-weighted perplexity exp(nats / tokens) from sums [..., 2] of nats and of labels."""
    return np.exp(ratio(sums))


def corpus_bleu(sums: Any) -> Values:
    """Corpus BLEU-4 in percent from sums [..., 10] of `scores.bleu_counts`."""
    return scores.bleu_from_counts(sums)


# --------------------------------------------------------------------------------------- estimates


def estimate(vectors: Any, aggregate: Callable, weights: Any) -> Estimate:
    """The estimate of aggregate(sum of the vectors).

    Replicates without a value (nan: 0 tokens drawn) are left out of the interval.

    Args:
      vectors: [n, d], one for each example.
      aggregate: maps sums [..., d] to values [...]: `ratio`, `perplexity`, `corpus_bleu`.
      weights: [replicates, n], from `resample`.

    Raises:
      ValueError: there is no example, shapes differ, a vector is not finite, or the plain sum has
        no value.
    """
    point, replicates = map(aggregate, _sums("vectors", vectors, weights))
    return _estimate(point, replicates, len(vectors))


def difference(vectors_a: Any, vectors_b: Any, aggregate: Callable, weights: Any) -> Estimate:
    """The estimate of aggregate(sum of a) - aggregate(sum of b), on the same resampled examples.

    Both are [n, d], of the same examples in the same order. An interval without 0 tells the arms
    apart. The rest: `estimate`.
    """
    a, b = _sums("vectors_a", vectors_a, weights), _sums("vectors_b", vectors_b, weights)
    point, replicates = (aggregate(x) - aggregate(y) for x, y in zip(a, b, strict=True))
    return _estimate(point, replicates, len(vectors_a))


def retention(per_set: Mapping[str, tuple]) -> tuple[Estimate, list[str]]:
    """How much of the full context's score an arm retains: the mean over sets of the ratios, in %.

    Each set has the same weight and is resampled by itself, both arms on the same examples. A set
    whose full context scores 0 has no ratio and is left out. Source: 500xCompressor,
    arXiv 2408.03094, "62.26-72.89 %" of the F1.

    Args:
      per_set: `{set: (arm, full, weights)}`: [n] scores of the same examples under both arms, and
        that set's weights from `resample` (with its own seed).

    Returns:
      The estimate, whose n counts the examples of the sets that are in, and the sets left out.

    Raises:
      ValueError: as `estimate`; or replicates differ in number, or no set is left.
    """
    points, spreads, left_out, n = [], [], [], 0
    for name, (arm, full, weights) in per_set.items():
        if len(arm) != len(full):
            raise ValueError(
                f"{name}: {len(arm)} scores against {len(full)} of the full context; "
                "give both for the same examples"
            )
        sums = _sums(name, np.stack([arm, full], -1), weights)
        point, spread = (100 * ratio(x) for x in sums)
        if not np.any(full):
            left_out.append(name)
            continue
        points.append(point)
        # A draw in which the full context scores 0 has no ratio.
        spreads.append(np.where(np.isfinite(spread), spread, np.nan))
        n += len(arm)
    if not points:
        raise ValueError(
            f"no set of {list(per_set)} has a full context that scores above 0; "
            "there is nothing to retain"
        )
    if len({len(spread) for spread in spreads}) > 1:
        raise ValueError(
            f"sets have {[len(spread) for spread in spreads]} replicates; "
            "resample all of them as often"
        )
    return _estimate(np.mean(points), np.mean(spreads, 0), n), left_out


def win_lose_tie(scores_a: Any, scores_b: Any) -> tuple[float, float, float]:
    """(win, lose, tie) of a against b over the same examples, in percent; equal scores tie.

    Raises ValueError if lengths differ or are 0, or if a score is not finite.
    """
    a, b = np.asarray(scores_a, np.float64), np.asarray(scores_b, np.float64)
    if a.shape != b.shape or a.ndim != 1 or not a.size:
        raise ValueError(
            f"scores have the shapes {a.shape} and {b.shape}; "
            "give one of each arm for the same examples, and at least one"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError(
            "scores hold values that are not finite; leave out those examples in both arms"
        )
    win, lose, tie = (float(100 * np.mean(outcome)) for outcome in (a > b, a < b, a == b))
    return win, lose, tie


def _sums(name: str, vectors, weights) -> tuple[np.ndarray, np.ndarray]:
    """(plain sum [d], resampled sums [replicates, d]) of checked vectors."""
    vectors = np.asarray(vectors, np.float64)
    if vectors.ndim != 2 or not len(vectors):
        raise ValueError(
            f"{name} has the shape {vectors.shape}; "
            "give [examples, numbers] of at least one example"
        )
    if np.ndim(weights) != 2 or not len(weights) or weights.shape[1] != len(vectors):
        raise ValueError(
            f"weights has the shape {np.shape(weights)} for {len(vectors)} examples in {name}; "
            "resample those examples"
        )
    bad = np.flatnonzero(~np.isfinite(vectors).all(-1))
    if bad.size:
        raise ValueError(
            f"{name}[{bad[0]}] is {vectors[bad[0]].tolist()}; "
            f"every number must be finite ({bad.size} examples are not)"
        )
    chunks = [
        weights[i : i + _CHUNK].astype(np.float64) @ vectors for i in range(0, len(weights), _CHUNK)
    ]
    return vectors.sum(0), np.concatenate(chunks)


def _estimate(point, replicates, n: int) -> Estimate:
    if np.isnan(point):
        raise ValueError(
            "the sums have no value (0 / 0); give examples of which at least one counts, "
            "such as one with a labelled token"
        )
    low, high = np.nanquantile(replicates, LEVELS)
    return Estimate(float(point), float(low), float(high), n)
