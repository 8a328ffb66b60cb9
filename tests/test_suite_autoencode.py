"""`autoencode`: a perfect restorer scores 100, losses are the library's, lengths are cut and
grouped.
"""

import pathlib

import pytest
from suite_helpers import (
    arms_of_k,
    by_example,
    compressor,
    made,
    measured,
    near,
    reference_nats,
    text,
)

import icae_jax
from icae_jax.data import synthetic
from icae_jax.evaluation import run, scores
from icae_jax.evaluation.suites.autoencode import TEXT_METRICS, Autoencode
from icae_jax.evaluation.suites.common import FULL, MEMORY, SHUFFLED, Options
from icae_jax.inference.compressor import Compressor
from icae_jax.inference.reading import Generation

TEXTS = [text(4, 1), text(15, 2), text(40, 3)]


@pytest.mark.parametrize("method", ["icae", pytest.param("x500", marks=pytest.mark.nightly)])
def test_losses_are_the_librarys(tiny_base, method):
    """Breaks when an arm has another k or memory, labels are not the text and its end, or the
    restored text is not `restore`'s.
    """
    one, ks = compressor(tiny_base, method), arms_of_k(method)
    examples, records = measured(Autoencode(one, Options(k=tuple(ks.values()))), *TEXTS)
    assert [len(e.ids) for e in examples] == [4, 15, 16 - len(one.framing.start)], (
        "a longer text is cut to one segment"
    )
    every = [one.base.tokenizer.decode(e.ids) for e in examples]
    memories = {arm: one.compress(every, k=k) for arm, k in ks.items()}
    memories[SHUFFLED] = one.compress_ids([one.framed(e.partner[: len(e.ids)]) for e in examples])
    restored = {arm: one.restore(memories[arm], details=True) for arm in ks}
    losses = {arm: one.score_restoring(memory, every) for arm, memory in memories.items()}
    for i, (e, [r], said) in enumerate(zip(examples, records, every, strict=True)):
        assert r["texts"]["original"] == said and r["group"] == {"tokens": "1-100"}
        for arm, of in restored.items():
            assert of[i].ties or r["ties"][arm] or of[i].text == r["texts"][arm]
            want = scores.bleu_counts(r["texts"][arm], said).tolist()
            assert r["sums"]["bleu"][arm] == want and r["sums"]["exact_match"][arm] == [0, 1]
        assert set(r["sums"]["ae_loss"]) == set(losses)
        for arm, of in losses.items():
            near(r["sums"]["ae_loss"][arm], of[i])
        assert len({round(v[0], 3) for v in r["sums"]["ae_loss"].values()}) == len(memories)
        assert (
            SHUFFLED not in r["sums"]["bleu"]
            and SHUFFLED not in r["texts"]
            and FULL not in r["sums"]["ae_loss"]
        )
        assert {n for _, n in r["sums"]["ae_loss"].values()} == {len(one.framed(e.ids)) + 1}


@pytest.mark.parametrize("method", ["icae", pytest.param("x500", marks=pytest.mark.nightly)])
def test_a_perfect_copy_scores_100(tiny_base, method, monkeypatch):
    """Breaks when the original is not what the restored text is held against: with <s> or without
    it, spaces, ids.
    """
    said = []

    def restore(self, memory, batch_size, details):
        ids = [*(self.framing.start if with_start else ()), *said]
        return [
            Generation(
                self.base.tokenizer.decode(ids, skip_special_tokens=True), ids[:stop], True, 0, 0.0
            )
        ]

    monkeypatch.setattr(Compressor, "restore", restore)
    one = compressor(tiny_base, method)
    suite = Autoencode(one, Options(k=(4,), arms=(MEMORY,)))
    for content in (TEXTS[1].text, "the  cat unheard-of sat . <unk> ."):
        context = text(15, 2, content=content)
        said[:] = one.ids(content)
        for with_start in (True, False):
            stop = None
            _, [[r]] = measured(suite, context)
            found = run.summarise(suite, [r], 0)["scores"]
            assert [found[metric][MEMORY]["mean"] for metric in TEXT_METRICS] == pytest.approx(
                [100] * 4
            )
            stop = len(one.framing.start) * with_start + 3
            _, [[r]] = measured(suite, context)
            assert r["sums"]["prefix_match"][MEMORY] == [100 * 3 / len(said), 1]


def test_the_shipped_base_copies_behind_its_token():
    """Breaks when the base alone is asked to copy in another way than it was trained to: it then
    restores nothing.
    """
    path = pathlib.Path(icae_jax.__file__).parent / "data" / "tiny_base"
    passages = [row["context"] for row in synthetic.passages(5, 4)]
    texts = [text(0, i, content=passage) for i, passage in enumerate(passages)]
    for method in ("icae", "x500"):
        one = compressor(path, method, k_choices=(4,), trigger_token="<repeat>")
        whole = Autoencode(
            one, Options(context_lengths=tuple({len(one.ids(p)) for p in passages}), arms=(FULL,))
        )
        examples, _ = made(whole, *texts)
        full = [
            e
            for e in examples
            if len(e.ids) == max(len(o.ids) for o in examples if o.cluster == e.cluster)
        ]
        records = [of[0] for of in by_example(whole, full).values()]
        found = run.summarise(whole, records, 0)["scores"]
        assert len(full) == 4 and [
            found[metric][FULL]["mean"] for metric in TEXT_METRICS
        ] == pytest.approx([100] * 4)
        assert found["ae_loss"][FULL]["mean"] < 0.05
        copy = one.base.tokenizer.convert_tokens_to_ids("<repeat>")
        for e, r in zip(full, records, strict=True):
            prompt = [1, *e.ids, copy, 1]
            nats, labels = reference_nats(path, [*prompt, *e.ids, 2], len(prompt))
            assert r["sums"]["ae_loss"][FULL] == [pytest.approx(nats, abs=0.01), labels]


def test_lengths_are_cut_and_grouped(tiny_base):
    """Breaks when a length is missing, a text is padded to one, or buckets of 100 begin at 100."""
    one = compressor(tiny_base)
    suite = Autoencode(one, Options(context_lengths=(16, 8, 33)))
    examples, left_out = made(suite, text(20, 1), text(33, 2), text(7, 3))
    assert sorted((e.id, len(e.ids), e.group["tokens"]) for e in examples) == [
        ("20-1", 8, "8"),
        ("20-1", 16, "16"),
        ("33-2", 8, "8"),
        ("33-2", 16, "16"),
        ("33-2", 33, "33"),
    ]
    assert left_out == {"texts shorter than the shortest of --context_lengths, 8 tokens": 1}
    ids = one.ids(text(33, 2).text)
    assert (
        all(list(e.ids) == ids[: len(e.ids)] for e in examples if e.id == "33-2")
        and len({e.key for e in examples}) == 5
    )
    wide = Autoencode(compressor(tiny_base, k_choices=(1,), method="x500"), Options())
    assert [e.group["tokens"] for n in (1, 16) for e in wide.examples(text(n, 1))] == ["1-100"] * 2
    wide.segment = 300
    assert [e.group["tokens"] for n in (100, 101, 200) for e in wide.examples(text(n, 1))] == [
        "1-100",
        "101-200",
        "101-200",
    ]
    assert suite.examples(text(0, content=" ")) == "texts without a token"
    with pytest.raises(ValueError, match="--arms 'full context' is no arm of suite autoencode"):
        Autoencode(one, Options(arms=(FULL,)))  # this base was never taught to copy


def test_room(tiny_base):
    """Breaks when a text whose restoring just fits behind its memory is left out, or one that does
    not is run.
    """
    one = compressor(tiny_base)
    fits = {}
    for n in range(190, 206):
        suite = Autoencode(one, Options(k=(4,), context_lengths=(n,), arms=(MEMORY,)))
        found = suite.examples(text(n, 1))
        # <s> and the text in segments of 16; then the trigger, <s>, the text and its end: `restore`
        # wants room for it
        memory = 4 * -(-(n + 1) // 16)
        fits[n] = isinstance(found, list)
        assert fits[n] == (memory + n + 3 <= 256)
    last = max(n for n in fits if fits[n])
    suite = Autoencode(one, Options(k=(4,), context_lengths=(last,), arms=(MEMORY,)))
    [[record]] = suite.measure(suite.examples(text(last, 1)))
    assert record["sums"]["ae_loss"][MEMORY][1] == last + 2
