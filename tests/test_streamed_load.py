"""launch/benchmarks/streamed_load.py at a small size: the memory that loading a base takes."""

import importlib
import os
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPT = ROOT / "launch" / "benchmarks" / "streamed_load.py"

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]


def measure(workdir, *flags):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {
        "PYTHONPATH": str(ROOT)
    }
    command = [sys.executable, str(SCRIPT), "--workdir", str(workdir), *flags]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def test_loading_holds_one_part_at_a_time(tmp_path):
    """Breaks when loading holds more than one device's part of a parameter, or reads a wrong part;
    or, of a quantised load, more than a layer's matrix in float32 beside it.

    A second copy of all parameters takes 252 MiB, a whole stacked parameter 63 MiB, in float32
    twice that, a layer's matrix 8.
    """
    out = measure(tmp_path / "w", "--gib", "0.25", "--slack_mib", "150")
    assert out.returncode == 0, out.stdout + out.stderr
    rows = {line.split()[0]: line.split()[1:] for line in out.stdout.splitlines()[2:]}
    sizes = {"": (252, 8), "/int8": (136, 4), "/nf4": (79, 2)}
    assert rows.keys() == {
        f"{kind}{scheme}" for kind in ("safetensors", "orbax") for scheme in sizes
    }
    for name, row in rows.items():
        kind, _, scheme = name.partition("/")
        parameters, part, before, peak, above = map(int, row[:5])
        assert (parameters, part) == sizes[f"/{scheme}" if scheme else ""]
        # Orbax's modules alone take about 40.
        assert above < (40 if kind == "safetensors" else 120) + (70 if scheme else 0)
        assert peak > before + parameters  # the parameters themselves were seen
    assert not list((tmp_path / "w").iterdir())


def test_more_memory_than_allowed_is_a_failure(tmp_path, monkeypatch, capsys):
    """Breaks when the script says ok whatever it measured, or of one load what is so of another."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    script = importlib.import_module("streamed_load")
    monkeypatch.setattr(script.compiled, "set_up", lambda: None)
    mib = {"held": 40, "shard": 5, "matrix": 2, "before": 100, "peak": 147, "above": 10}
    figures = {name: n << 20 for name, n in mib.items()} | {"seconds": 1.5, "wrong": []}
    worse = {
        "": {},
        "safetensors": {"above": (10 << 20) + 1},
        "orbax nf4": {"wrong": ["lm_head.weight"]},
    }
    for stage, change in worse.items():

        def measured(name, args, stage=stage, change=change):
            return figures | (change if name == stage else {})

        monkeypatch.setattr(script, "in_process", measured)
        flags = ["--gib", "0.001", "--slack_mib", "3", "--workdir", str(tmp_path / "w")]
        monkeypatch.setattr("sys.argv", [str(SCRIPT), *flags])
        assert script.main() == (1 if stage else 0)
        lines = capsys.readouterr().out.splitlines()[2:]
        bad = [line for line in lines if not line.endswith(" ok")]
        assert len(lines) == 6 and len(bad) == bool(stage)
        said = "wrong: lm_head.weight" if "wrong" in change else "NOT OK"
        assert all(line.split()[0] == stage.replace(" ", "/") and said in line for line in bad)


def test_a_copy_that_is_dropped_is_seen():
    """Breaks when samples miss memory that is held briefly, or the parameters count as excess.

    In a process of its own: where earlier tests left a large free piece in the heap, the array
    takes that and the process does not grow.
    """
    program = f"""if True:
        import runpy
        import numpy as np

        memory = runpy.run_path({str(SCRIPT)!r})["Memory"](lambda: 64 << 20)
        for _ in range(3):
            np.ones(128 << 20, np.uint8).sum()
        memory.stop()
        print(memory.peak - memory.before, memory.above)
    """
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    grown, above = map(int, out.stdout.split())
    assert grown > 120 << 20 and 56 << 20 < above < 72 << 20


def test_bad_arguments_are_named(tmp_path):
    """Breaks when a folder that is not empty is written to, or a bad size ends in a traceback."""
    (tmp_path / "dear.txt").write_text("dear")
    for flags, message in (
        ((), "is not empty; give a new folder"),
        (("--gib", "0"), "--gib is 0.0; it must be positive"),
    ):
        out = measure(tmp_path, *flags)
        assert out.returncode == 2 and message in out.stderr and "Traceback" not in out.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["dear.txt"]
