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
    assert SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_usage_and_syntax(script):
    out = subprocess.run(["bash", str(script)], capture_output=True, text=True)
    assert (
        out.returncode != 0
        and f"usage: {script.relative_to(ROOT)}" in out.stderr
        and not out.stdout
    )
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(script)], check=True)


def called(script, *arguments):
    """The exit code of a Python script of launch/, run in this process, which has imported what it needs."""
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
    assert called(script, "--help") == 0 and "--workdir" in capsys.readouterr().out
    assert called(script) == 2


def test_bad_arguments_of_the_comparison_are_named(tmp_path, capsys):
    """Breaks when a number of memory tokens that no segment can have ends in a traceback, or in a started run."""
    for flag, message in (
        (["--k", "0"], "--k is 0"),
        (["--steps", "5", "0"], "--steps is 0"),
        (["--k", "56"], "at most 55"),
    ):
        assert (
            called(
                ROOT / "launch" / "experiments" / "methods.py",
                "--workdir",
                str(tmp_path / "w"),
                *flag,
            )
            == 2
        )
        assert message in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


@pytest.fixture
def evaluation(monkeypatch):
    """launch/experiments/evaluation.py as a module."""
    monkeypatch.syspath_prepend(ROOT / "launch" / "experiments")
    return importlib.import_module("evaluation")


def test_the_evaluation_of_everything_names_what_it_lacks(
    evaluation, tmp_path, monkeypatch, capsys
):
    """Breaks when a missing folder, or half of what the stories need, is found out after an hour of training."""
    workdir = tmp_path / "w"
    bad = (
        ([], "give --quickstart"), (["--stories", str(tmp_path)], "--stories and --data go together"),
        (["--quickstart", str(tmp_path / "absent")], "absent: no such folder"),
        (["--quickstart", str(tmp_path), "--limit", "0"], "--limit and --steps must be at least 1"),
    )  # fmt: skip
    for flags, message in bad:
        monkeypatch.setattr(sys, "argv", ["evaluation.py", "--workdir", str(workdir), *flags])
        with pytest.raises(SystemExit) as error:
            evaluation.main()
        assert error.value.code == 2 and message in capsys.readouterr().err
    assert not workdir.exists()


def test_texts_of_the_evaluation_can_be_continued(evaluation, tmp_path):
    """Breaks when segments are not whole passages, a name stands in two passages of a text, or a question asks for none of them."""
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
            assert len(set(names)) == 2 * passages and all(f"{one} " in context for one in names)
            assert all(
                question.rpartition(" ")[2].removesuffix("</s>") in context for question in asked
            )
