"""Sweeps: points, their training, what stops a sweep, jobs, and a whole sweep on a tiny base."""

import json
import os
import pathlib
import re
import runpy
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, WORDS, write_jsonl

from icae_jax.cli import main as cli
from icae_jax.compression import method as methods
from icae_jax.errors import UserError
from icae_jax.training import config_file, metrics
from icae_jax.training.checkpoint import Checkpoints
from icae_jax.training.config import TrainConfig
from icae_jax.training.train import DIVERGED, PREEMPTED
from icae_jax.workflows import sweep, sweep_jobs, sweep_points

RAW = {
    "phase": "pretrain",
    "base": "base",
    "init_from": "",
    "steps": 3,
    "batch_size": 4,
    "log_every": 1,
    "eval_every": 2,
    "eval_examples": 4,
    "seed": 0,
    "compression": {"k": 4, "rate": 4.0, "layout": ""},
    "lora": {"rank": 4, "targets": ("q_proj", "v_proj")},
    "objectives": {"ae": 0.5, "lm": 0.5},
    "optimizer": {"learning_rate": 1e-2, "warmup_steps": 1},
    "data": {
        "train": "train.jsonl",
        "eval": "eval.jsonl",
        "context_lengths": (16,),
        "cache_dir": "",
    },
}
RANKS = """
def sweep_rank(add):
    for rank in (2, 4, 8):
        add(**{"lora.rank": rank})
"""


def write_config(folder, sweeps=RANKS, raw=RAW):
    """A configuration file with sweeps, as text; its argument is the seed."""
    path = folder / "tiny.py"
    text = (
        "from ml_collections import ConfigDict\n\n"
        'def get_config(arg="0"):\n'
        f'    return ConfigDict({{**{raw!r}, "seed": int(arg)}})\n'
    )
    path.write_text(text + sweeps)
    return str(path)


def plan(config, folder, name="rank", **overrides):
    return sweep_points.make_points(config, name, folder, overrides)


# ---------------------------------------------------------------------------------------- expansion


@pytest.mark.parametrize(
    ("points", "names"),
    [
        (
            [{"compression.k": k, "compression.rate": 512 / k, "lora.rank": 8} for k in (64, 96)],
            ["k=64,rate=8", "k=96,rate=5.33333"],
        ),
        ([{"lora.rank": 8}], ["rank=8"]),
        ([{}, {"optimizer.learning_rate": 1e-4}], ["unchanged", "learning_rate=0.0001"]),
        (
            [
                {"compression.method": "icae", "optimizer.name": "muon"},
                {"compression.method": "x500", "optimizer.name": "muon"},
            ],
            ["method=icae", "method=x500"],
        ),
        (
            [{"a.name": 1, "b.name": 2}, {"a.name": 2, "b.name": 1}],
            ["a.name=1,b.name=2", "a.name=2,b.name=1"],
        ),
        (
            [{"data.train": "../a b.jsonl"}, {"data.train": "../a$b.jsonl"}],
            ["train=.._a_b.jsonl", "train=.._a_b.jsonl-1"],
        ),
        (
            [{"data.context_lengths": (16, 32)}, {"data.context_lengths": ()}],
            ["context_lengths=16+32", "context_lengths="],
        ),
    ],
)
def test_names(points, names):
    """Breaks when points share a folder, or a name needs quoting or holds what all points have."""
    assert sweep_points.point_names(points) == names


BAD = {
    "no such sweep": (
        "rank",
        "def sweep_k(add): pass\ndef sweep_lr(add): pass",
        [],
        r"--sweep rank: .*tiny\.py has k, lr$",
    ),
    "no sweeps": ("rank", "", [], r"tiny\.py has no sweeps; define sweep_NAME"),
    "no points": ("k", "def sweep_k(add): pass", [], r"sweep_k of .* adds no points"),
    "no such field": (
        "k",
        "def sweep_k(add): add(**{'compression.kk': 1})",
        [],
        r"sweep k, point kk=1: compression\.kk is not a field",
    ),
    "no such group": (
        "k",
        "def sweep_k(add): add(**{'compresion.k': 1})",
        [],
        r"compresion\.k is not a field",
    ),
    "a group": ("k", "def sweep_k(add): add(compression=1)", [], r"compression is not a field"),
    "a field of a field": (
        "k",
        "def sweep_k(add): add(**{'steps.k': 1})",
        [],
        r"steps\.k is not a field",
    ),
    "wrong type": (
        "k",
        "def sweep_k(add): add(**{'lora.rank': 1.5})",
        [],
        r"point rank=1\.5: config\.lora\.rank is 1\.5; expected int",
    ),
    "impossible value": (
        "k",
        "def sweep_k(add): add(**{'lora.rank': 4}); add(**{'lora.rank': 0})",
        [],
        r"point rank=0: lora\.rank is 0",
    ),
    "listed twice": (
        "k",
        "def sweep_k(add): add(**{'lora.rank': 2}); add(**{'lora.rank': 2})",
        [],
        r"same configuration as point rank=2",
    ),
    "the default": (
        "k",
        "def sweep_k(add): add(**{'lora.rank': 4}); add()",
        [],
        r"unchanged: the same configuration as point rank=4",
    ),
    "set twice": (
        "rank",
        RANKS,
        ["--config.lora.rank=4"],
        r"lora\.rank is set by the sweep itself; leave out --config\.lora\.rank",
    ),
    "not held out": (
        "rank",
        RANKS,
        ["--config.data.eval="],
        r"data\.eval .*not set; .*give --config\.data\.eval=PATH",
    ),
    "unknown override": (
        "rank",
        RANKS,
        ["--config.lorra.rank", "4"],
        r"lorra\.rank is not a field .*; is lora\.rank meant",
    ),
    "unknown flag": (
        "rank",
        RANKS,
        ["--step=4"],
        r"unknown argument '--step=4'; fields are set by",
    ),
    "nothing to sum up": ("rank", RANKS, ["--table"], r"--workdir .* holds no sweep"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_named_before_anything_runs(name, tmp_path, monkeypatch, capsys):
    """Breaks when one bad point is found out after the others were trained."""
    asked, sweeps, flags, message = BAD[name]
    monkeypatch.setattr(sweep, "train_points", lambda *_: pytest.fail("a point was trained"))
    argv = [
        "sweep",
        "--config",
        write_config(tmp_path, sweeps),
        "--sweep",
        asked,
        "--workdir",
        str(tmp_path / "w"),
        *flags,
    ]
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert re.search(message, err.strip()), err
    assert not (tmp_path / "w").exists()


SHIPPED = [
    (name, key.removeprefix("sweep_"))
    for name in ("icae", "x500", "best", "quickstart")
    for key in runpy.run_path(str(ROOT / "configs" / f"{name}.py"))
    if key.startswith("sweep_")
]


@pytest.mark.parametrize(("name", "of"), SHIPPED)
def test_sweeps_of_the_configurations(name, of, tmp_path):
    """Breaks when a shipped sweep has a wrong field, or `icae train` reads its flags otherwise."""
    given = {"data.train": "train.jsonl", "data.eval": "eval.jsonl", "base": "base"}
    for arg in (
        "pretrain",
        *(["finetune"] if of in ("rank", "learning_rate") else []),
        *(["llama3_8b"] if name != "quickstart" else []),
    ):
        if arg == "llama3_8b":
            given.pop("base")
        points = plan(
            f"{ROOT}/configs/{name}.py:{arg}",
            tmp_path,
            of,
            **given,
            **({"init_from": "w/{point}"} if arg == "finetune" else {}),
        )
        assert len(points) > 1
        for point in points:
            assert point.command[0] == "train" and point.folder == tmp_path / point.name
            assert point.command[3:5] == ["--workdir", str(point.folder)]
            overrides = config_file.overrides(point.command[5:])
            config = config_file.load(TrainConfig, point.command[2], overrides)
            assert config.init_from == (f"w/{point.name}" if arg == "finetune" else "")
            assert (
                config.compression == point.config.compression
                and config.objectives == point.config.objectives
            )
            assert (config.lora, config.optimizer, config.data) == (
                point.config.lora,
                point.config.optimizer,
                point.config.data,
            )
        if of == "k":
            assert len({p.config.compression.segment_tokens for p in points}) == 1
        if of == "rate":
            assert all(
                p.config.data.context_lengths == (p.config.compression.segment_tokens,)
                for p in points
            )
        if of == "method":  # sweeps begun before go on in their folders
            compressions = {p.name: p.config.compression for p in points}
            assert {c.method: c.layout for c in compressions.values()} == {
                "icae": "servable",
                "pooled": "servable",
                "sac": "uniform",
                "x500": "clean",
            }
            assert {n: c.encoder_mask for n, c in compressions.items()} == {
                f"method={m}": methods.get(m).encoder_mask for m in methods.METHODS
            }


# ------------------------------------------------------------------------------ training the points


class Fake:
    """Stands for `icae train`: leaves what it would leave for a point's exit code."""

    def __init__(self, points, **codes):
        self.codes, self.called = (
            {p.name: codes.get(p.name.replace("=", ""), 0) for p in points},
            [],
        )

    def __call__(self, command):
        flags = dict(zip(command[1::2], command[2::2], strict=False))
        folder = pathlib.Path(flags["--workdir"])
        self.called.append(folder.name)
        folder.mkdir(exist_ok=True, parents=True)
        if self.codes[folder.name] == 0:
            (folder / "DONE").write_text("3\n")
        return self.codes[folder.name]


@pytest.mark.parametrize(
    ("code", "ends", "goes_on", "again"),
    [
        (0, 0, True, []),
        (3, 0, True, []),
        (1, 1, True, ["rank=4"]),
        (-9, 1, True, ["rank=4"]),
        (134, 1, True, ["rank=4"]),
        (137, 1, True, ["rank=4"]),
        (2, 2, False, ["rank=4", "rank=8"]),
        (75, 75, False, ["rank=4", "rank=8"]),
    ],
)
def test_exit_codes_of_a_point(code, ends, goes_on, again, tmp_path):
    """Breaks when a sweep goes on or stops where it should not, or trains an ended point again."""
    points = plan(write_config(tmp_path), tmp_path / "w")
    fake, lines = Fake(points, rank4=code), []
    got, codes = sweep.train_points(points, fake, lines.append)
    assert got == ends and fake.called == ["rank=2", "rank=4", "rank=8"][
        : 3 if goes_on else 2
    ] == list(codes)
    second = Fake(points)
    assert sweep.train_points(points, second, lines.append)[0] == 0 and second.called == again
    if code == DIVERGED:
        assert points[1].state == "diverged" and f"delete {points[1].folder}" in "".join(lines)
        (points[1].folder / sweep_points.DIVERGED_NOTE).unlink()
        points[1].folder.rmdir()
        assert sweep.train_points(points, second, lines.append)[0] == 0 and second.called == [
            "rank=4"
        ]
    assert [p.state for p in points] == ["done"] * 3


def test_a_longer_sweep_trains_on(tmp_path):
    """Breaks when DONE of fewer steps counts as done."""
    config = write_config(tmp_path)
    points = plan(config, tmp_path / "w")
    sweep.train_points(points, Fake(points), print)
    longer = plan(config, tmp_path / "w", steps="4")
    assert [p.state for p in longer] == ["unfinished"] * 3
    fake = Fake(longer)
    sweep.train_points(longer, fake, print)
    assert len(fake.called) == 3


def identity(config, name="rank", **overrides):
    points = plan(config, pathlib.Path("w"), name, **overrides)
    return {
        "config": pathlib.Path(config).name,
        "sweep": name,
        "overrides": overrides,
        "points": {p.name: p.changes for p in points},
    }


def test_the_folder_of_another_sweep_is_refused(tmp_path):
    """Breaks when points of two sweeps are compared, or a sweep that moved or grew is refused."""
    other = (
        RANKS
        + "def sweep_data(add):\n"
        + '    add(**{"data.context_lengths": [16]})\n'
        + '    add(**{"data.context_lengths": (16, 32)})\n'
    )
    config = write_config(tmp_path, other)
    for name in ("rank", "data"):
        (tmp_path / name).mkdir()
        for free in ({}, {"steps": "9"}, {"data.train": "elsewhere.jsonl", "log_every": "2"}):
            sweep.claim(tmp_path / name, identity(config, name, **free))
    for changed, message in (
        (identity(config + ":1"), "config: 'tiny.py' -> 'tiny.py:1'"),
        (identity(config, "data"), "sweep: 'rank' -> 'data'"),
        (identity(config, seed="1"), r"--config\.seed: None -> '1'"),
        (
            identity(write_config(tmp_path, RANKS.replace("(2, 4, 8)", "(2, 8)"))),
            r"point rank=4: \{'lora\.rank': 4\} -> None",
        ),
    ):
        with pytest.raises(
            ValueError, match=rf"rank holds another sweep: {message}.*or another --workdir"
        ):
            sweep.claim(tmp_path / "rank", changed)
    sweep.claim(tmp_path / "rank", identity(write_config(tmp_path, RANKS.replace("(2,", "(1, 2,"))))
    assert list(json.loads((tmp_path / "rank" / "sweep.json").read_text())["points"]) == [
        "rank=1",
        "rank=2",
        "rank=4",
        "rank=8",
    ]
    (tmp_path / "rank" / "sweep.json").write_text(
        '{"config": "tiny.py", "sweep": "rank", "points": []}'
    )
    with pytest.raises(UserError, match=r"sweep\.json: overrides missing"):
        sweep.claim(tmp_path / "rank", identity(config))


# --------------------------------------------------------------------------------------------- jobs


def test_jobs_train_each_unfinished_point(tmp_path, monkeypatch, capsys):
    """Breaks when a job's quoting, folder or number is wrong, or it trains an ended point."""
    here, jobs = tmp_path / "a folder", tmp_path / "my jobs"
    here.mkdir()
    monkeypatch.chdir(here)
    write_config(here)
    sweep_of = [
        "sweep",
        "--config",
        "tiny.py",
        "--sweep",
        "rank",
        "--workdir",
        "it's w",
        "--config.lora.targets=('q_proj', 'k_proj')",
    ]
    assert cli.main([*sweep_of, "--jobs", str(jobs)]) == 0
    out = capsys.readouterr().out
    assert "--array=0-2" in out and "icae sweep --config tiny.py" in out
    icae = tmp_path / "bin" / "icae"
    icae.parent.mkdir()
    icae.write_text(
        "#!/bin/sh\n"
        f'pwd >> "{tmp_path}/called"\nprintf "<%s>" "$@" >> "{tmp_path}/called"\nexit 7\n'
    )
    icae.chmod(0o755)
    environment = os.environ | {"PATH": f"{icae.parent}:{os.environ['PATH']}"}
    written = sorted(jobs.glob("*.sh"))
    assert [p.name for p in written] == ["point-000.sh", "point-001.sh", "point-002.sh"]
    assert (
        subprocess.run(
            ["bash", "-c", '"$0"', str(written[1])], cwd=tmp_path, env=environment
        ).returncode
        == 7
    )
    called = (tmp_path / "called").read_text()
    assert called == (
        f"{here}\n<train><--config><tiny.py><--workdir><it's w/rank=4>"
        "<--config.lora.targets=('q_proj', 'k_proj')><--config.lora.rank=4>"
    )
    monkeypatch.chdir(tmp_path)
    launch = re.search(
        r"sbatch --array=0-2 (launch/slurm.sbatch) (--jobs .*)\n", out
    )  # the launcher finds the jobs by their names
    ran = f"bash {ROOT}/{launch.group(1)} --dry_run {launch.group(2)}"
    shown = subprocess.run(
        ["bash", "-c", ran],
        capture_output=True,
        text=True,
        env=environment | {"SLURM_ARRAY_TASK_ID": "2"},
    ).stdout
    assert "my\\ jobs/point-002.sh" in shown and "rank=8" in written[2].read_text()
    monkeypatch.chdir(here)

    texts = [path.read_text() for path in written]
    for name, note in (
        ("rank=2", "DONE"),
        ("rank=4", sweep_points.DIVERGED_NOTE),
    ):  # whatever is done already, a task of the array trains its own point
        (here / "it's w" / name).mkdir()
        (here / "it's w" / name / note).write_text("3\n")
    assert cli.main([*sweep_of, "--jobs", str(jobs), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "jobs": [str(path) for path in written],
        "left": [2],
    }
    assert [path.read_text() for path in written] == texts and sorted(jobs.glob("*.sh")) == written
    (tmp_path / "called").unlink()
    for path, said in zip(
        written,
        ("rank=2: done already", "rank=4: diverged already, to try again delete it's w/rank=4"),
        strict=False,
    ):
        out = subprocess.run(
            ["bash", str(path)], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert (out.returncode, out.stdout, out.stderr) == (0, said + "\n", "")
    assert not (tmp_path / "called").exists()
    assert (
        cli.main([*sweep_of, "--jobs", str(jobs), "--config.steps=4"]) == 0
    )  # longer: what is done at three steps goes on
    assert "--array=0,2 " in capsys.readouterr().out
    assert subprocess.run(["bash", str(written[0])], cwd=tmp_path, env=environment).returncode == 7
    (here / "it's w" / "rank=2" / "DONE").write_text(
        "half\n"
    )  # damaged: not done, for the sweep and for the job
    assert cli.main([*sweep_of, "--jobs", str(jobs), "--json"]) == 0 and json.loads(
        capsys.readouterr().out
    )["left"] == [0, 2]
    assert subprocess.run(["bash", str(written[0])], cwd=tmp_path, env=environment).returncode == 7


def test_a_job_keeps_its_point_when_the_sweep_grows(tmp_path, capsys):
    """Breaks when a new point gives a queued or requeued task of the array another's point."""
    jobs = tmp_path / "jobs"

    def write(ranks):
        config = write_config(tmp_path, RANKS.replace("(2, 4, 8)", ranks))
        where = ["--workdir", str(tmp_path / "w"), "--jobs", str(jobs)]
        assert cli.main(["sweep", "--config", config, "--sweep", "rank", *where, "--json"]) == 0
        left = json.loads(capsys.readouterr().out)["left"]
        return left, [
            re.search(r"^# (.*)$", path.read_text(), re.MULTILINE)[1]
            for path in sorted(jobs.glob("*.sh"))
        ]

    assert write("(2, 8)") == ([0, 1], ["rank=2", "rank=8"])
    assert write("(1, 2, 4, 8)") == ([0, 1, 2, 3], ["rank=2", "rank=8", "rank=1", "rank=4"])
    assert write("(16, 8, 4, 2, 1)") == (
        [0, 1, 2, 3, 4],
        ["rank=2", "rank=8", "rank=1", "rank=4", "rank=16"],
    )
    recorded = json.loads((tmp_path / "w" / "sweep.json").read_text())
    recorded.pop("numbers")  # as it was before points had numbers: by their order
    (tmp_path / "w" / "sweep.json").write_text(json.dumps(recorded))
    assert write("(3, 16, 8, 4, 2, 1)")[1] == [
        "rank=16",
        "rank=8",
        "rank=4",
        "rank=2",
        "rank=1",
        "rank=3",
    ]


@pytest.mark.parametrize(
    ("numbers", "text"), [([0], "0"), ([0, 1, 2], "0-2"), ([5, 0, 1, 3, 6], "0-1,3,5-6"), ([], "")]
)
def test_numbers_as_an_array(numbers, text):
    """Breaks when a task is left out or started for a point that is done."""
    assert sweep_jobs.array_ranges(numbers) == text


# ----------------------------------------------------------------------------------- with real runs


@pytest.fixture(scope="module")
def real(tiny_base, tmp_path_factory):
    """(a configuration file on the tiny base with data, its folder)."""
    folder = tmp_path_factory.mktemp("sweep")
    rng = np.random.default_rng(0)

    def texts(count):
        return [{"text": " ".join(rng.choice(WORDS[8:], size=40))} for _ in range(count)]

    data = {
        "train": write_jsonl(folder / "train.jsonl", texts(8)),
        "eval": write_jsonl(folder / "eval.jsonl", texts(4)),
    }
    data = RAW["data"] | data | {"cache_dir": str(folder / "cache")}
    return write_config(
        folder, RANKS.replace("(2, 4, 8)", "(2, 4)"), RAW | {"base": str(tiny_base), "data": data}
    ), folder


@pytest.mark.nightly
def test_a_whole_sweep(real, tmp_path, monkeypatch, capfd):
    """Breaks when a point is not trained, is misreported, or is trained again by a second call."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    config, _ = real
    command = ["sweep", "--config", config, "--sweep", "rank", "--workdir", str(tmp_path)]
    assert cli.main([*command, "--json"]) == 0
    results = json.loads(capfd.readouterr().out)
    assert results == json.loads((tmp_path / "results.json").read_text()) and results["fields"] == [
        "lora.rank"
    ]
    for point, rank in zip(results["points"], (2, 4), strict=True):
        lines = metrics.read_lines(tmp_path / f"rank={rank}" / "metrics.jsonl")
        last = [line for line in lines if "eval" in line][-1]
        assert (point["point"], point["state"], point["exit_code"], point["steps"]) == (
            f"rank={rank}",
            "done",
            0,
            3,
        )
        assert (
            point["held_out"] == last["eval"]
            and point["eval_loss"] == last["eval_loss"]
            and last["step"] == 3
        )
        assert (
            point["train"] == [line for line in lines if "train" in line][-1]["train"]
            and point["tokens_per_second"] > 0
        )
        assert (
            json.loads((tmp_path / f"rank={rank}" / "config.json").read_text())["lora.rank"] == rank
        )
    assert results["points"][0]["eval_loss"] != results["points"][1]["eval_loss"]

    monkeypatch.setattr(
        sweep.Trainer, "__call__", lambda *_: pytest.fail("a point was trained again")
    )
    assert cli.main(command) == 0
    out = capfd.readouterr().out
    assert (
        f"{results['points'][1]['held_out']['wrong_memory']['lm']:.4f}" in out and "rank=4" in out
    )
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG") and "<img" in (
        tmp_path / "report.html"
    ).read_text()


@pytest.mark.nightly
def test_sigterm_reaches_the_point_first(real, tmp_path):
    """Breaks when a preempted sweep leaves its point without a checkpoint, or starts another."""
    config, _ = real
    command = [
        sys.executable,
        "-m",
        "icae_jax",
        "sweep",
        "--config",
        config,
        "--sweep",
        "rank",
        "--workdir",
        str(tmp_path),
    ]
    process = subprocess.Popen(
        [*command, "--config.steps=100000", "--config.eval_every=100000"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    path, deadline = tmp_path / "rank=2" / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and any(line["step"] > 0 for line in metrics.read_lines(path)):
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == PREEMPTED, err[-2000:]
    saved = re.search(r"SIGTERM: saved step (\d+)", err)
    assert saved and Checkpoints(tmp_path / "rank=2").latest() == int(saved.group(1))
    assert not (tmp_path / "rank=4").exists() and not (tmp_path / "results.json").exists()


def test_sigterm_ends_a_sweep_whatever_the_point_makes_of_it(tmp_path):
    """Breaks when a point that dies of the signal, or ends in time, lets the next one start."""
    script = """
import os, signal, sys, threading
from icae_jax.workflows.sweep import Trainer
sys.executable = sys.argv[1]
with Trainer() as call:
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    print(call([]), call([]))
"""
    slow = tmp_path / "slow"
    slow.write_text(f"#!/bin/sh\necho started >> {tmp_path}/log\nexec sleep 30\n")
    slow.chmod(0o755)
    command = [sys.executable, "-c", script, str(slow)]
    out = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=25,
    )
    assert out.stdout.split() == ["75", "75"], out.stderr
    assert (tmp_path / "log").read_text() == "started\n"


def test_the_sweep_itself_takes_no_accelerator(tmp_path):
    """Breaks when the sweep's own process starts a JAX backend, which would hold the TPUs."""
    command = [
        "sweep",
        "--config",
        write_config(tmp_path),
        "--sweep",
        "rank",
        "--workdir",
        str(tmp_path),
    ]
    both = [[*command, "--jobs", str(tmp_path / "jobs")], [*command, "--table"]]
    code = (
        "from icae_jax.cli import main as cli\n"
        f"assert [cli.main(command) for command in {both!r}] == [0, 0]"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "absent"}
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert out.returncode == 0, out.stderr
