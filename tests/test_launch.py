"""Launch scripts: they parse, and they say what they need."""

import importlib
import runpy
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPTS = sorted([*(ROOT / "launch").rglob("*.sh"), *(ROOT / "launch").rglob("*.sbatch")])


def test_there_are_scripts():
    """Breaks when the scripts are moved, and the tests below test none."""
    assert SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_usage_and_syntax(script):
    """Breaks when a script has a syntax error, or without arguments does anything but say usage."""
    out = subprocess.run(["bash", str(script)], capture_output=True, text=True)
    assert out.returncode != 0 and not out.stdout
    assert f"usage: {script.relative_to(ROOT)}" in out.stderr
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(script)], check=True)


def called(script, *arguments):
    """The exit code of a Python script of launch/, run in this process, which is faster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(script), *arguments])
        patch.syspath_prepend(script.parent)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(script), run_name="__main__")
    return ended.value.code


@pytest.mark.parametrize(
    "script", sorted((ROOT / "launch").glob("experiments/*.py")), ids=lambda p: p.name
)
def test_python_scripts_say_what_they_take(script, capsys):
    """Breaks when a script does not import, or takes a missing --workdir for a default."""
    assert called(script, "--help") == 0
    needed = "--base" if script.name == "triggers.py" else "--workdir"  # it only prints
    assert needed in capsys.readouterr().out
    assert called(script) == 2


def test_bad_arguments_of_the_comparison_are_named(tmp_path, capsys):
    """Breaks when an impossible number ends in a traceback or starts a run."""
    script, workdir = ROOT / "launch" / "experiments" / "methods.py", str(tmp_path / "w")
    for flags, message in (
        (["--k", "0"], "--k is 0"),
        (["--k", "3", "49"], "--k is 49; it must be at least 1 and at most 48"),
        (["--steps", "0"], "--steps is 0"),
        (["--shares", "1.5"], "--shares is 1.5"),
        (["--people", "17"], "at most 16"),
        (["--held_out", "1"], "--held_out is 1"),
        (["--arms", "icae"], "invalid choice: 'icae'"),
    ):
        assert called(script, "--workdir", workdir, *flags) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


@pytest.fixture
def evaluation(monkeypatch):
    """launch/experiments/evaluation.py as a module."""
    monkeypatch.syspath_prepend(ROOT / "launch" / "experiments")
    return importlib.import_module("evaluation")


def test_the_evaluation_names_missing_arguments(evaluation, tmp_path, monkeypatch, capsys):
    """Breaks when a missing folder is noticed only after an hour of training."""
    workdir = tmp_path / "w"
    bad = (
        ([], "give --quickstart"),
        (["--stories", str(tmp_path)], "--stories and --data go together"),
        (["--quickstart", str(tmp_path / "absent")], "absent: no such folder"),
        (["--quickstart", str(tmp_path), "--limit", "0"], "--limit and --steps must be at least 1"),
    )
    for flags, message in bad:
        monkeypatch.setattr(sys, "argv", ["evaluation.py", "--workdir", str(workdir), *flags])
        with pytest.raises(SystemExit) as error:
            evaluation.main()
        assert error.value.code == 2 and message in capsys.readouterr().err
    assert not workdir.exists()


def test_texts_of_the_evaluation_can_be_continued(evaluation, tmp_path):
    """Breaks when segments are not passages, names repeat, or questions ask for other passages."""
    from icae_jax.data import sources
    from icae_jax.interop.hub import tokenizer as tokenizers
    from icae_jax.workflows.quickstart import SHIPPED_BASE

    tokenizer = tokenizers.load_tokenizer(SHIPPED_BASE)
    evaluation.write_texts(tmp_path, 3)
    for name, passages in (("continued", 1), ("spans", evaluation.SPANS)):
        rows = list(sources.read_rows(str(tmp_path / f"{name}.jsonl")))
        assert len({row.text for row in rows}) == 3
        for row in rows:
            context, *asked = row.text.split("Question: ")
            assert (
                len(tokenizer(context.strip(), add_special_tokens=False)["input_ids"])
                == passages * evaluation.PASSAGE
            )
            names = [question.split("?")[0].rpartition(" of ")[2] for question in asked]
            assert len(set(names)) == 2 * passages and all(f"{name} " in context for name in names)
            assert all(
                question.rpartition(" ")[2].removesuffix("</s>") in context for question in asked
            )
