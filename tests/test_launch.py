"""Launch scripts: they parse, and they say what they need."""

import shutil
import subprocess

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
