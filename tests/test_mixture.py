"""Mixtures of sources: their shares, and batches as a function of (seed, step)."""

import collections
import dataclasses

import numpy as np
import pytest
from batch_helpers import EOS, SHARES, context, finetune, pretrain, target

from icae_jax.data.drawing import example_at
from icae_jax.data.examples import Examples
from icae_jax.data.mixture import Mixture, interleave
from icae_jax.data.prefetch import train_batches


@pytest.mark.parametrize(
    "shares",
    [(1,), (3, 1), (1, 3), (1, 0, 1), (50, 30, 20), (1, 1, 1, 1, 1), (997, 2, 1), (0, 7, 31, 11)],
)
def test_interleaving_is_exact_over_any_stretch(shares):
    """Breaks when a source's share is off in some stretch, one of its positions is skipped or
    doubled, or a share of 0 is drawn.
    """
    row = [interleave(i, shares) for i in range(3000)]
    for number, share in enumerate(shares):
        assert [before for chosen, before in row if chosen == number] == list(
            range(sum(chosen == number for chosen, _ in row))
        )
        surplus = np.cumsum([0, *(chosen == number for chosen, _ in row)]) - np.arange(
            3001
        ) * share / sum(shares)
        assert surplus.max() - surplus.min() < 2
    far = 10**12
    of_first = sum(interleave(far + i, shares)[0] == 0 for i in range(sum(shares)))
    assert abs(of_first - shares[0]) <= 1


def tagged(examples, number):
    """The same examples with ids that tell the source."""
    text_ids = examples.tokens.text_ids + 100_000 * (number + 1)
    tokens = dataclasses.replace(examples.tokens, text_ids=text_ids, key=f"key{number}")
    return Examples(tokens, examples.spec)


def sources_of(batch):
    """The source of each row of a batch, from its text."""
    return [context(batch, b)[-1] // 100_000 - 1 for b in range(len(batch["context"]))]


def mixed(weights, made):
    return Mixture(
        {
            n: (tagged(examples, n), float(w))
            for n, (examples, w) in enumerate(zip(made, weights, strict=True))
        }
    )


def drawn(mixture, steps, size=8):
    return collections.Counter(
        s
        for batch in train_batches(mixture, 5, size, range(steps), (5,))
        for s in sources_of(batch)
    )


def test_sources_are_drawn_by_their_weights():
    """Breaks when large sources crowd out small ones, epochs skip examples, or context_weights are
    ignored.
    """
    config = {"context_lengths": (16, 40), "context_weights": (1.0, 3.0), "objectives": ("ae",)}
    mixture = mixed((3, 1), [pretrain([30] * 5, **config), pretrain([70] * 90, **config)])
    assert mixture.weights.tolist() == [0.25, 0.75] and drawn(mixture, 20) == {0: 120, 1: 40}
    one = mixed((1, 1, 2), [pretrain([9] * n, ("ae",), context_lengths=(16,)) for n in (4, 5, 7)])
    rows = np.concatenate([one.draw(5, step, 8)[1] for step in range(8)])
    for source, count in enumerate((4, 5, 7)):
        of_source = rows[rows[:, 0] == source, 1]
        assert sorted(of_source[:count]) == list(range(count)) and sorted(
            of_source[count : 2 * count]
        ) == list(range(count))


def test_fine_tuning_keeps_the_weights_over_buckets():
    """Breaks when the length or number of a source's contexts changes how often it is drawn."""
    asked = [[(1, 1)]]
    made = [
        finetune([9] * 30 + [30] * 10, asked * 40, context_lengths=(10, 31, 50)),
        finetune([30] * 3 + [45], asked * 4, context_lengths=(10, 31, 50)),
    ]
    mixture = mixed((2, 1), made)
    np.testing.assert_allclose(mixture.weights, [2 / 3 * 3 / 4, 2 / 3 / 4 + 1 / 4, 1 / 3 / 4])
    count = drawn(mixture, 1200)
    assert abs(count[0] / (8 * 1200) - 2 / 3) < 0.02
    longest = [
        b
        for b in train_batches(mixture, 5, 8, range(300), (5,))
        if b["context"].shape[1:] == made[0].buckets[2].shape
    ]
    assert longest and all(set(sources_of(b)) == {1} for b in longest), (
        "the first source has no context of this length"
    )


def test_a_mixture_is_a_function_of_seed_and_step():
    """Breaks when a resumed run or another process sees other batches, or sources of equal size
    share an order.
    """
    config = {"context_lengths": (16, 32), "objectives": ("ae", "lm")}
    mixture = mixed((1, 2), [pretrain([70] * 9, **config), pretrain([70] * 9, **config)])

    def contexts(start, *rows):
        return [
            batch["context"] for batch in train_batches(mixture, 5, 4, range(start, 8), (5,), *rows)
        ]

    every, shares, later = (
        contexts(0),
        [contexts(0, np.asarray(rows)) for rows in SHARES],
        contexts(5),
    )
    for step, (whole, *parts) in enumerate(zip(every, *shares, strict=True)):
        np.testing.assert_array_equal(whole[np.concatenate(SHARES)], np.concatenate(parts))
        if step >= 5:
            np.testing.assert_array_equal(whole, later[step - 5])
    assert any(
        mixture.draw(6, s, 4)[1].tolist() != mixture.draw(5, s, 4)[1].tolist() for s in range(8)
    )
    assert [example_at(5, 0, i, 9, 0) for i in range(9)] != [
        example_at(5, 0, i, 9, 1) for i in range(9)
    ]


def test_questions_of_several_sources_have_one_shape():
    """Breaks when a batch of two sources cannot be packed, processes disagree on its shape, or a
    source's key or left-out counts are lost.
    """
    made = [
        finetune([9], [[(2, 1), (1, 3), (1, 90)]], context_lengths=(10,), max_target_tokens=20),
        finetune([9, 15], [[(6, 1)], [(1, 1)]], context_lengths=(10,)),
    ]
    shapes = [examples.qa_shape for examples in made]
    mixture = mixed((1, 1), made)
    assert (
        mixture.qa_shape == tuple(map(max, *shapes))
        and shapes[0] != shapes[1]
        and shapes[0] != mixture.qa_shape != shapes[1]
    )
    assert mixture.key == "key0,key1"
    assert mixture.dropped == {
        "questions longer than data.max_target_tokens": 1,
        "contexts longer than the largest of data.context_lengths": 1,
    }
    batch = mixture.collate(0, np.asarray([[1, 0], [0, 0]]))
    assert (
        sources_of(batch) == [1, 0]
        and target(batch, "qa", 0)[1] == [150, EOS]
        and target(batch, "qa", 1)[1] == [150, EOS]
    )
    assert target(batch, "qa", 1, 1) == ([3, 200, 4, 250, 251, 252], [250, 251, 252, EOS])
