"""`tokens`: memory tokens hidden one by one, and the first ones alone."""

import numpy as np
import pytest
from suite_helpers import by_example, compressor, made, measured, near, question, text

from icae_jax.evaluation.suites.common import MEMORY, Options
from icae_jax.evaluation.suites.tokens import Tokens
from icae_jax.objectives import targets

TEXTS = [text(14, 1, [question(1), question(2, ["bread"])]), text(9, 2), text(30, 3, [question(3)])]


@pytest.mark.parametrize(
    ("method", "layout"),
    [pytest.param("icae", "", marks=pytest.mark.nightly), ("x500", "reference")],
)
def test_a_hidden_token_is_one_that_is_not_there(tiny_base, method, layout):
    """Breaks when another token is hidden, the others move, or nothing is hidden at all: an arm is
    scored by hand, token j taken out of the arrays and all else left where it was.
    """
    one = compressor(tiny_base, method, layout=layout)
    suite = Tokens(one, Options())
    examples, records = measured(suite, *TEXTS)
    arms = {"memory": [0, 1, 2, 3]}
    arms |= {f"without token {j}": [i for i in range(4) if i != j] for j in range(4)} | {
        f"first {j}": [*range(j)] for j in (1, 2, 3)
    }
    assert [len(e.questions) for e in sorted(examples, key=lambda e: len(e.ids))] == [0, 2, 0], (
        "a text that is cut has no questions"
    )
    memory = one.compress_ids([one.framed(e.ids) for e in examples])
    restore = [[targets.ae_target(one.framed(e.ids), one.framing)] for e in examples]
    asked = [i for i, e in enumerate(examples) if e.questions]
    target = one.adapter.template.target
    answers = [
        [target(one.ids(q.text), one.ids(q.answers[0])) for q in examples[i].questions]
        for i in asked
    ]
    for arm, seen in arms.items():
        part = memory.replace(
            mask=memory.mask[:, seen], positions=memory.positions[:, seen],
            **{name: np.take(x, seen, memory.TEXT_AXIS + 1) for name, x in memory.contents.items()},
        )  # fmt: skip
        for [r], [loss] in zip(records, one.score_targets(part, restore, "ae"), strict=True):
            near(r["sums"]["ae_loss"][arm], loss)
        if len(seen) > 2:
            for i, found in zip(asked, one.score_targets(part[asked], answers, "qa"), strict=True):
                near(records[i][0]["sums"]["answer_loss"][arm], *found)
    for e, [r] in zip(examples, records, strict=True):
        assert list(r["sums"]["ae_loss"]) == list(arms) and ("answer_loss" in r["sums"]) == bool(
            e.questions
        )
        losses = [nats for nats, _ in r["sums"]["ae_loss"].values()]
        # Without the last token is the same as the first three.
        assert r["sums"]["ae_loss"]["without token 3"] == r["sums"]["ae_loss"]["first 3"]
        assert len({round(nats, 3) for nats in losses}) == len(arms) - 1, (
            "every other arm sees something else"
        )


@pytest.mark.parametrize("method", ["icae", pytest.param("x500", marks=pytest.mark.nightly)])
def test_one_token(tiny_base, method):
    """Breaks when a memory of one token, hidden, gives no number, or still tells something."""
    suite = Tokens(compressor(tiny_base, method, k_choices=(1,)), Options())
    examples, _ = made(suite, text(8, 1), text(8, 2))
    found = by_example(suite, examples)
    for [r] in found.values():
        assert (
            list(r["sums"]["ae_loss"]) == [MEMORY, "without token 0"]
            and np.isfinite(list(r["sums"]["ae_loss"].values())).all()
        )
        assert (
            abs(r["sums"]["ae_loss"][MEMORY][0] - r["sums"]["ae_loss"]["without token 0"][0]) > 1e-3
        )
    one = suite.compressor
    rows = [[targets.Target([targets.AE, 9, 10, 2], 1)]] * 2
    memory = one.compress_ids([one.framed(e.ids) for e in examples])
    hidden = memory.replace(mask=np.zeros_like(memory.mask))
    first, second = (row[0].log_prob for row in one.score_targets(hidden, rows, "ae"))
    assert first == second, "nothing of the text is left"


def test_many_tokens_and_options(tiny_base):
    """Breaks when a large k has an arm for every token, the first or last of them is left out, or
    an option is not minded.
    """
    one = compressor(tiny_base, k_choices=(100,))
    suite = Tokens(one, Options())
    assert (
        len(suite.hidden) == 32
        and suite.hidden[0] == 0
        and suite.hidden[-1] == 99
        and len(set(suite.hidden)) == 32
    )
    assert suite.kept == [j + 1 for j in suite.hidden[:-1]] and max(np.diff(suite.hidden)) <= 4
    small = Tokens(compressor(tiny_base), Options(k=(2,), context_lengths=(5,)))
    _, [[r]] = measured(small, text(9, 1))
    assert list(r["sums"]["ae_loss"]) == [MEMORY, "without token 0", "without token 1", "first 1"]
    assert r["sums"]["ae_loss"][MEMORY][1] == 5 + 2
    with pytest.raises(ValueError, match=r"--context_lengths is \(5, 9\); suite tokens takes one"):
        Tokens(compressor(tiny_base), Options(context_lengths=(5, 9)))
    with pytest.raises(ValueError, match=r"--arms is \('memory',\); the arms of suite tokens"):
        Tokens(compressor(tiny_base), Options(arms=("memory",)))
