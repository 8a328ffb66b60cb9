"""Launch scripts: they parse, and they say what they need."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))


def test_there_are_scripts():
    assert SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_usage_and_syntax(script):
    out = subprocess.run(["bash", str(script)], capture_output=True, text=True)
    assert out.returncode != 0 and f"usage: launch/{script.name}" in out.stderr
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(script)], check=True)


@pytest.mark.parametrize("script", sorted((ROOT / "launch").glob("*.py")), ids=lambda p: p.name)
def test_python_scripts_say_what_they_take(script):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    out = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, env=environment)
    assert out.returncode == 0 and "--workdir" in out.stdout
    assert subprocess.run([sys.executable, str(script)], capture_output=True, env=environment).returncode == 2


def test_bad_arguments_of_the_comparison_are_named(tmp_path):
    """Breaks when a number of memory tokens that no segment can have ends in a traceback, or in a started run."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for flag, message in ((["--k", "0"], "--k is 0"), (["--steps", "5", "0"], "--steps is 0"), (["--k", "56"], "at most 55")):
        command = [sys.executable, str(ROOT / "launch" / "methods.py"), "--workdir", str(tmp_path / "w"), *flag]
        out = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert out.returncode == 2 and message in out.stderr and "Traceback" not in out.stderr
    assert not (tmp_path / "w").exists()
