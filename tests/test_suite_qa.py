"""`qa`: the controls against transformers, the memory against the library's own questions and
scores.
"""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from suite_helpers import (
    InEights,
    arms_of_k,
    by_example,
    compressor,
    made,
    measured,
    near,
    question,
    reference_answer,
    reference_nats,
    same,
    text,
)

from icae_jax.errors import UserError
from icae_jax.evaluation import plain, run, statistics
from icae_jax.evaluation.examples import QUESTIONS_AT_ONCE, Example
from icae_jax.evaluation.suites import common
from icae_jax.evaluation.suites.common import (
    CASCADE,
    CUT,
    FULL,
    MEMORY,
    NONE,
    SHUFFLED,
    TUNED,
    Options,
)
from icae_jax.evaluation.suites.qa import EMPTY_QUESTION, Qa, retention
from icae_jax.evaluation.suites.tokens import Tokens

ALONE = Options(max_new_tokens=6, arms=(FULL, CUT, NONE))
TEXTS = [text(30, 1, [question(1), question(2, n=5)]), text(7, 2, [question(3, ["bread"])])]


@pytest.mark.parametrize("suite", [Qa, Tokens])
def test_questions_without_a_token(tiny_base, suite):
    """Breaks when padding is read where nothing stands behind the memory that could ask."""
    nothing = text(9, 4, [question(1), question(2, n=0)])
    _, left_out = made(
        suite(compressor(tiny_base, template="none"), Options()), text(9, 5, [question(3)]), nothing
    )
    assert left_out == {EMPTY_QUESTION: 1}
    examples, left_out = made(suite(compressor(tiny_base), Options()), nothing)
    assert len(examples) == 1 and not left_out, "a template with words of its own asks"


@pytest.fixture
def calls(monkeypatch):
    """What `plain.generate` was asked and gave: [(prompts, limits, results)]."""
    seen, generate = [], plain.generate

    def spy(compressor, prompts, limits, *rest):
        seen.append((prompts, limits, generate(compressor, prompts, limits, *rest)))
        return seen[-1][2]

    monkeypatch.setattr(plain, "generate", spy)
    return seen


# Ids of the tokenizer in conftest: <s> 1, </s> 2, [INST] 3, [/INST] 4, Question: 5, Answer: 6.
AROUND = {
    "plain": ([1], [5], [6], 2),
    "mistral": ([1, 3], [], [4], 2),
    "v1": ([1], [], [], 1),
    "none": ([1], [], [], 2),
}


NIGHTLY = pytest.mark.nightly


@pytest.mark.parametrize(
    ("template", "asked_in"),
    [
        ("plain", ""),
        pytest.param("mistral", "", marks=NIGHTLY),
        pytest.param("v1", "", marks=NIGHTLY),
        ("mistral", "plain"),
    ],
)
def test_the_controls_are_transformers_on_the_same_prompt(tiny_base, calls, template, asked_in):
    """Breaks when a control sees more or less than it should, a trained token, or another template;
    or its answer or loss is not the base's own. cut context: as many tokens as the memory has, 8 of
    the 30 and 4 of the 7.
    """
    one = compressor(tiny_base, template=template)
    examples, records = measured(
        Qa(one, dataclasses.replace(ALONE, plain_template=asked_in)), *TEXTS
    )
    assert [len(e.ids) for e in examples] == [7, 30]
    head, before, after, stop = AROUND[asked_in or template]
    parts = {
        FULL: lambda e: list(e.ids),
        CUT: lambda e: list(e.ids[: {7: 4, 30: 8}[len(e.ids)]]),
        NONE: lambda e: [],
    }
    every = [
        (e, q, r)
        for e, of in zip(examples, records, strict=True)
        for q, r in zip(e.questions, of, strict=True)
    ]
    assert len(calls) == 3 and len(every) == 3
    answers = set()
    for (arm, part), (prompts, limits, given) in zip(parts.items(), calls, strict=True):
        assert limits == [6] * 3
        for (e, q, record), prompt, got in zip(every, prompts, given, strict=True):
            assert prompt == [*head, *part(e), *before, *one.ids(q.text), *after]
            want = reference_answer(tiny_base, prompt, 6, {2, stop})
            assert got.ties == record["ties"][arm] == 0 and got.ids == want
            assert record["texts"][arm] == one.base.tokenizer.decode(want, skip_special_tokens=True)
            truth = [*one.ids(q.answers[0]), stop]
            near(
                record["sums"]["answer_loss"][arm],
                reference_nats(tiny_base, [*prompt, *truth], len(prompt)),
            )
            answers.add((arm, *want))
            assert record["texts"]["question"] == q.text and record["texts"]["answers"] == list(
                q.answers
            )
    assert len(answers) > 3


def test_without_context_the_context_changes_nothing(tiny_base):
    """Breaks when `no context` sees some of it."""
    others = [text(len(t.text.split()), 9, t.questions) for t in TEXTS]
    found = []
    for texts in (TEXTS, others):
        _, records = measured(Qa(compressor(tiny_base), ALONE), *texts)
        flat = [record for of_example in records for record in of_example]
        found.append(
            [
                (
                    arm,
                    [r["texts"][arm] for r in flat],
                    [r["sums"]["answer_loss"][arm] for r in flat],
                )
                for arm in (NONE, FULL)
            ]
        )
    assert found[0][0] == found[1][0] and found[0][1] != found[1][1]


@pytest.mark.parametrize(
    ("method", "template", "longest"), [("icae", "plain", 30), ("x500", "mistral", 14)]
)
def test_the_memory_is_asked_as_the_library_asks(tiny_base, method, template, longest):
    """Breaks when an arm reads another memory, another k, or another question; `shuffled memory` is
    the partner's, no longer than the text itself.
    """
    one, ks = compressor(tiny_base, method, template), arms_of_k(method)
    options = Options(k=tuple(ks.values()), max_new_tokens=5, arms=(*ks, SHUFFLED))
    examples, records = measured(
        Qa(one, options), *(text(n, n, [question(n)]) for n in (longest, 7, 12))
    )
    assert all(e.partner and e.partner != e.ids for e in examples)
    framed, partners = (
        [one.framed(e.ids) for e in examples],
        [one.framed(e.partner[: len(e.ids)]) for e in examples],
    )
    memories = {arm: one.compress_ids(framed, k=k) for arm, k in ks.items()} | {
        SHUFFLED: one.compress_ids(partners)
    }
    every = [
        (i, q, r)
        for i, of in enumerate(records)
        for q, r in zip(examples[i].questions, of, strict=True)
    ]
    for arm, memory in memories.items():
        answers = [
            got
            for of in one.ask(
                memory, [[q.text for q in e.questions] for e in examples], 5, details=True
            )
            for got in of
        ]
        losses = one.score(
            memory[[i for i, _, _ in every]],
            [q.answers[0] for _, q, _ in every],
            [q.text for _, q, _ in every],
        )
        for (_, _, r), got, loss in zip(every, answers, losses, strict=True):
            assert got.ties or r["ties"][arm] or r["texts"][arm] == got.text
            near(r["sums"]["answer_loss"][arm], loss)
    for _, _, r in every:
        assert set(r["sums"]["f1"]) == set(memories) and len(
            {nats for nats, _ in r["sums"]["answer_loss"].values()}
        ) == len(memories)


def test_many_questions_are_split_and_change_nothing(tiny_base):
    """Breaks when a question beyond the first eight of a text is lost, or answered by its place."""
    count = QUESTIONS_AT_ONCE + 2
    questions = [question(i, n=2 + i % 4) for i in range(count)]
    suite = Qa(compressor(tiny_base), Options(k=(4,), max_new_tokens=4, arms=(MEMORY,)))
    examples, records = measured(suite, text(14, 1, questions))
    assert [len(e.questions) for e in examples] == [2, 8] and len({e.key for e in examples}) == 2
    assert {e.cluster for e in examples} == {examples[0].cluster} and examples[0].ids == examples[
        1
    ].ids
    found = {r["id"]: r for of in records for r in of}
    assert sorted(found) == sorted(q.id for q in questions)
    pairs, _ = made(
        suite,
        *[
            dataclasses.replace(text(14, 1, [q]), key=examples[0].cluster, id=q.id)
            for q in questions
        ],
    )
    alone = [dataclasses.replace(e, key=e.questions[0].id) for e in pairs]
    assert same({i: [r] for i, r in found.items()}, by_example(suite, alone, 5)) >= count


def test_every_reference_answer_counts_the_loss_is_the_firsts(tiny_base):
    """Breaks when only one reference is scored against, or the loss is another answer's."""
    one, options = compressor(tiny_base), Options(k=(4,), max_new_tokens=5, arms=(MEMORY, FULL))
    (context,) = [text(14, 3, [question(1, ["zebra"])])]
    _, [[first]] = measured(Qa(one, options), context)
    said = first["texts"][MEMORY]
    assert said and all(
        first["sums"][m][MEMORY] == [0, 1] for m in ("f1", "em", "rouge1", "rougeL")
    )
    short, long = "cat", "bread and milk and sea"
    sums = {}
    for answers in ((short, said, long), (long, said, short)):
        context = text(14, 3, [question(1, answers)])
        _, [[found]] = measured(Qa(one, options), context)
        assert (
            found["sums"]["f1"][MEMORY]
            == found["sums"]["em"][MEMORY]
            == found["sums"]["rouge1"][MEMORY]
            == [100, 1]
        )
        memory = one.compress(context.text)
        near(
            found["sums"]["answer_loss"][MEMORY],
            one.score(memory, [answers[0]], [context.questions[0].text])[0],
        )
        sums[answers] = found["sums"]["answer_loss"]
    assert [v[FULL][1] for v in sums.values()] == [2, 6]


@pytest.mark.slow
def test_answers_end_at_the_limit_and_where_positions_end(tiny_base, calls):
    """Breaks when a text that just fits is left out, one that does not is run, or an answer runs
    past the base's 256 positions.
    """
    one, asked = compressor(tiny_base), question(1, ["bread", "milk and bread"])
    # <s>, the text, Question:, three tokens, Answer:, then the longest reference of three tokens
    # and </s>
    most = 256 - 1 - 5 - 4
    suite = Qa(one, Options(k=(4,), max_new_tokens=10))
    examples, left_out = made(
        suite, text(most + 1, 1, [asked]), text(most, 2, [asked]), text(9, 3, [asked]), text(9, 4)
    )
    assert left_out == {
        "texts too long for the base's 256 positions": 1,
        "texts without a question": 1,
    }
    assert [len(e.ids) for e in examples] == [9, most]
    found = by_example(suite, examples)
    assert [limits for _, limits, _ in calls] == [[10, 4], [10, 10], [10, 10]]
    assert all(
        set(r["sums"]["f1"]) == {MEMORY, FULL, CUT, NONE, SHUFFLED}
        for of in found.values()
        for r in of
    )
    memory_only = Qa(one, Options(k=(4,), max_new_tokens=3, arms=(MEMORY, NONE)))
    examples, left_out = made(memory_only, text(most + 1, 1, [asked]))
    assert not left_out, "without the full context a longer text has room"
    (record,) = by_example(memory_only, examples)[examples[0].key]
    assert all(len(record["texts"][arm].split()) <= 3 for arm in (MEMORY, NONE))
    assert calls[-1][1] == [3]
    assert isinstance(memory_only.examples(text(5, content="  ", questions=[asked])), str)


def test_a_longer_plain_template_is_given_room(tiny_base):
    """Breaks when a text fits behind its memory in the adapter's template, but its cut context not
    in the longer plain one.
    """
    one, asked = compressor(tiny_base, template="none"), question(1, ["milk and bread"])
    options = Options(k=(4,), max_new_tokens=3, plain_template="plain", arms=(CUT,))
    for n in range(974, 979):
        suite = Qa(one, options)
        made_of = suite.examples(text(n, 1, [asked]))
        if isinstance(made_of, str):
            break
        suite.measure(made_of)
    assert n == 976, "62 segments leave no room for 10 tokens behind as many of the text"


def record(name, full, memory):
    return {
        **common.record(Example("", name, name, name[0], ())),
        "set": name[0],
        "sums": {"f1": {FULL: [full, 1.0], MEMORY: [memory, 1.0]}},
    }


def test_retention_is_the_mean_over_sets(tiny_base):
    """Breaks when sets weigh by their examples, the full context is compared with itself, or a set
    without a score gives a ratio.
    """
    records = [
        record("a1", 80, 40),
        record("a2", 20, 10),
        record("b1", 50, 50),
        record("c1", 0, 10),
    ]

    def weights(of, i):
        return statistics.resample([r["cluster"] for r in of], [0, i])

    found, without = retention(records, weights)
    assert (
        list(found) == [MEMORY]
        and found[MEMORY].mean == pytest.approx((50 + 100) / 2)
        and found[MEMORY].n == 3
        and without == ["c"]
    )
    assert retention(records[3:], weights) == ({}, ["c"])
    assert retention([{**r, "sums": {"f1": {MEMORY: [1.0, 1.0]}}} for r in records], weights) == (
        {},
        [],
    )


def test_sizes_and_the_cascade(tiny_base):
    """Breaks when an arm's size is another arm's, the cascade answers otherwise than the library's,
    or what it read is not what it counts.
    """
    one = compressor(tiny_base)
    arms = (MEMORY, "memory k=2", NONE, CASCADE)
    threshold = median_likelihood(one)
    options = Options(max_new_tokens=5, arms=arms, ladder=(2, 4), threshold=threshold)
    suite = Qa(one, options)
    examples, records = measured(suite, *TEXTS)
    rungs = one.compress_ids_ladder([one.framed(e.ids) for e in examples], (2, 4))
    asked = [[q.text for q in e.questions] for e in examples]
    answers = one.ask(rungs, asked, 5, details=True, threshold=threshold)
    bytes_per_token = 4 * one.base.config.hidden_size
    for e, of, row in zip(examples, records, answers, strict=True):
        segments = -(-(len(e.ids) + 1) // 16)
        for record, answer in zip(of, row, strict=True):
            read = {MEMORY: 4 * segments, "memory k=2": 2 * segments, CASCADE: answer.tokens_read}
            assert record["sizes"] == {
                **{arm: [n, n * bytes_per_token] for arm, n in read.items()},
                NONE: [0, None],
            }
            assert record["texts"][CASCADE] == answer.text or answer.ties
            assert record["sums"]["f1"].keys() == set(arms)
            assert CASCADE not in record["sums"]["answer_loss"]
    assert {g.k for row in answers for g in row} == {2, 4}
    flat = [record for of in records for record in of]
    sizes = run.summarise(suite, flat, 0)["sizes"]
    assert sizes[MEMORY] == {"tokens": 20 / 3, "bytes": 20 / 3 * bytes_per_token}
    assert sizes[NONE] == {"tokens": 0.0, "bytes": None}
    with pytest.raises(UserError, match="--arms cascade needs a ladder; give --ladder"):
        Qa(one, Options(arms=(CASCADE,)))
    with pytest.raises(UserError, match=r"--ladder is \(4, 2\)"):
        Qa(one, Options(ladder=(4, 2)))


def median_likelihood(one):
    """A threshold that some answers of k 2 reach."""
    memory = one.compress([t.text for t in TEXTS], k=2)
    questions = [[q.text for q in t.questions] for t in TEXTS]
    means = sorted(
        g.mean_log_prob for row in one.ask(memory, questions, 5, details=True) for g in row
    )
    return (means[0] + means[1]) / 2


def test_the_full_context_is_also_read_with_the_decoders_lora(tiny_base):
    """Breaks when the tuned arm is the base alone or the other way round, or exists for adapters
    without a LoRA of the decoder; merged into the base's own matrices it is a base alone again.
    """
    one = compressor(tiny_base, decoder_lora=True)
    options = Options(max_new_tokens=5, arms=(FULL, TUNED, CUT))
    _, records = measured(Qa(one, options), *TEXTS)
    layers = jax.tree.map(lambda w: w, one.base.params["layers"])
    for module, projections in one.trained["decoder_lora"]["layers"].items():
        for name, ab in projections.items():
            update = one.adapter.lora.scale * jnp.einsum("lir,lro->lio", ab["a"], ab["b"])
            layers[module][name]["kernel"] = layers[module][name]["kernel"] + update
    base = dataclasses.replace(one.base, params=one.base.params | {"layers": layers})
    merged = InEights(base, compressor(tiny_base).adapter, tiny_base)
    _, wanted = measured(Qa(merged, dataclasses.replace(options, arms=(FULL,))), *TEXTS)
    losses = set()
    for of, of_wanted in zip(records, wanted, strict=True):
        for got, want in zip(of, of_wanted, strict=True):
            assert got["texts"][TUNED] == want["texts"][FULL] or got["ties"][TUNED]
            near(got["sums"]["answer_loss"][TUNED], want["sums"]["answer_loss"][FULL], bound=1e-4)
            losses |= {numbers[0] for numbers in got["sums"]["answer_loss"].values()}
            assert got["sizes"] == {arm: [0, None] for arm in (FULL, TUNED, CUT)}
    assert len(losses) == 9
    with pytest.raises(UserError, match="decoder LoRA' is no arm of suite qa"):
        Qa(compressor(tiny_base), Options(arms=(TUNED,)))


def test_retention_against_the_tuned_full_context():
    """Breaks when the tuned arm is compared with the plain one in both, or a record that an earlier
    version left, without the arm, ends the summing up.
    """
    records = [record("a1", 80, 40), record("a2", 20, 10)]
    records[0]["sums"]["f1"][TUNED] = [50.0, 1.0]

    def weights(of, i):
        return statistics.resample([r["cluster"] for r in of], [0, i])

    assert retention(records, weights)[0][TUNED].mean == pytest.approx(100 * 50 / 80)
    tuned, _ = retention(records, weights, TUNED)
    assert tuned[MEMORY].mean == pytest.approx(80) and tuned[FULL].mean == pytest.approx(160)
