"""The training loop: bit-exact resume, signals, divergence, refusals, a full disk."""

import errno
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import ROOT, WORDS, write_jsonl

from icae_jax import errors
from icae_jax.cli import main as cli
from icae_jax.interop.adapters import folder as adapters
from icae_jax.interop.hub import base as bases
from icae_jax.training import metrics, step
from icae_jax.training import train as loop
from icae_jax.training.checkpoint import Checkpoints
from icae_jax.training.compressor_task import CompressorTask
from icae_jax.training.config import TrainConfig
from icae_jax.training.config_file import from_dict
from icae_jax.training.train import DIVERGED, DONE, PREEMPTED, train


def _texts(count, seed):
    rng = np.random.default_rng(seed)
    return [
        {"text": " ".join(rng.choice(WORDS[8:11], size=int(rng.integers(90, 140))))}
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def raw(tiny_base, tmp_path_factory):
    """A small pretraining configuration, as nested dicts: two buckets, dropout, accumulation."""
    folder = tmp_path_factory.mktemp("train")
    return {
        "base": str(tiny_base),
        "steps": 12,
        "batch_size": 4,
        "accumulate": 2,
        "log_every": 1,
        "eval_every": 6,
        "checkpoint_every": 3,
        "eval_examples": 4,
        "compression": {"k": 4, "rate": 4},
        "lora": {"rank": 4, "dropout": 0.2},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2},
        "data": {
            "train": write_jsonl(folder / "train.jsonl", _texts(12, 0)),
            "eval": write_jsonl(folder / "eval.jsonl", _texts(4, 1)),
            "context_lengths": [16, 32],
            "cache_dir": str(folder / "cache"),
        },
    }


@pytest.fixture(scope="module", autouse=True)
def _each_step_is_compiled_once():
    """Runs whose steps compute the same share compiled programs, which takes most of the time."""
    made = {}

    def sharing(make):
        def shared(task, *args):
            if "losses" in vars(task):  # a test's own
                return make(task, *args)
            c = task.config
            key = (
                make,
                c.optimizer,
                c.lora,
                c.compression,
                c.seed,
                c.batch_size,
                *(x for x in args if isinstance(x, int)),
            )
            return made.setdefault(key, make(task, *args))

        return shared

    with pytest.MonkeyPatch.context() as patch:
        for name in ("make_train_step", "make_eval_step"):
            patch.setattr(step, name, sharing(getattr(step, name)))
        yield


def run(raw, workdir, **changes):
    config = from_dict(TrainConfig, raw | changes)
    lines = []
    code = train(config, CompressorTask(config), workdir, log=lines.append)
    return code, lines


def arrays(workdir):
    """Every array of the latest checkpoint, in order of its path."""
    checkpoints = Checkpoints(workdir)
    state = checkpoints._manager.restore(checkpoints.latest())
    checkpoints.close()
    leaves = jax.tree_util.tree_leaves_with_path(state)
    assert len(leaves) > 10
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def without_clocks(workdir):
    lines = metrics.read_lines(pathlib.Path(workdir) / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in metrics.WALL_CLOCK} for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(raw, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    code, lines = run(raw, workdir)
    assert code == DONE
    return workdir, lines


CHILD = """
import json, sys
from icae_jax.training.config import TrainConfig
from icae_jax.training.config_file import from_dict
from icae_jax.training.compressor_task import CompressorTask
from icae_jax.training.train import train
config = from_dict(TrainConfig, json.loads(sys.argv[1]))
task = CompressorTask(config)
if len(sys.argv) > 3:  # slowly, so that a signal lands between steps
    import time
    whole = task.train_batches
    task.train_batches = lambda *steps: (time.sleep(0.3) or batch for batch in whole(*steps))
sys.exit(train(config, task, sys.argv[2]))
"""


def child(raw, workdir, *, limit=None):
    """The same run in another process, slowed down. limit: the largest file it may write, bytes."""
    command = [sys.executable, "-c", CHILD, json.dumps(raw), str(workdir)]
    if limit:
        command = ["bash", "-c", f'ulimit -f {limit // 1024}; exec "$@"', "bash", *command]
    else:
        command.append("slow")
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )


def wait_for_step(process, workdir, at_least):
    path = pathlib.Path(workdir) / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (
            path.exists()
            and max((line["step"] for line in metrics.read_lines(path)), default=0) >= at_least
        ):
            return
        time.sleep(0.02)
    raise AssertionError(
        f"no step {at_least}; exit code {process.poll()}: {process.stderr.read()[-2000:]}"
    )


@pytest.mark.nightly
def test_a_killed_run_continues_bit_exactly(raw, uninterrupted, tmp_path):
    """Breaks when parameters, optimizer state, data order, dropout or metrics depend on more than
    (seed, step).
    """
    process = child(raw, tmp_path)
    wait_for_step(process, tmp_path, random.SystemRandom().randint(4, 8))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "DONE").exists()

    code, lines = run(raw, tmp_path)
    assert code == DONE and any(line.startswith("resumed at step") for line in lines)
    whole, _ = uninterrupted
    want, got = arrays(whole), arrays(tmp_path)
    assert want.keys() == got.keys()
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)
    assert without_clocks(tmp_path) == without_clocks(whole)
    assert {line["step"] for line in without_clocks(whole)} == set(range(13))


@pytest.mark.nightly
def test_sigterm_saves_and_exits_75(raw, uninterrupted, tmp_path):
    """Breaks when a preempted run loses steps, or claims to be done."""
    process = child(raw, tmp_path)
    wait_for_step(process, tmp_path, 4)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == PREEMPTED and not (tmp_path / "DONE").exists()
    saved = Checkpoints(tmp_path).latest()
    assert saved >= 5 and f"saved step {saved}" in err
    assert run(raw, tmp_path)[0] == DONE
    np.testing.assert_array_equal(
        arrays(tmp_path)["['trained']['memory_table']"],
        arrays(uninterrupted[0])["['trained']['memory_table']"],
    )


@pytest.mark.slow
def test_a_finished_run_stays_finished_and_can_be_made_longer(raw, uninterrupted, tmp_path):
    """Breaks when a launcher's restart trains on, or when a longer run starts anew."""
    workdir, _ = uninterrupted
    before = (workdir / "metrics.jsonl").read_bytes()
    code, lines = run(raw, workdir)
    assert (
        code == DONE
        and "done already" in lines[-1]
        and (workdir / "metrics.jsonl").read_bytes() == before
    )

    (workdir / "DONE").unlink()  # as after a kill between the last checkpoint and the end
    adapter = (workdir / "adapter" / "memory.safetensors").read_bytes()
    (workdir / "adapter" / "memory.safetensors").unlink()
    assert run(raw, workdir)[0] == DONE and (workdir / "DONE").exists()
    assert (workdir / "adapter" / "memory.safetensors").read_bytes() == adapter

    assert run(raw, tmp_path, steps=6)[0] == DONE
    code, lines = run(raw, tmp_path)
    assert code == DONE and "changed: steps: 6 -> 12" in lines and "resumed at step 6" in lines
    np.testing.assert_array_equal(
        arrays(tmp_path)["['trained']['memory_table']"],
        arrays(workdir)["['trained']['memory_table']"],
    )


def test_training_learns_and_the_base_does_not_change(raw, uninterrupted):
    """Breaks when the loss does not fall, or a frozen weight moves."""
    workdir, _ = uninterrupted
    evaluated = [line["eval"]["memory"] for line in without_clocks(workdir) if "eval" in line]
    assert (
        len(evaluated) == 3
        and evaluated[-1]["ae"] < evaluated[0]["ae"]
        and evaluated[-1]["lm"] < evaluated[0]["lm"]
    )
    config = from_dict(TrainConfig, raw)
    task = CompressorTask(config)
    assert task.base.fingerprint == bases.load_base(raw["base"]).fingerprint
    before = jax.tree.map(np.array, task.frozen)
    task_lines = []
    assert (
        train(
            from_dict(TrainConfig, raw | {"steps": 2}),
            task,
            workdir.parent / "frozen",
            log=task_lines.append,
        )
        == DONE
    )
    jax.tree.map(np.testing.assert_array_equal, task.frozen, before)


def test_a_run_says_one_line_of_its_parameters_and_can_be_watched(raw, uninterrupted, tmp_path):
    """Breaks when the parameter table is printed unasked, a quiet run prints, or `watch` misses a
    step or sees other parameters than those exported.
    """
    said = [line for line in uninterrupted[1] if "parameters" in line]
    assert (
        len(said) == 1
        and said[0].startswith("trains ")
        and not any("\n" in line for line in uninterrupted[1])
    )
    seen, norm = (
        [],
        lambda tree: float(np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(tree)))),
    )
    for verbosity, folder in ((loop.QUIET, "quiet"), (loop.VERBOSE, "verbose")):
        config, lines = from_dict(TrainConfig, raw | {"steps": 2}), []
        task = CompressorTask(config)
        watch = lambda at, trained: seen.append((at, norm(trained)))  # noqa: E731
        assert (
            train(
                config, task, tmp_path / folder, log=lines.append, verbosity=verbosity, watch=watch
            )
            == DONE
        )
        table = [line for line in lines if "frozen layers/" in line]
        assert (lines == []) if verbosity == loop.QUIET else len(table) == 1
    assert [at for at, _ in seen] == [1, 2, 1, 2] and seen[:2] == seen[2:]
    exported = adapters.load_adapter(tmp_path / "quiet" / "adapter", task.base).trained
    assert seen[-1][1] == pytest.approx(norm(exported), rel=1e-6)


def test_divergence_exits_3_names_the_step_and_saves_nothing_of_it(raw, tmp_path):
    """Breaks when NaN is trained on, or overwrites the last good checkpoint."""
    assert run(raw, tmp_path, steps=3)[0] == DONE
    good = arrays(tmp_path)
    config = from_dict(TrainConfig, raw)
    task = CompressorTask(config)
    losses = task.losses

    def broken(trained, frozen, batch, key):
        poison = np.float32(np.nan) if key is not None else np.float32(1)
        return {o: (s * poison, n) for o, (s, n) in losses(trained, frozen, batch, key).items()}

    task.losses = broken
    lines = []
    assert train(config, task, tmp_path, log=lines.append) == DIVERGED
    assert "step 4" in lines[-1] and "step 3" in lines[-1]
    for name, value in arrays(tmp_path).items():
        np.testing.assert_array_equal(value, good[name])


def test_another_configuration_is_refused_with_its_fields(raw, uninterrupted):
    """Breaks when a workdir is continued under other mathematics."""
    workdir, _ = uninterrupted
    before = (workdir / "config.json").read_bytes()
    with pytest.raises(ValueError, match=r"(?s)lora\.rank: 4 -> 8.*seed: 0 -> 1"):
        run(raw, workdir, seed=1, lora={"rank": 8, "dropout": 0.2})
    assert (workdir / "config.json").read_bytes() == before


@pytest.mark.nightly
def test_a_full_disk_is_one_error_and_loses_nothing(raw, tmp_path):
    """Breaks when a failed save takes the earlier checkpoint with it, or shows a traceback."""
    assert run(raw, tmp_path, steps=3)[0] == DONE
    before = arrays(tmp_path)
    process = child(
        raw, tmp_path, limit=10 * 1024
    )  # no file may grow past this: writing a checkpoint fails as on a full disk
    _, err = process.communicate(timeout=180)
    assert process.returncode not in (DONE, PREEMPTED, DIVERGED)
    assert "failed" in err and "Earlier checkpoints are whole" in err
    after = arrays(tmp_path)
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)


def test_batches_are_on_the_devices_a_step_ahead(monkeypatch):
    """Breaks when a batch's transfer waits until it is needed, one is left out, or the order
    changes.
    """
    seen = []
    monkeypatch.setattr(
        loop.sharding, "put_batch", lambda mesh, batch, rows, size: seen.append(batch) or -batch
    )
    ahead = loop.put_ahead(None, iter(range(1, 4)), None, 8)
    assert next(ahead) == (1, -1) and seen == [1, 2]
    assert list(ahead) == [(2, -2), (3, -3)] and seen == [1, 2, 3]
    assert list(loop.put_ahead(None, iter(()), None, 8)) == []


def test_a_trace_of_a_few_steps(raw, tmp_path):
    """Breaks when --profile writes no trace, traces compilation too, or never ends where the run is
    shorter than what it traces.
    """
    config = from_dict(TrainConfig, raw | {"steps": 4, "eval_examples": 0})
    lines = []
    assert (
        train(
            config,
            CompressorTask(config),
            tmp_path / "run",
            log=lines.append,
            profile=str(tmp_path / "trace"),
        )
        == DONE
    )
    assert f"traced 2 steps; look at them with: xprof {tmp_path / 'trace'}" in lines
    (trace,) = (tmp_path / "trace").glob("plugins/profile/*/*.xplane.pb")
    names = {
        e.name
        for p in jax.profiler.ProfileData.from_file(str(trace)).planes
        for line in p.lines
        for e in line.events
    }
    assert names & {"while.1"} or any("fusion" in name or name.startswith("dot") for name in names)
    assert not any("backend_compile" in name for name in names)


def test_a_run_that_is_stopped_ends_its_trace(raw, tmp_path, monkeypatch):
    """Breaks when a stop while steps are traced loses the trace, or leaves the profiler running."""
    asked = iter([False, False, True])
    monkeypatch.setattr(loop.distributed.Preemption, "asked", lambda self: next(asked))
    config = from_dict(TrainConfig, raw | {"eval_examples": 0})  # so that it is asked once a step
    assert (
        train(
            config,
            CompressorTask(config),
            tmp_path / "run",
            log=list,
            profile=str(tmp_path / "trace"),
        )
        == PREEMPTED
    )
    assert list((tmp_path / "trace").glob("plugins/profile/*/*.xplane.pb"))
    jax.profiler.start_trace(tmp_path / "next")
    jax.profiler.stop_trace()


DIVERGING = {
    "optimizer": {"learning_rate": 1e30, "warmup_steps": 0},
    "eval_every": 1,
    "checkpoint_every": 1,
}


@pytest.mark.parametrize(("steps", "held_out"), [(1, 0), (3, 4)])
def test_parameters_that_an_update_broke_are_not_saved(raw, tmp_path, steps, held_out):
    """Breaks when only losses and gradients are checked: parameters that the update made NaN would
    then be saved, or exported.
    """
    code, lines = run(raw, tmp_path, steps=steps, eval_examples=held_out, **DIVERGING)
    assert code == DIVERGED and "step 1" in lines[-1] and "last good checkpoint: none" in lines[-1]
    assert (
        not (tmp_path / "DONE").exists()
        and not (tmp_path / "adapter").exists()
        and Checkpoints(tmp_path).latest() is None
    )


def test_a_held_out_loss_that_is_not_finite_ends_the_run(raw, tmp_path, monkeypatch):
    """Breaks when a state with a NaN held-out loss, of any kind or objective, is saved as good."""
    evaluate, bad = loop.evaluate, iter([False, False, True])

    def evaluated(*args):
        losses = evaluate(*args)
        return (
            losses | {"wrong_memory": losses["memory"] | {"lm": float("nan")}}
            if next(bad)
            else losses
        )

    monkeypatch.setattr(loop, "evaluate", evaluated)
    code, lines = run(raw, tmp_path)
    assert code == DIVERGED and "step 12" in lines[-1] and "step 9" in lines[-1]
    assert Checkpoints(tmp_path).latest() == 9 and not (tmp_path / "DONE").exists()
    assert all(
        np.isfinite(line["eval_loss"]) for line in without_clocks(tmp_path) if "eval" in line
    )


def run_until(raw, workdir, monkeypatch, step, **changes):
    """`run`, to which a notice to leave comes in step `step`."""
    config, lines, noticed = from_dict(TrainConfig, raw | changes), [], []
    with monkeypatch.context() as patch:
        patch.setattr(loop.distributed.Preemption, "asked", lambda self: bool(noticed))
        watch = lambda at, trained: noticed.extend([at] * (at == step))  # noqa: E731
        return train(config, CompressorTask(config), workdir, log=lines.append, watch=watch), lines


def test_a_notice_to_leave_saves_before_anything_else(raw, uninterrupted, tmp_path, monkeypatch):
    """Breaks when a long evaluation delays the save, or the evaluation that was skipped is never
    made up for.
    """
    evaluate, evaluated = loop.evaluate, []
    monkeypatch.setattr(loop, "evaluate", lambda *args: evaluated.append(1) or evaluate(*args))
    code, lines = run_until(raw, tmp_path, monkeypatch, 6)
    assert (
        code == PREEMPTED and "saved step 6" in lines[-1] and len(evaluated) == 1
    )  # step 0's; step 6 is one that evaluates
    assert run(raw, tmp_path)[0] == DONE
    assert without_clocks(tmp_path) == without_clocks(uninterrupted[0])
    got, want = arrays(tmp_path), arrays(uninterrupted[0])
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


def test_a_finished_run_says_so_before_it_loads_anything(
    raw, uninterrupted, tmp_path, monkeypatch, capsys
):
    """Breaks when a restarted launcher loads 13 GiB only to find nothing to do, or another
    configuration counts as done.
    """
    workdir, _ = uninterrupted
    config = tmp_path / "config.py"
    text = "import json, ml_collections\n\ndef get_config():\n"
    text += "    return ml_collections.ConfigDict(json.loads({!r}))\n"
    config.write_text(text.format(json.dumps(raw | {"seed": 0, "base": str(tmp_path / "absent")})))
    command = ["train", "--config", str(config), "--workdir", str(workdir)]
    assert (
        cli.main(command) == DONE
        and f"{workdir} is done already (12 steps)" in capsys.readouterr().err
    )
    assert (
        cli.main([*command, "--config.seed=1"]) == 2 and "seed: 0 -> 1" in capsys.readouterr().err
    )


def test_held_out_losses_are_computed_in_microbatches(raw):
    """Breaks when evaluation needs the memory of a whole batch although training accumulates, or
    gives another loss.
    """
    config = from_dict(TrainConfig, raw | {"batch_size": 16, "accumulate": 8, "eval_examples": 16})
    task = CompressorTask(config)
    trained = task.init()
    (batches, *_) = task.eval_batches()
    whole, cut = (
        step.make_eval_step(task, n).lower(trained, task.frozen, batches["memory"]).compile()
        for n in (1, 8)
    )
    assert (
        cut.memory_analysis().temp_size_in_bytes < 0.5 * whole.memory_analysis().temp_size_in_bytes
    )
    want, got = (jax.device_get(f(trained, task.frozen, batches["memory"])) for f in (whole, cut))
    assert want.keys() == got.keys() == {"ae", "lm"}
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5)


def test_a_line_of_metrics_is_written_once_although_the_disk_stumbles(tmp_path, monkeypatch):
    """Breaks when a transient filesystem error ends a run, or doubles or halves a line."""
    monkeypatch.setattr(errors, "FIRST_DELAY", 0.0)
    fsync, faults = os.fsync, iter([OSError(errno.EIO, "Input/output error")])

    def stumbling(descriptor):
        for fault in faults:
            raise fault
        return fsync(descriptor)

    with metrics.MetricsFile(tmp_path, -1) as file:
        file.write({"step": 1, "train": {"ae": 1.0}})
        monkeypatch.setattr(metrics.os, "fsync", stumbling)
        file.write({"step": 2, "train": {"ae": 0.5}})
        file.write({"step": 3, "train": {"ae": 0.25}})
    assert [line["step"] for line in metrics.read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]


READER = """
import pathlib, sys, time
from icae_jax.workflows import inspection
workdir, looked = pathlib.Path(sys.argv[1]), 0
while not (workdir / "DONE").exists():
    try:
        looked += inspection.describe(workdir)["what"].startswith("checkpoint")
    except ValueError:  # nothing saved yet
        time.sleep(0.01)
print(looked)
"""


@pytest.mark.nightly
def test_a_run_trains_while_another_process_inspects_it(raw, tmp_path):
    """Breaks when a reader deletes the checkpoint being written, which ends the training."""
    with subprocess.Popen(
        [sys.executable, "-c", READER, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as reader:
        try:
            code, lines = run(
                raw, tmp_path, steps=80, checkpoint_every=1, eval_examples=0, log_every=50
            )
            out, _ = reader.communicate(timeout=60)
        finally:
            reader.kill()
    assert code == DONE, lines[-1]
    assert int(out) > 20


def test_a_notice_while_it_evaluates_does_not_wait_for_the_end(raw, tmp_path, monkeypatch):
    """Breaks when a preemption signal during an evaluation, also the last one, has to wait for its
    end.
    """
    batches, noticed, made = CompressorTask.eval_batches, [], []

    def eval_batches(task, rows):
        for batch in batches(task, rows):
            yield batch
            made.append(batch)
            noticed.extend([1] * (len(made) == 3))  # two for step 0, and the first of the last step

    config, lines = from_dict(TrainConfig, raw | {"steps": 3, "eval_every": 3}), []
    with monkeypatch.context() as patch:
        patch.setattr(CompressorTask, "eval_batches", eval_batches)
        patch.setattr(loop.distributed.Preemption, "asked", lambda self: bool(noticed))
        code = train(config, CompressorTask(config), tmp_path, log=lines.append)
    assert (
        code == PREEMPTED
        and "saved step 3" in lines[-1]
        and not (tmp_path / "DONE").exists()
        and len(made) == 3
    )
    assert run(raw, tmp_path, steps=3, eval_every=3)[0] == DONE
    assert [line["step"] for line in without_clocks(tmp_path) if "eval" in line] == [0, 3]
    assert (tmp_path / "adapter" / "memory.safetensors").exists()
