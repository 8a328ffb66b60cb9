"""The controls without a memory, against transformers' own generation from the same prompt."""

import numpy as np
import pytest
from conftest import TINY, random_trained
from suite_helpers import BOUND, load_base, near, reference_answer, reference_nats

from icae_jax.compression.config import CompressionConfig
from icae_jax.errors import UserError
from icae_jax.evaluation import plain
from icae_jax.inference.compressor import Compressor
from icae_jax.interop.adapters import folder as adapters
from icae_jax.models.lora import LoraConfig
from icae_jax.objectives import targets

CONTEXTS = ["the cat sat on the mat .", "a big dog ate milk and bread in the old house"]
QUESTIONS = [["who sat ?", "where ?"], ["what did the dog eat ?"]]


def make(tiny_base, template):
    base = load_base(tiny_base)
    made = targets.make_template(template, base.tokenizer)
    trained = random_trained(TINY, 4)
    adapter = adapters.Adapter(
        CompressionConfig(k=4, rate=4),
        LoraConfig(4),
        made,
        trained,
        str(tiny_base),
        base.fingerprint,
    )
    return Compressor(base, adapter, tiny_base)


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_answers_equal_transformers(tiny_base, template):
    """Breaks when the prompt of a control is not the plain text prompt, or no context sees some of
    it.
    """
    compressor = make(tiny_base, template)
    tokenizer = compressor.base.tokenizer
    t = compressor.adapter.template
    answers, every = 0, []
    for contexts in (CONTEXTS, None):
        got = plain.answer(compressor, QUESTIONS, contexts, max_new_tokens=6)
        every.append(got)
        for i, row in enumerate(QUESTIONS):
            for j, question in enumerate(row):
                text = (
                    tokenizer(contexts[i], add_special_tokens=False)["input_ids"]
                    if contexts
                    else []
                )
                head = list(t.head) or [tokenizer.bos_token_id]
                asked = [
                    *t.before,
                    *tokenizer(question, add_special_tokens=False)["input_ids"],
                    *t.after,
                ]
                new = reference_answer(
                    tiny_base, [*head, *text, *asked], 6, {tokenizer.eos_token_id}
                )
                assert got[i][j] == tokenizer.decode(new, skip_special_tokens=True)
                answers += 1
    assert answers == 6 and every[0] != every[1]


def test_trained_tokens_are_left_out_of_the_prompt(tiny_base):
    """Breaks when a trained token, which the base alone knows nothing of, gets into a prompt; or a
    token of text is dropped with it.
    """
    for name, head, before, after, stop in (
        ("mistral", (1, 3), (), (4,), 2),
        ("v1", (), (), (), 1),
        ("plain", (), (5,), (6,), 2),
    ):
        compressor = make(tiny_base, name)
        got = plain.template_of(compressor)
        assert (got.name, got.head, got.before, got.after, got.stop) == (
            name,
            head,
            before,
            after,
            stop,
        )
        assert (
            plain.template_of(compressor, "") == got
            and plain.template_of(make(tiny_base, "none"), name) == got
        )
    mistral = plain.template_of(make(tiny_base, "mistral"))
    for template, prompt in ((mistral, [1, 3, 10, 11, 12, 4]), (got, [1, 10, 11, 5, 12, 6])):
        assert plain.prompt(compressor.base, template, [10, 11], [12]) == prompt
    assert plain.answer(make(tiny_base, "mistral"), QUESTIONS, CONTEXTS, 3)[0]


def test_limits_are_each_prompts_own(tiny_base):
    """Breaks when a neighbour's limit, length or batch reaches an answer, a stop of its own does
    not end it, or a row is lost.
    """
    compressor = make(tiny_base, "plain")
    prompts = [[1, *range(8, 8 + n)] for n in (3, 30, 9, 17, 4)]
    limits = [6, 2, 9, 1, 4]
    whole = plain.generate(compressor, prompts, limits)
    assert not any(g.ties for g in whole)
    for prompt, limit, got in zip(prompts, limits, whole, strict=True):
        want = reference_answer(tiny_base, prompt, limit, {2})
        assert got.ids == want and len(got.ids) <= limit and got.stopped == (len(got.ids) < limit)
    again = plain.generate(compressor, prompts, limits, batch_size=2)
    assert [len(g.ids) for g in whole].count(6) and [g.ids for g in again] == [g.ids for g in whole]
    np.testing.assert_allclose([g.log_prob for g in again], [g.log_prob for g in whole], rtol=1e-5)
    third = whole[0].ids[2]
    assert third not in whole[0].ids[:2]
    (stopped,) = plain.generate(compressor, prompts[:1], limits[:1], stop=third)
    assert stopped.ids == whole[0].ids[:2] and stopped.stopped


def test_scores_equal_transformers(tiny_base):
    """Breaks when a label is shifted, padding is seen or counted, or the batch changes a score."""
    compressor = make(tiny_base, "plain")
    rng = np.random.default_rng(0)
    rows = [
        targets.Target([1, *rng.integers(3, 64, n).tolist()], first)
        for n, first in ((5, 1), (70, 40), (20, 21 - 1), (40, 2), (9, 3))
    ]
    whole = plain.score(compressor, rows)
    for row, got in zip(rows, whole, strict=True):
        near((-got.log_prob, got.tokens), reference_nats(tiny_base, row.ids, row.label_start))
    for got, want in zip(plain.score(compressor, rows, batch_size=2), whole, strict=True):
        near((-got.log_prob, got.tokens), want, bound=BOUND)


def test_an_empty_prompt_is_refused(tiny_base):
    """Breaks when padding is read in the place of a prompt that has no token."""
    compressor = make(tiny_base, "plain")
    with pytest.raises(UserError, match="a prompt without a memory has no tokens"):
        plain.generate(compressor, [[1, 8], []], [3, 3])
    with pytest.raises(ValueError, match="a target's first token is a label"):
        plain.score(compressor, [targets.Target([8, 9], 0)])
    assert plain.generate(compressor, [], []) == plain.score(compressor, []) == []


def test_positions_end(tiny_base):
    """Breaks when the base is run past its 256 positions, or a prompt that just fits is refused."""
    compressor = make(tiny_base, "plain")
    with pytest.raises(
        ValueError, match="257 tokens without a memory exceed the base's 256 positions"
    ):
        plain.generate(compressor, [[1, 8], [1] * 250], [3, 7])
    assert len(plain.generate(compressor, [[1, 8], [1] * 250], [3, 6])) == 2
    with pytest.raises(ValueError, match="257 tokens without a memory"):
        plain.score(compressor, [targets.Target([8] * 258, 1)])
    assert plain.score(compressor, [targets.Target([8] * 257, 1)])[0].tokens == 256
