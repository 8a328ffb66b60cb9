"""The quickstart, cut to a few steps: every part runs, the page and the numbers are there, and the adapter answers."""

import json

import pytest

from icae_jax import cli, quickstart
from icae_jax.data import synthetic


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("quickstart") / "w"
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(quickstart, "TRAIN_PASSAGES", 200)
    assert cli.main(["quickstart", "--workdir", str(workdir), "--steps", "3", "--held_out", "6"]) == 0
    yield workdir
    monkeypatch.undo()


@pytest.mark.slow
def test_results_report_and_next_commands(ran, capsys):
    """Breaks when an arm is missing, bytes are not a memory's, the base cannot answer, or the printed next commands do not run."""
    results = json.loads((ran / "results.json").read_text())
    base = results["qa_exact_match"]
    assert base["full context"] >= 90 and base["no context"] <= 30
    assert results["questions"] == 6 * 8 and results["bits"] == synthetic.passage_bits()
    memories = results["memories"]
    assert [(m["method"], m["k"]) for m in memories] == [("icae", 11), ("x500", 11), ("icae", 2), ("x500", 2)]
    assert [m["bytes"] for m in memories] == [11 * 640, 11 * 5120, 2 * 640, 2 * 5120]  # D against 2 L K H, float32
    for m in memories:
        assert list(m["qa_exact_match"]) == ["memory", "wrong memory", "untrained memory"]
        assert m["steps"] == [3, 3] and m["memory_tokens"] == m["k"] and m["ratio"] > 40 / m["k"]
        assert m["qa_exact_match"]["memory"] < base["full context"]
        assert set(m["ae_loss"]) == {"memory", "wrong memory"} and set(m["bleu"]) == {"memory", "untrained memory"}
    assert len({m["ae_loss"]["memory"] for m in memories}) == 4, "four compressors were measured"

    page = (ran / "report.html").read_text()
    for part in ("QA exact match, full context", "untrained memory", "<svg", "<del>", "icae ask --memory", "BLEU-4", "500x, 2 tokens"):
        assert part in page

    adapter, memory = ran / "icae" / "finetune" / "adapter", ran / "memory.safetensors"
    assert cli.main(["compress", "--adapter", str(adapter), "--input", str(ran / "data" / "example.jsonl"), "--output", str(memory)]) == 0
    question = synthetic.passages(quickstart.HELD_OUT_SEED, 1)[0]["questions"][1]["question"]
    capsys.readouterr()
    assert cli.main(["ask", "--memory", str(memory), "--question", question, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["question"] == question
    assert cli.main(["restore", "--memory", str(memory)]) == 0 and capsys.readouterr().out.strip()


@pytest.mark.slow
def test_run_again_it_shows_the_result_without_training(ran, capsys):
    before = {p: p.read_bytes() for p in ran.glob("*/*/metrics.jsonl")}
    results = json.loads((ran / "results.json").read_text())
    assert len(before) == 4
    assert cli.main(["quickstart", "--workdir", str(ran), "--steps", "3", "--held_out", "6"]) == 0
    out = capsys.readouterr()
    assert "QA exact match" in out.out and out.err.count("done already") == 4
    assert {p: p.read_bytes() for p in ran.glob("*/*/metrics.jsonl")} == before
    assert json.loads((ran / "results.json").read_text()) == results


def test_bad_arguments(tmp_path, capsys):
    assert cli.main(["quickstart", "--workdir", str(tmp_path), "--steps", "0"]) == 2
    assert "--steps is 0" in capsys.readouterr().err
    assert cli.main(["quickstart", "--workdir", str(tmp_path), "--held_out", "-1"]) == 2


def test_configs_are_needed_and_said_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(quickstart, "CONFIGS", tmp_path / "absent")
    assert cli.main(["quickstart", "--workdir", str(tmp_path / "w")]) == 2
    assert "pip install -e ." in capsys.readouterr().err


@pytest.mark.slow
def test_from_scratch_trains_its_own_base_first(tmp_path, monkeypatch, capsys):
    """Breaks when the trained base is not the one that the compressor is then trained on."""
    whole = quickstart.get_config

    def small(name, arg=None):
        config = whole(name, arg)
        if name == "tiny_base":
            config["model"] |= {"hidden_size": 40, "intermediate_size": 48, "num_layers": 2}
            config |= {"steps": 2, "batch_size": 4, "eval_examples": 4, "unroll": 1, "mixture": ("0 questions=1",)}
        return config

    monkeypatch.setattr(quickstart, "get_config", small)
    monkeypatch.setattr(quickstart, "TRAIN_PASSAGES", 100)
    assert cli.main(["quickstart", "--workdir", str(tmp_path), "--from-scratch", "--steps", "2", "--held_out", "4"]) == 0
    encoder = tmp_path / "icae" / "finetune" / "adapter" / "encoder"
    named = json.loads((encoder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str((tmp_path / "base_training" / "base").resolve()) and "QA exact match" in capsys.readouterr().out
