"""Estimates against values worked out by hand, and intervals against what they promise."""

import math

import numpy as np
import pytest
import sacrebleu

from icae_jax.evaluation import scores, statistics


def counted(values):
    """[n] values as vectors [n, 2] of (value, 1), whose `ratio` is the mean."""
    return np.stack([values, np.ones(len(values))], -1)


def test_resampling_draws_whole_clusters():
    """Breaks when examples on one context are drawn apart, or when a replicate draws more or fewer
    clusters than there are.
    """
    weights = statistics.resample(["b", "a", "b", "c", "b"], seed=0, replicates=50)
    assert weights.shape == (50, 5) and weights.dtype == np.uint8
    assert (weights[:, 0] == weights[:, 2]).all() and (weights[:, 0] == weights[:, 4]).all()
    assert (weights[:, [0, 1, 3]].sum(1) == 3).all()
    assert len(np.unique(weights, axis=0)) > 5  # it draws
    assert weights.astype(float).mean() == pytest.approx(1, abs=0.2)


def test_same_seed_same_weights_whatever_the_order():
    """Breaks when a rerun, or the same examples in another order, gives another interval."""
    rng = np.random.default_rng(1)
    clusters, values = rng.integers(20, size=60), rng.normal(size=60)
    weights = statistics.resample(clusters, 7)
    assert (weights == statistics.resample(clusters, 7)).all()
    assert (weights != statistics.resample(clusters, 8)).any() and (
        weights != statistics.resample(clusters, (7, 1))
    ).any()
    order = rng.permutation(60)
    assert (statistics.resample(clusters[order], 7) == weights[:, order]).all()
    one = statistics.estimate(counted(values), statistics.ratio, weights)
    other = statistics.estimate(counted(values[order]), statistics.ratio, weights[:, order])
    assert one == pytest.approx(other, rel=1e-9)


def test_aggregates():
    """Breaks when a mean or a perplexity is taken over examples where it should be over tokens."""
    assert statistics.ratio([[6, 3], [1, 4]]).tolist() == [2, 0.25] and np.isnan(
        statistics.ratio([0, 0])
    )
    nll = np.array([[4.0, 2], [1.0, 8]])  # nats, labelled tokens
    assert statistics.perplexity(nll.sum(0)) == pytest.approx(
        math.exp(0.5)
    )  # not the mean of exp(2) and exp(1/8)
    hypotheses, references = ["a b c d e", "x y z"], ["a b c d f", "x y"]
    counts = sum(scores.bleu_counts(h, r) for h, r in zip(hypotheses, references, strict=True))
    assert statistics.corpus_bleu(counts) == pytest.approx(
        sacrebleu.corpus_bleu(hypotheses, [references]).score
    )


def test_estimate_by_hand():
    """Breaks when the point is not the plain sum's, or when the interval is not the percentiles of
    the weighted sums.
    """
    weights = np.array([[0, 2], [1, 1], [2, 0], [1, 1], [1, 1]], np.uint8)
    got = statistics.estimate([[10, 1], [40, 2]], statistics.ratio, weights)
    # replicates: 20, 50/3, 10, 50/3, 50/3; percentiles between neighbours of the sorted: 10, 50/3,
    # 50/3, 50/3, 20
    assert got == pytest.approx((50 / 3, 10 + 0.1 * (50 / 3 - 10), 20 - 0.1 * (20 - 50 / 3), 2))
    assert isinstance(got, statistics.Estimate) and isinstance(got.mean, float)


def test_chunks_of_replicates_add_up():
    """Breaks when replicates are lost or mixed at the borders of chunks."""
    rng = np.random.default_rng(2)
    vectors, weights = rng.normal(1, 1, (30, 2)), statistics.resample(range(30), 0, replicates=131)
    low, high = np.quantile(statistics.ratio(weights.astype(float) @ vectors), (0.025, 0.975))
    got = statistics.estimate(vectors, statistics.ratio, weights)
    assert (got.low, got.high) == pytest.approx((low, high))


def test_corpus_bleu_estimate():
    """Breaks when BLEU is averaged over texts instead of made of summed counts."""
    hypotheses = ["a b c d e f", "a b c x e f", "b c d", "q"]
    references = ["a b c d e f", "a b c d e f", "a b c d", "a b c d e"]
    counts = np.stack(
        [scores.bleu_counts(h, r) for h, r in zip(hypotheses, references, strict=True)]
    )
    got = statistics.estimate(counts, statistics.corpus_bleu, statistics.resample(range(4), 0))
    assert got.mean == pytest.approx(sacrebleu.corpus_bleu(hypotheses, [references]).score)
    assert 0 <= got.low < got.mean < got.high <= 100 + 1e-9


def test_intervals_cover_the_truth():
    """Breaks when intervals are too narrow or too wide: 95 % of them should hold the true mean,
    also with clustered examples.
    """
    rng, inside = np.random.default_rng(3), {"apart": 0, "clustered": 0}
    clusters = np.repeat(np.arange(40), 3)
    for case in range(300):
        values = {
            "apart": rng.exponential(size=60),
            "clustered": np.repeat(rng.normal(1, 1, 40), 3) + rng.normal(0, 0.3, 120),
        }
        for name, ids in (("apart", np.arange(60)), ("clustered", clusters)):
            weights = statistics.resample(ids, case, replicates=200)
            got = statistics.estimate(counted(values[name]), statistics.ratio, weights)
            inside[name] += got.low <= 1 <= got.high
    assert all(0.90 <= n / 300 <= 0.99 for n in inside.values()), inside


def test_copies_are_no_evidence():
    """Breaks when the same example, four times under one context, makes an interval narrower."""
    values = np.random.default_rng(4).normal(size=50)
    four = counted(np.repeat(values, 4))

    def width(vectors, clusters):
        got = statistics.estimate(vectors, statistics.ratio, statistics.resample(clusters, 0))
        return got.high - got.low

    once, clustered = (
        width(counted(values), np.arange(50)),
        width(four, np.repeat(np.arange(50), 4)),
    )
    assert clustered == pytest.approx(once) and width(four, np.arange(200)) < 0.7 * once


def test_constant_data_has_no_width():
    """Breaks when the interval holds anything but the data's own spread."""
    weights = statistics.resample(range(9), 0)
    assert statistics.estimate(counted([2.5] * 9), statistics.ratio, weights) == (2.5, 2.5, 2.5, 9)
    same = [[math.log(2) * n, n] for n in range(1, 10)]
    assert statistics.estimate(same, statistics.perplexity, weights) == pytest.approx((2, 2, 2, 9))


def test_difference_is_paired():
    """Breaks when the arms are resampled apart: a constant lead over noisy data is certain."""
    noise = np.random.default_rng(5).normal(0, 10, 40)
    weights = statistics.resample(range(40), 0)
    got = statistics.difference(counted(noise + 1), counted(noise), statistics.ratio, weights)
    assert got == pytest.approx((1, 1, 1, 40))
    with pytest.raises(ValueError, match="vectors_b"):
        statistics.difference([[1, 1]] * 40, [[1, 1]] * 39, statistics.ratio, weights)


def test_retention_by_hand():
    """Breaks when sets are weighed by their sizes, or ratios are taken example by example."""
    w1, w2, w3 = (
        np.array([[1, 1], [2, 0], [0, 2]]),
        np.array([[1, 1, 1], [1, 1, 1], [3, 0, 0]]),
        np.ones((3, 1)),
    )
    per_set = {
        "one": ([40, 20], [80, 40], w1),
        "two": ([90, 0, 0], [90, 60, 30], w2),
        "three": ([30], [40], w3),
    }
    got, left_out = statistics.retention(per_set)
    # one: 50 in every replicate; two: 90/180 = 50, 50, and 100 from its first example alone; three:
    # 75. Means: 175/3, 175/3, 75.
    assert (
        got == pytest.approx((175 / 3, 175 / 3, 175 / 3 + 0.95 * (75 - 175 / 3), 6))
        and left_out == []
    )
    got, left_out = statistics.retention(per_set | {"empty": ([5, 5], [0, 0], w1)})
    assert got.n == 6 and got.mean == pytest.approx(175 / 3) and left_out == ["empty"]


def test_retention_is_paired_within_a_set():
    """Breaks when both arms of a set do not share their resampled examples: half of whatever the
    full context scores is always 50 %.
    """
    full = np.random.default_rng(6).uniform(0, 100, 50)
    got, _ = statistics.retention({"a": (full / 2, full, statistics.resample(range(50), 0))})
    assert got == pytest.approx((50, 50, 50, 50))


def test_retention_refuses_what_has_no_ratio():
    """Breaks when a division by 0 or sets that do not fit together end as a number."""
    w = statistics.resample(range(2), 0, 10)
    with pytest.raises(ValueError, match=r"no set of \['a'\]"):
        statistics.retention({"a": ([1, 2], [0, 0], w)})
    with pytest.raises(ValueError, match="a: 1 scores against 2"):
        statistics.retention({"a": ([1], [1, 2], w)})
    with pytest.raises(ValueError, match="replicates"):
        statistics.retention({"a": ([1, 2], [1, 2], w), "b": ([1, 2], [1, 2], w[:5])})


def test_win_lose_tie():
    """Breaks when the order of the arms is swapped or ties are counted as wins."""
    assert statistics.win_lose_tie([1, 2, 3, 4], [0, 2, 4, 5]) == (25, 50, 25)
    with pytest.raises(ValueError, match="at least one"):
        statistics.win_lose_tie([], [])
    with pytest.raises(ValueError, match="finite"):
        statistics.win_lose_tie([math.nan], [1])


def test_bad_input_is_named():
    """Breaks when nothing, nan or shapes that differ end as a number."""
    with pytest.raises(ValueError, match="clusters is empty"):
        statistics.resample([], 0)
    with pytest.raises(ValueError, match="replicates is 0"):
        statistics.resample([1], 0, replicates=0)
    with pytest.raises(ValueError, match="one id for each"):
        statistics.resample([[1, 2]], 0)
    weights = statistics.resample(range(2), 0, 10)
    for vectors, message in (
        (np.zeros((0, 2)), "at least one example"),
        ([1.0, 2.0], "vectors has the shape"),
        ([[1, 1]] * 3, "weights has the shape"),
        ([[1, 1], [math.nan, 1]], r"vectors\[1\] is \[nan, 1.0\]"),
        ([[0, 0], [0, 0]], "no value"),
    ):
        with pytest.raises(ValueError, match=message):
            statistics.estimate(vectors, statistics.ratio, weights)


def test_replicates_without_a_value_are_left_out():
    """Breaks when one replicate that drew no labelled token spoils the interval."""
    weights = np.array([[2, 0], [1, 1], [1, 1]])
    assert statistics.estimate([[0, 0], [6, 3]], statistics.ratio, weights) == (2, 2, 2, 2)
