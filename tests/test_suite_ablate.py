"""`ablate`: adapters side by side, each as its own suite measures it."""

import dataclasses

import pytest
from suite_helpers import compressor, made, measured, near, question, text

from icae_jax.evaluation import run
from icae_jax.evaluation.suites import ablate
from icae_jax.evaluation.suites.ablate import Ablate
from icae_jax.evaluation.suites.autoencode import Autoencode
from icae_jax.evaluation.suites.common import MEMORY, Options
from icae_jax.evaluation.suites.continuation import Continue
from icae_jax.evaluation.suites.qa import Qa

OPTIONS = Options(continuation_tokens=20, max_new_tokens=5, context_lengths=(12,))
TEXTS = [text(40, 1), text(14, 2, [question(1), question(2)]), text(20, 3)]


def both(path, other="icae"):
    return {"old": compressor(path), "new": compressor(path, other, seed=3)}


def test_every_adapter_as_its_own_suite_has_it(tiny_base):
    """Breaks when an arm is another adapter's, a text is measured for one alone, or a control's
    number gets in.
    """
    named = both(tiny_base)
    suite = Ablate(named, OPTIONS)
    examples, records = measured(suite, *TEXTS)
    of_kind = {}
    for e, of in zip(examples, records, strict=True):
        of_kind.setdefault(e.group["measured"], []).append((e, of))
    # The third text has no question, and 8 tokens behind 12 are too few to continue.
    assert {kind: len(of) for kind, of in of_kind.items()} == {
        "autoencode": 3,
        "qa": 1,
        "continue": 1,
    }
    for name, one in named.items():
        for kind in (Qa, Continue, Autoencode):
            alone = kind(one, dataclasses.replace(OPTIONS, arms=(MEMORY,)))
            examples, _ = made(alone, *TEXTS)
            own = {e.cluster: of for e, of in zip(examples, alone.measure(examples), strict=True)}
            for e, of in of_kind[kind.name]:
                want = own[e.cluster]
                assert len(of) == len(want) == (2 if kind is Qa else 1)
                for got, record in zip(of, want, strict=True):
                    assert got["id"] == record["id"] and got["group"] == {"measured": kind.name}
                    # Of restored texts ROUGE-L is left out, or it would be summed with that of
                    # answers.
                    left_out = {"rougeL"} if kind is Autoencode else set()
                    assert got["sums"].keys() == record["sums"].keys() - left_out
                    for metric, arms in (
                        (m, of_arms) for m, of_arms in record["sums"].items() if m not in left_out
                    ):
                        assert list(got["sums"][metric]) == ["old", "new"]
                        if metric in ("ae_loss", "perplexity", "answer_loss"):
                            near(got["sums"][metric][name], arms[MEMORY])
                        elif not (record["ties"][MEMORY] or got["ties"][name]):
                            assert got["sums"][metric][name] == arms[MEMORY]
                    assert MEMORY not in got["texts"] and (
                        kind is Continue or got["texts"][name] == record["texts"][MEMORY]
                    )
    flat = [r for of in records for r in of]
    for metric in ("ae_loss", "perplexity", "answer_loss"):
        old, new, rows = ablate.pairs(flat, metric)["old", "new"]
        assert len(rows) and all(a != b for a, b in zip(old, new, strict=True))
    result = run.summarise(suite, flat, 0)
    assert (
        result["scores"]["ae_loss"]["new"]["n"] == 3
        and result["pairs"]["ae_loss"]["old against new"]["difference"]["n"] == 3
    )
    assert list(result["groups"]["measured"]) == ["autoencode", "continue", "qa"]


def test_texts_that_adapters_would_cut_differently(tiny_base):
    """Breaks when adapters are compared on different tokens: one segment holds 15 tokens beside
    <s>, and 16 without it.
    """
    suite = Ablate(both(tiny_base, "x500"), Options(continuation_tokens=20))
    examples, left_out = made(suite, text(15, 1), text(16, 2), text(40, 3))
    assert [len(e.ids) for e in examples] == [15]
    assert left_out == {"texts that the adapters would cut differently (give --context_lengths)": 2}
    examples, left_out = made(
        Ablate(both(tiny_base, "x500"), OPTIONS), text(15, 1), text(16, 2), text(40, 3)
    )
    assert not left_out and sorted(e.group["measured"] for e in examples) == ["autoencode"] * 3 + [
        "continue"
    ]
    assert {len(e.ids) for e in examples} == {12}


def test_what_is_refused(tiny_base):
    with pytest.raises(ValueError, match="--adapter is given once; suite ablate compares several"):
        Ablate({"one": compressor(tiny_base)}, OPTIONS)
    with pytest.raises(
        ValueError, match=r"--arms is \('memory',\); the arms of suite ablate are its adapters"
    ):
        Ablate(both(tiny_base), Options(arms=("memory",)))


def test_pairs_and_what_is_better():
    """Breaks when a lower loss loses, or examples that one arm lacks are compared."""

    def record(**arms):
        return {"sums": {"ae_loss": arms}}

    records = [
        record(a=[2.0, 2], b=[6.0, 2], c=[1.0, 2]),
        record(a=[9.0, 3], b=[3.0, 3]),
        {"sums": {"f1": {"a": [50.0, 1.0]}}},
    ]
    found = ablate.pairs(records, "ae_loss")
    assert list(found) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert found["a", "b"] == ([[2.0, 2], [9.0, 3]], [[6.0, 2], [3.0, 3]], records[:2])
    assert found["a", "c"] == ([[2.0, 2]], [[1.0, 2]], records[:1])
    for metric in ("ae_loss", "perplexity", "answer_loss"):
        assert ablate.better(metric, [2.0, 2]) > ablate.better(metric, [6.0, 2])
    for metric in ("f1", "em", "rougeL", "exact_match", "prefix_match"):
        assert ablate.better(metric, [50.0, 1.0]) > ablate.better(metric, [20.0, 1.0])
    exact, none = ([n, n, n, n, 8, 7, 6, 5, 8, 8] for n in (5, 1))
    assert ablate.better("bleu", exact) > ablate.better("bleu", none)
