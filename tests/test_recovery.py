"""Workdirs in use by another run, with a damaged checkpoint, or in which nothing was trained.

The runs are those of test_train.
"""

import json
import os
import shutil

import numpy as np
import pytest
import test_train
from test_train import DIVERGING, arrays, run, run_until, without_clocks

from icae_jax import errors, lock
from icae_jax.cli import main as cli
from icae_jax.training import metrics, step
from icae_jax.training import train as loop
from icae_jax.training.train import DIVERGED, DONE, PREEMPTED
from icae_jax.workflows import inspection

raw, uninterrupted = test_train.raw, test_train.uninterrupted
_each_step_is_compiled_once = test_train._each_step_is_compiled_once


def test_a_second_run_is_refused_before_it_touches_anything(
    raw, uninterrupted, tmp_path, monkeypatch, capsys
):
    """Breaks when the same command run twice at once mixes checkpoints or loses metrics, or the
    second one loads a base first.
    """
    workdir = tmp_path / "w"
    shutil.copytree(uninterrupted[0], workdir)
    (workdir / "DONE").unlink()
    before = {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}
    with lock.only_writer(workdir, "--workdir"):
        for steps in (12, 20):
            with pytest.raises(
                errors.UserError,
                match=rf"--workdir {workdir} is in use: process {os.getpid()} on .* since",
            ):
                run(raw, workdir, steps=steps)
        config = tmp_path / "config.py"
        text = "import json, ml_collections\n\ndef get_config():\n"
        text += "    return ml_collections.ConfigDict(json.loads({!r}))\n"
        config.write_text(text.format(json.dumps(raw | {"base": str(tmp_path / "absent")})))
        assert cli.main(["train", "--config", str(config), "--workdir", str(workdir)]) == 2
        assert "is in use: process" in capsys.readouterr().err
        assert inspection.describe(workdir / "checkpoints")["what"].startswith("checkpoint"), (
            "readers need no lock"
        )
        assert {
            p: p.read_bytes() for p in workdir.rglob("*") if p.is_file() and p.name != lock.NAME
        } == before
    assert run(raw, workdir)[0] == DONE and not (workdir / lock.NAME).exists()


@pytest.mark.parametrize("end", [DIVERGED, PREEMPTED, "error"])
def test_the_lock_is_free_however_a_run_ends(end, raw, tmp_path, monkeypatch):
    """Breaks when a run that diverged, was preempted or failed keeps its workdir from the next."""
    if end == DIVERGED:
        assert run(raw, tmp_path, steps=1, eval_examples=0, **DIVERGING)[0] == DIVERGED
    elif end == PREEMPTED:
        assert run_until(raw, tmp_path, monkeypatch, 1, eval_examples=0)[0] == PREEMPTED
    else:
        monkeypatch.setattr(loop.metrics, "MetricsFile", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(raw, tmp_path)
    with lock.only_writer(tmp_path, "--workdir"):
        pass


def test_a_damaged_checkpoint_costs_its_steps_alone(raw, uninterrupted, tmp_path):
    """Breaks when a power loss in the last checkpoint ends a run, doubles lines of metrics, or
    changes the result.
    """
    workdir = tmp_path / "w"
    shutil.copytree(uninterrupted[0], workdir)
    (workdir / "DONE").unlink()
    for path in (workdir / "checkpoints" / "step_12").rglob("d/*"):
        path.write_bytes(b"")
    code, lines = run(raw, workdir)
    assert (
        code == DONE
        and "resumed at step 9" in lines
        and any("step_12 is damaged" in line for line in lines)
    )
    assert without_clocks(workdir) == without_clocks(uninterrupted[0])
    got, want = arrays(workdir), arrays(uninterrupted[0])
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)
    assert (workdir / "checkpoints" / "damaged_step_12").is_dir()


def test_a_lost_configuration_is_said(raw, uninterrupted, tmp_path):
    """Breaks when checkpoints whose configuration is lost are continued silently."""
    workdir = tmp_path / "w"
    shutil.copytree(uninterrupted[0], workdir)
    (workdir / "DONE").unlink()
    (workdir / "config.json").unlink()
    code, lines = run(raw, workdir)
    assert code == DONE and sum("config.json was missing" in line for line in lines) == 1
    (workdir / "DONE").unlink()
    assert not any("was missing" in line for line in run(raw, workdir)[1])
    assert not any("was missing" in line for line in run(raw, tmp_path / "new", steps=1)[1])


def test_a_start_that_trained_nothing_binds_no_workdir(raw, uninterrupted, tmp_path, monkeypatch):
    """Breaks when a configuration that ran out of memory in its first step blocks the workdir for a
    smaller one, or one that has trained steps may be replaced.
    """
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(
            step, "make_train_step", lambda *_: lambda *_: (_ for _ in ()).throw(MemoryError())
        )
        run(raw, tmp_path, seed=1)
    assert (tmp_path / "config.json").exists() and {
        line["step"] for line in metrics.read_lines(tmp_path / "metrics.jsonl")
    } == {0}
    code, lines = run(raw, tmp_path)
    assert (
        code == DONE
        and any("nothing has been trained" in line for line in lines)
        and "changed: seed: 1 -> 0" in lines
    )
    assert without_clocks(tmp_path) == without_clocks(uninterrupted[0])
    (tmp_path / "DONE").unlink()
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(errors.UserError, match="seed: 0 -> 1"):
        run(raw, tmp_path, seed=1)
