"""The quickstart, cut to a few steps: every part runs, and the adapter answers."""

import contextlib
import io
import json
import re

import pytest

from icae_jax.cli import main as cli
from icae_jax.data import synthetic
from icae_jax.training import config_file
from icae_jax.workflows import quickstart, quickstart_results


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("quickstart") / "w"
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(quickstart, "TRAIN_PASSAGES", 200)
    monkeypatch.setattr(quickstart, "SHOWN_EVERY", 2)
    monkeypatch.setattr(quickstart_results, "BATCH", 6)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert (
            cli.main(["quickstart", "--workdir", str(workdir), "--steps", "3", "--held_out", "6"])
            == 0
        )
    yield workdir, out.getvalue(), err.getvalue()
    monkeypatch.undo()


@pytest.mark.nightly
@pytest.mark.slow
def test_results_report_and_next_commands(ran, capsys):
    """Breaks when an arm is missing, the base cannot answer, or the printed commands do not run."""
    ran, _, _ = ran
    results = json.loads((ran / "results.json").read_text())
    base = results["qa_exact_match"]
    assert base["full context"] >= 90 and base["no context"] <= 30
    assert results["questions"] == 6 * 8 and results["bits"] == synthetic.passage_bits()
    memories = results["memories"]
    assert [(m["method"], m["k"]) for m in memories] == [("x500", 11), ("icae", 11)]
    assert [m["bytes"] for m in memories] == [11 * 5120, 11 * 640]  # 2 L K H against D, float32
    for m in memories:
        assert list(m["qa_exact_match"]) == ["memory", "wrong memory", "untrained memory"]
        assert m["steps"] == [3, 3] and m["memory_tokens"] == m["k"] and m["ratio"] > 40 / m["k"]
        assert m["qa_exact_match"]["memory"] < base["full context"]
        assert set(m["ae_loss"]) == {"memory", "wrong memory"} and set(m["bleu"]) == {
            "memory",
            "untrained memory",
        }
    assert len({m["ae_loss"]["memory"] for m in memories}) == 2, "two compressors were measured"

    page = (ran / "report.html").read_text()
    for part in (
        "QA exact match, full context",
        "untrained memory",
        "<svg",
        "<del>",
        "icae ask --memory",
        "BLEU-4",
        "500xCompressor, 11 tokens",
    ):
        assert part in page

    adapter, memory = ran / "icae" / "finetune" / "adapter", ran / "memory.safetensors"
    assert (
        cli.main(
            [
                "compress",
                "--adapter",
                str(adapter),
                "--input",
                str(ran / "data" / "example.jsonl"),
                "--output",
                str(memory),
            ]
        )
        == 0
    )
    question = synthetic.passages(quickstart.HELD_OUT_SEED, 1)[0]["questions"][1]["question"]
    capsys.readouterr()
    assert cli.main(["ask", "--memory", str(memory), "--question", question, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["question"] == question
    assert cli.main(["restore", "--memory", str(memory)]) == 0 and capsys.readouterr().out.strip()


@pytest.mark.nightly
def test_what_is_on_the_screen(ran):
    """Breaks when a phase says more than its progress bar and its restored sentences.

    Also when the announcement is missing or long, or no memory answers before the second method is
    trained.
    """
    _, out, err = ran
    plan, _, rest = err.partition("\n\n")
    assert len(plan.splitlines()) == 3 and "minutes" in plan and "report.html" in plan
    lines = [line for part in rest.replace("\r", "\n").split("\n") if (line := part.strip())]
    methods, phases = ("500xCompressor", "ICAE"), ("restoring", "answering")
    bars = tuple(f"{method}, {phase}" for method in methods for phase in phases)
    shown = [line for line in lines if not line.startswith(bars)]
    assert len(shown) == 4 and all(
        re.fullmatch(r"step +2 .+ → .*\(0 of 6 passages came back whole\)", line) for line in shown
    ), shown
    assert (
        all(any(line.startswith(bar) for line in lines) for bar in bars) and "parameters" not in err
    )
    row = synthetic.passages(quickstart.HELD_OUT_SEED, 1)[0]
    first = out.partition("passages of about")[0]
    for part in (
        "The first answer from a memory, after",
        row["context"],
        row["questions"][1]["question"],
        "11 tokens for 4",
        "56,320 bytes",
    ):
        assert part in first


@pytest.mark.nightly
def test_run_again_it_shows_the_result_without_training(ran, capsys):
    """Breaks when a finished phase is trained again, or --json prints anything but one object."""
    ran, _, _ = ran
    before = {p: p.read_bytes() for p in ran.glob("*/*/metrics.jsonl")}
    results = json.loads((ran / "results.json").read_text())
    assert len(before) == 4
    argv = ["quickstart", "--workdir", str(ran), "--steps", "3", "--held_out", "6", "--json"]
    assert cli.main(argv) == 0
    out = capsys.readouterr()
    assert "The first answer" in out.err and "step" not in out.err
    printed = json.loads(out.out)
    assert printed["report"] == str((ran / "report.html").resolve()) and len(printed["next"]) == 3
    assert {name: printed[name] for name in results} == results
    assert {p: p.read_bytes() for p in ran.glob("*/*/metrics.jsonl")} == before
    assert json.loads((ran / "results.json").read_text()) == results


def test_bad_arguments(tmp_path, capsys):
    assert cli.main(["quickstart", "--workdir", str(tmp_path), "--steps", "0"]) == 2
    assert "--steps is 0" in capsys.readouterr().err
    assert cli.main(["quickstart", "--workdir", str(tmp_path), "--held_out", "1"]) == 2
    assert "--held_out is 1; it must be at least 2" in capsys.readouterr().err


@pytest.mark.parametrize("full", [False, True])
def test_full_is_both_ratios_in_a_folder_of_its_own(full, tmp_path, monkeypatch, capsys):
    """Breaks when --full trains one ratio or the default two, or both share a workdir or times."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "TRAIN_PASSAGES", 3)
    seen = []

    def stop(config, task, workdir, **how):
        seen.append((config.compression.choices, str(workdir), how["title"], how["verbosity"]))
        return 3

    monkeypatch.setattr(quickstart, "train", stop)
    assert (
        cli.main(["quickstart", "--held_out", "2", *(["--full", "--verbose"] if full else [])]) == 3
    )
    folder, choices = ("quickstart_full", (2, 11)) if full else ("quickstart", (11,))
    assert seen == [
        (choices, f"{folder}/x500/pretrain", "500xCompressor, restoring", 2 if full else 0)
    ]
    plan = capsys.readouterr().err
    assert ("11 and 2 tokens" in plan) == full and ("within 5 (--full" in plan) == (not full)


@pytest.mark.nightly
def test_from_scratch_trains_its_own_base_first(tmp_path, monkeypatch, capsys):
    """Breaks when the trained base is not the one that the compressor is then trained on."""
    whole = config_file.load
    few = {
        "model.hidden_size": 40,
        "model.intermediate_size": 48,
        "model.num_layers": 2,
        "steps": 2,
        "batch_size": 4,
        "eval_examples": 4,
        "unroll": 1,
        "mixture": ("0 questions=1",),
    }

    def small(kind, config, overrides=None):
        return whole(kind, config, few if config == "tiny_base" else overrides)

    monkeypatch.setattr(config_file, "load", small)
    monkeypatch.setattr(quickstart, "TRAIN_PASSAGES", 100)
    monkeypatch.setattr(quickstart, "trained_methods", lambda: ("icae",))
    assert (
        cli.main(
            [
                "quickstart",
                "--workdir",
                str(tmp_path),
                "--from_scratch",
                "--steps",
                "2",
                "--held_out",
                "4",
            ]
        )
        == 0
    )
    encoder = tmp_path / "icae" / "finetune" / "adapter" / "encoder"
    named = json.loads((encoder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert (
        named == str((tmp_path / "base_training" / "base").resolve())
        and "QA exact match" in capsys.readouterr().out
    )
