"""Several processes as one run. Breaks when the number of processes or the mesh changes the data or
the result, when not all of them save the same step and stop, when a dead one leaves the others
waiting, or when a wrong start is noticed late.
"""

import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.numpy
from conftest import ROOT, WORDS, close, eight_devices, free_port, write_jsonl

from icae_jax.cli import main as cli
from icae_jax.runtime import sharding
from icae_jax.training import metrics
from icae_jax.training.checkpoint import Checkpoints
from icae_jax.training.train import DIVERGED, DONE, PREEMPTED

STEPS = 10
DEADLINE = 60  # seconds in which a process notices that another is dead

# Several devices sum in another order, which changes a float32 sum of n terms by up to n * 6e-8 of
# them. Losses differ by that. Parameters differ more, through Adam, which divides a gradient by its
# size: if that is small beside the summed terms, their rounding changes its step. Both tolerances
# are about ten times what is observed. Another example, dropout mask or count moves losses by more
# than 1e-3.
LOSS_BOUND, PARAMETER_BOUND = 5e-6, 1e-4

CONFIG = """
import json, pathlib
import ml_collections

def get_config(arg=None):
    path = pathlib.Path(__file__).with_name("config.json")
    return ml_collections.ConfigDict(json.loads(path.read_text()))
"""

# `icae` that records which examples it makes for each step and, with SLOW, waits before each, so
# that a signal arrives between two steps.
CHILD = """
import json, os, sys, threading, time
sys.modules["torch"] = None  # transformers would spend seconds on importing it
from icae_jax.cli import main as cli
from icae_jax.data.examples import Examples
from icae_jax.training.compressor_task import CompressorTask

drawn, draw, collate = threading.local(), Examples.draw, Examples.collate
train_batches = CompressorTask.train_batches

def noted_draw(self, seed, step, batch_size):
    drawn.step = step
    return draw(self, seed, step, batch_size)

def noted_collate(self, bucket, rows):
    if hasattr(drawn, "step"):  # held-out batches are made in another thread, and are not drawn
        with open(os.environ["NOTES"], "a") as f:
            f.write(json.dumps([drawn.step, bucket, rows.tolist()]) + chr(10))
    return collate(self, bucket, rows)

def slow_batches(self, *which):
    return (time.sleep(float(os.environ["SLOW"])) or batch for batch in train_batches(self, *which))

Examples.draw, Examples.collate = noted_draw, noted_collate
CompressorTask.train_batches = slow_batches
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def folder(tiny_base, tmp_path_factory):
    """Holds a configuration with dropout and accumulation, and its data."""
    folder, rng = tmp_path_factory.mktemp("distributed"), np.random.default_rng(0)

    def texts(count):
        return [
            {"text": " ".join(rng.choice(WORDS[8:11], size=int(rng.integers(90, 140))))}
            for _ in range(count)
        ]

    raw = {
        "base": str(tiny_base),
        "seed": 0,
        "steps": STEPS,
        "batch_size": 16,
        "accumulate": 2,
        "log_every": 1,
        "eval_every": STEPS,
        "checkpoint_every": 2,
        "eval_examples": 12,
        "remat": "none",
        "compression": {"k": 4, "rate": 4},
        "lora": {"rank": 4, "dropout": 0.2},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2},
        "mesh": {"data": 1, "fsdp": -1, "tensor": 1},
        "data": {
            "train": write_jsonl(folder / "train.jsonl", texts(24)),
            "eval": write_jsonl(folder / "eval.jsonl", texts(6)),
            "context_lengths": [16],
            "cache_dir": str(folder / "cache"),
        },
    }
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "config.py").write_text(CONFIG)
    return folder


# -------------------------------------------------------------------------------- runs in processes


class Run:
    """Runs `icae train` in a workdir as several processes with some CPU devices each. As a
    context, it kills those left. flags: more of them for all; only: `{process: flags}`; slow:
    seconds before each step.
    """

    numbers = itertools.count()

    def __init__(self, workdir, processes, devices, *flags, only=None, slow=0.0):
        self.workdir, self.children = workdir, []
        number, together = (
            next(self.numbers),
            [
                "--coordinator",
                f"127.0.0.1:{free_port()}",
                "--processes",
                str(processes),
                "--process",
            ],
        )
        command = [
            sys.executable,
            "-c",
            CHILD,
            "train",
            "--config",
            str(workdir.parent / "config.py"),
            "--workdir",
            str(workdir),
        ]
        xla = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        self.logs = [workdir.parent / f"{workdir.name}-{number}-{i}" for i in range(processes)]
        for i, log in enumerate(self.logs):
            env = os.environ | {"XLA_FLAGS": xla, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
            env |= {"NOTES": f"{log}.jsonl", "SLOW": str(slow)}
            own = [
                *flags,
                *(only or {}).get(i, ()),
                *([*together, str(i)] if processes > 1 else []),
            ]
            with open(f"{log}.err", "w") as err:
                self.children.append(
                    subprocess.Popen(
                        [*command, *own], env=env, stderr=err, stdout=subprocess.DEVNULL
                    )
                )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for child in self.children:
            child.kill()
            child.wait()

    def errors(self):
        """What each process wrote to stderr."""
        return [pathlib.Path(f"{log}.err").read_text(errors="replace") for log in self.logs]

    def made(self):
        """For each process, `{step: (bucket, example numbers)}` that it made."""
        lines = [pathlib.Path(f"{log}.jsonl").read_text().splitlines() for log in self.logs]
        return [
            {step: (bucket, rows) for step, bucket, rows in map(json.loads, of)} for of in lines
        ]

    def codes(self, seconds=240):
        """The exit code of each process; fails if one does not end."""
        deadline = time.monotonic() + seconds
        for child, err in zip(self.children, self.logs, strict=True):
            try:
                child.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                pytest.fail(
                    f"{err.name} still runs after {seconds} s: "
                    f"{pathlib.Path(f'{err}.err').read_text()[-2000:]}"
                )
        return [child.returncode for child in self.children]

    def done(self):
        """Waits for all processes to exit with 0."""
        assert self.codes() == [DONE] * len(self.children), "\n".join(
            err[-3000:] for err in self.errors()
        )
        return self

    def wait_for_step(self, step):
        path, deadline = self.workdir / "metrics.jsonl", time.monotonic() + 180
        while time.monotonic() < deadline and all(child.poll() is None for child in self.children):
            if (
                path.exists()
                and max((line["step"] for line in metrics.read_lines(path)), default=0) >= step
            ):
                return
            time.sleep(0.02)
        pytest.fail(f"no step {step}: {[err[-2000:] for err in self.errors()]}")


def finished(workdir, *args, **more):
    with Run(workdir, *args, **more) as run:
        return run.done()


def without_clocks(workdir):
    return [
        {k: v for k, v in line.items() if k not in metrics.WALL_CLOCK}
        for line in metrics.read_lines(workdir / "metrics.jsonl")
    ]


def numbers(line):
    """Every number of a line of metrics, in the order of its names."""
    values = (line[k] for k in sorted(line))
    return [x for v in values for x in (numbers(v) if isinstance(v, dict) else [v])]


def result(workdir):
    """Every tensor of the exported adapter."""
    files = sorted((workdir / "adapter").rglob("*.safetensors"))
    assert len(files) == 2
    return {
        f"{file.name} {name}": x
        for file in files
        for name, x in safetensors.numpy.load_file(file).items()
    }


def alike(workdir, want):
    """The same steps, each once, with the same losses and result, within reduction error."""
    got, wanted = without_clocks(workdir), without_clocks(want)
    assert [(line["step"], line.keys()) for line in got] == [
        (line["step"], line.keys()) for line in wanted
    ]
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(numbers(a), numbers(b), rtol=LOSS_BOUND, err_msg=str((a, b)))
    got, wanted = result(workdir), result(want)
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        close(got[name], value, PARAMETER_BOUND)


def whole_batches(run, alone, steps):
    """Every process made only its own rows, and all of them together the batches of a single
    process.
    """
    (want,), shares = alone.made(), run.made()
    for step in steps:
        parts = [made[step] for made in shares]
        bucket, rows = want[step]
        assert {b for b, _ in parts} == {bucket} and all(
            len(part) == len(rows) // len(shares) for _, part in parts
        )
        assert sorted(row for _, part in parts for row in part) == sorted(rows)


@pytest.fixture(scope="module")
def alone(folder):
    """One process, one device, from the beginning to the end."""
    return finished(folder / "alone", 1, 1)


# ---------------------------------------------------------------------------------- the same result

SQUARE = ("--config.mesh.data=2", "--config.mesh.fsdp=2")  # of four devices
SPLIT = ("--config.mesh.fsdp=2", "--config.mesh.tensor=2")


@pytest.mark.nightly
@pytest.mark.slow
def test_devices_do_not_change_the_run(folder):
    """Breaks when losses, gradients or held-out losses on eight devices miss rows, count some
    twice, or give another adapter; also where these recompute what one device keeps.
    """
    flags = [
        "--config.steps=3",
        "--config.eval_every=3",
        "--config.checkpoint_every=3",
        "--config.accumulate=1",
    ]
    more = ["--config.remat=dots", *[f"--config.mesh.{axis}=2" for axis in sharding.AXES]]
    command = ["train", "--config", str(folder / "config.py"), "--workdir"]
    assert cli.main([*command, str(folder / "one"), *flags]) == DONE
    with eight_devices():
        assert cli.main([*command, str(folder / "eight"), *flags, *more]) == DONE
    alike(folder / "eight", folder / "one")


# --------------------------------------------------------------------------------------- preemption


@pytest.fixture(scope="module")
def preempted(folder):
    """Two processes with two devices each, the second of which got SIGTERM: the run, and copies of
    its workdir.
    """
    with Run(folder / "preempted", 2, 2, *SPLIT, slow=0.6) as run:
        run.wait_for_step(2)
        run.children[1].send_signal(signal.SIGTERM)
        codes = run.codes(DEADLINE)
    for name in ("single", "killed"):
        shutil.copytree(run.workdir, folder / name)
    return run, codes


def saved_step(run):
    return int(re.search(r"SIGTERM: saved step (\d+)", run.errors()[0])[1])


def resumed_step(run):
    return int(re.search(r"resumed at step (\d+)", run.errors()[0])[1])


@pytest.mark.nightly
def test_sigterm_to_one_process_saves_and_ends_all(preempted, alone):
    """Breaks when a signal to one process does not stop the others, they save different steps, a
    process makes rows that are not its own, or more than one process writes.
    """
    run, codes = preempted
    assert codes == [PREEMPTED, PREEMPTED], "\n".join(err[-3000:] for err in run.errors())
    assert 3 <= saved_step(run) < 6 and not (run.workdir / "DONE").exists()
    with Checkpoints(run.workdir) as checkpoints:
        assert checkpoints.latest() == saved_step(run)
    assert {line["step"] for line in without_clocks(run.workdir)} == set(range(saved_step(run) + 1))
    whole_batches(run, alone, range(saved_step(run)))
    assert len(list((run.workdir / "tensorboard").iterdir())) == 1


@pytest.mark.nightly
def test_it_continues_in_one_process(folder, alone, preempted):
    """Breaks when a checkpoint is bound to the processes or the mesh that wrote it, or data do not
    continue at its step.
    """
    step, run = saved_step(preempted[0]), finished(folder / "single", 1, 1)
    assert resumed_step(run) == step and min(min(made) for made in run.made()) == step
    whole_batches(run, alone, range(step, STEPS))
    alike(run.workdir, alone.workdir)


# ----------------------------------------------------------------------------------- when one fails


@pytest.mark.nightly
def test_a_killed_process_ends_the_others_and_the_run_continues(folder, alone, preempted):
    """Breaks when a process waits for a dead one or does not report it, its exit code forbids a
    restart, a checkpoint is lost, or two and four processes on three meshes in turn, whoever died,
    do not train what one process trains.
    """
    workdir, step = folder / "killed", saved_step(preempted[0])
    for killed, at in ((1, 6), (0, 8)):
        with Run(workdir, 2, 1, slow=0.3) as run:
            run.wait_for_step(at)
            run.children[killed].send_signal(signal.SIGKILL)
            codes, errors = run.codes(DEADLINE), run.errors()
        assert codes[killed] == -signal.SIGKILL and codes[1 - killed] not in (
            DONE,
            2,
            DIVERGED,
            PREEMPTED,
        )
        assert re.search(r"another process died|Terminating process because", errors[1 - killed]), (
            errors[1 - killed][-3000:]
        )
        assert not (workdir / "DONE").exists() and step <= resumed_step(run)
        step = resumed_step(run)
        whole_batches(run, alone, range(step, at))
    run = finished(workdir, 4, 1, *SQUARE)
    assert resumed_step(run) >= max(step, 6)
    whole_batches(run, alone, range(resumed_step(run), STEPS))
    alike(run.workdir, alone.workdir)
    names = [sorted(p.name for p in w.iterdir()) for w in (run.workdir, alone.workdir)]
    assert names[0] == names[1]
    first, *others = run.errors()
    assert f"done: {STEPS} steps" in first and not any(
        "done" in err or "step" in err for err in others
    )


@pytest.mark.nightly
@pytest.mark.parametrize("wrong", [0, 1])
def test_bad_input_of_one_process_ends_all(wrong, folder):
    """Breaks when the others wait for one that cannot start, or its message is lost."""
    with Run(
        folder / f"wrong{wrong}", 2, 1, only={wrong: ["--config.data.train=absent.jsonl"]}
    ) as run:
        codes, errors = run.codes(DEADLINE), run.errors()
    assert codes[wrong] == 2 and codes[1 - wrong] not in (DONE, 2, DIVERGED, PREEMPTED), (
        codes,
        errors,
    )
    assert f"process {wrong} of 2: data file absent.jsonl: no such file" in errors[wrong]
    assert not (folder / f"wrong{wrong}" / "config.json").exists()


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("flag", "named"),
    [("data.train={other}", "identity.data.train"), ("seed=1", "seed: 0 in process 0, 1 in")],
)
def test_processes_that_mean_different_runs_end_before_the_first_step(flag, named, folder):
    """Breaks when hosts with other copies of the data, or another configuration, train on to a
    result that is nobody's.
    """
    other = write_jsonl(folder / "other.jsonl", [{"text": " ".join(WORDS[8:11] * 40)}] * 5)
    workdir = folder / f"apart-{flag.partition('=')[0]}"
    with Run(workdir, 2, 1, only={1: [f"--config.{flag.format(other=other)}"]}) as run:
        codes, errors = run.codes(DEADLINE), run.errors()
    assert codes == [2, 2] and all(
        named in err and "differ in what must be alike" in err for err in errors
    ), (codes, errors)
    assert not (workdir / "config.json").exists() and not (workdir / "metrics.jsonl").exists()


@pytest.mark.nightly
def test_divergence_ends_all_with_its_code(folder):
    """Breaks when a launcher would restart a run that diverges again."""
    flags = [
        "--config.optimizer.learning_rate=1e30",
        "--config.optimizer.warmup_steps=0",
        "--config.eval_examples=0",
    ]
    with Run(folder / "diverged", 2, 1, *flags) as run:
        assert run.codes() == [DIVERGED, DIVERGED], "\n".join(err[-3000:] for err in run.errors())
    assert "not finite" in run.errors()[0]
