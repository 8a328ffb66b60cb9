"""launch/experiments/methods.py and its tables: equal arms, chosen rates, paired differences."""

import dataclasses
import importlib
import json
import sys

import numpy as np
import pytest
from conftest import ROOT

from icae_jax.data import synthetic
from icae_jax.workflows import quickstart


@pytest.fixture(scope="module")
def methods():
    """The script as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "launch" / "experiments")
        yield importlib.import_module("methods")


@pytest.fixture(scope="module")
def table(methods):
    """The script of the tables as a module."""
    return sys.modules["methods_table"]


def test_arms_differ_in_nothing_but_what_they_are_named_after(methods, tmp_path):
    """Breaks when an arm has other steps, data, or LoRA, or its name tells another mask."""
    settings = methods.Settings(tmp_path, (1, 3, 11), 2, 400, 8, 4, 64)
    kept = set()
    for arm in methods.ARMS:
        for share in methods.SHARES:
            config = methods.config_of(settings, arm, share, 1, "base")
            c = config.compression
            name, *words = arm.split("-")
            mask = {"x500": "causal", "sac": "all"}.get(name, "")
            mask = next((word for word in words if word in ("causal", "slots", "all")), mask)
            assert (c.method, c.encoder_mask) == (name, mask)
            assert c.layout == ("uniform" if c.spec.keeps == "kv" else "servable")
            assert (c.decoder_lora, config.sum_k) == ("lora" in words, "sum" in words)
            assert config.objectives.weights == {"qa": 1 - share} | ({"ae": 0.5} if share else {})
            same = {"method": "", "layout": "", "encoder_mask": "", "decoder_lora": False}
            alike = dataclasses.replace(
                config,
                compression=dataclasses.replace(c, **same, trigger=c.trigger),
                objectives=methods.ObjectivesConfig(lm=0.0, qa=1.0),
                sum_k=False,
            )
            kept.add(alike)
    assert len(kept) == 1


@pytest.fixture(scope="module")
def run(methods, tmp_path_factory):
    """A workdir with one run of 2 steps, its settings, and its trainer."""
    workdir = tmp_path_factory.mktemp("methods")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods, "TRAIN_PASSAGES", 8)
        patch.setattr(methods, "CHOICE_PASSAGES", 2)
        patch.setattr(methods, "BATCH", 8)
        settings = methods.Settings(workdir, (2,), 1, 2, 8, 4, 3)
        methods.prepare(settings)
        (workdir / "base.json").write_text("{}")  # the base alone is not measured
        base = quickstart.load_base(quickstart.SHIPPED_BASE)
        trainer = methods.Trainer(settings, base, "pooled-causal", 0.5)
        methods.run(settings, "pooled-causal", 0.5, 1, lambda arm, share: trainer)
    return workdir, settings, trainer


@pytest.mark.nightly
def test_a_run_leaves_scores_of_every_passage(methods, run, monkeypatch):
    """Breaks when a run has other questions than asked, or a finished one is trained again."""
    workdir, settings, _ = run
    record = json.loads((workdir / "runs" / "pooled-causal-ae0.5-seed1.json").read_text())
    at = record["by_k"]["2"]
    rows = synthetic.passages(methods.HELD_OUT_SEED, 3, 1)
    assert [sums[2] for sums in at["qa"]] == [len(row["questions"]) for row in rows]
    assert len(at["ae"]) == len(at["wrong_ae"]) == len(at["bleu"]) == 3 and at["tokens"] == 2
    assert at["bytes"] == 2 * 160 * 4 and at["ae"] != at["wrong_ae"]
    choice = json.loads((workdir / "runs" / "pooled-causal-ae0.5-rate.json").read_text())
    losses = {rate: loss for rate, loss in choice["losses"]}
    assert set(losses) == set(methods.RATES) and len({*losses.values()}) == len(losses)
    assert record["rate"] == choice["rate"] == min(losses, key=losses.get)
    assert record["training_flops"] > 2 * record["encoder_flops"]["2"] * settings.batch_size

    def fail(*_):
        raise AssertionError("trained again")

    methods.run(settings, "pooled-causal", 0.5, 1, fail)


@pytest.mark.nightly
def test_one_program_trains_at_every_rate(run):
    """Breaks when the rate does not reach the update: the first one of AdamW is in proportion."""
    import jax

    _, _, trainer = run
    start = trainer.task(1).init()
    moved = {}
    for rate in (1e-3, 1e-2):
        trained = trainer.train(1, rate, 1).trained
        moved[rate] = np.concatenate(
            [
                np.ravel(np.asarray(a) - np.asarray(b))
                for a, b in zip(jax.tree.leaves(trained), jax.tree.leaves(start), strict=True)
            ]
        )
    assert np.abs(moved[1e-3]).max() > 0
    np.testing.assert_allclose(moved[1e-2], 10 * moved[1e-3], rtol=0.02, atol=1e-5)


@pytest.mark.nightly
def test_other_settings_are_refused(methods, run):
    """Breaks when runs of other sizes are added to a table."""
    workdir, settings, _ = run
    before = sorted(workdir.rglob("*"))
    for change, flag in (({"steps": 3}, "--steps is 3"), ({"ks": (1, 2)}, r"--k is \[1, 2\]")):
        with pytest.raises(SystemExit, match=flag):
            methods.prepare(dataclasses.replace(settings, **change))
    assert sorted(workdir.rglob("*")) == before


def record(arm, share, seed, right, nats):
    """What a run leaves: of each passage, questions answered of 4, and nats of 10 tokens."""
    qa = [[100.0 * n, 100.0 * n, 4] for n in right]
    ae = [[value, 10] for value in nats]
    bleu = [[4, 3, 2, 1, 4, 3, 2, 1, 4, 4]] * len(right)
    at = {"qa": qa, "wrong_qa": qa, "ae": ae, "wrong_ae": ae, "bleu": bleu}
    return {
        "arm": arm,
        "share": share,
        "seed": seed,
        "rate": 0.01,
        "steps": 5,
        "seconds": 1.0,
        "training_flops": 1e12,
        "encoder_flops": {"2": 10**6},
        "by_k": {"2": at | {"tokens": 2.0, "bytes": 8.0}},
    }


def test_differences_are_of_the_same_passages_and_seeds(table):
    """Breaks when passages or seeds are not paired, or seeds count as new passages."""
    easy, hard = [4, 3, 2, 4], [3, 2, 1, 3]  # always one question less
    records = [
        record("sac", 0.0, 0, easy, [1, 2, 3, 4]),
        record("sac", 0.0, 1, [n - 1 for n in easy], [2, 3, 4, 5]),
        record("sac", 0.0, 2, [0, 0, 0, 0], [9, 9, 9, 9]),  # a seed that the other has not
        record("x500", 0.0, 1, [n - 1 for n in hard], [4, 5, 6, 7]),
        record("x500", 0.0, 0, hard, [3, 4, 5, 6]),
    ]
    results = table.Results(records)
    one, other = ("sac", 0.0), ("x500", 0.0)
    assert [pair[1:] for pair in results.pairs()] == [(one, other)]
    assert results.difference(one, other, 2, "qa")[:3] == pytest.approx((25, 25, 25))
    assert results.difference(one, other, 2, "ae")[:3] == pytest.approx((-0.2, -0.2, -0.2))
    assert results.differences_of_seeds(one, other, 2, "qa") == pytest.approx([25, 25])
    assert results.of_seeds(one, 2, "qa") == pytest.approx([81.25, 56.25, 0])
    twice = [record("sac", 0.0, seed, easy, [1, 2, 3, 4]) for seed in (0, 1)]
    once = table.Results(twice[:1]).estimate(one, 2, "qa")
    again = table.Results(twice).estimate(one, 2, "qa")
    assert once[:3] == again[:3] and once.low < once.mean < once.high
    result = table.summary(results)
    assert [(d["one"], d["other"]) for d in result["differences"]] == [(["sac", 0], ["x500", 0])]
    text = table.tables(result)
    assert "SAC against 500x" in text and "25.0 [25.0, 25.0]" in text


def test_as_published_needs_both_arms(table):
    """Breaks when SAC without AE is not compared with 500x with it, each at its own share."""
    records = [record("sac", 0.0, 0, [4, 4], [1, 1]), record("x500", 0.5, 0, [1, 1], [1, 1])]
    results = table.Results(records)
    assert results.pairs() == [table.AS_PUBLISHED]
    assert results.difference(*table.AS_PUBLISHED[1:], 2, "qa").mean == pytest.approx(75)
