"""Metrics files that survive restarts and kills; what TensorBoard shows of them."""

import json
import struct
import subprocess
import sys
import types

import pytest

from icae_jax.training import metrics

LINES = [
    {
        "step": 0,
        "eval": {"memory": {"ae": 4.0, "lm": 5.0}, "wrong_memory_k1": {"ae": 6.0}},
        "eval_loss": 4.5,
    },
    {
        "step": 2,
        "k": 4,
        "train": {"ae": 3.5},
        "grad_norm": 1.25,
        "learning_rate": 1e-3,
        "seconds": 2,
        "tokens_per_second": 64,
        "mfu": 0.5,
    },
    {
        "step": 4,
        "train": {"ae": 3.0},
        "grad_norm": 1.5,
        "learning_rate": 1e-3,
        "seconds": 0.5,
        "tokens_per_second": 128.0,
        "mfu": None,
    },
]


def steps(path):
    return [line["step"] for line in metrics.read_lines(path)]


def written(workdir, resume_step, *numbers):
    with metrics.MetricsFile(workdir, resume_step) as file:
        for n in numbers:
            file.write({"step": n, "loss": n / 2})
    return file.path


def shown(workdir):
    """{(tag, step): value} as TensorBoard shows them.

    It reads files by name; each session start but the first drops earlier events from its step on.
    """
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    found, sessions = [], 0
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:  # records of a length, its checksum, the data, and theirs
            (size,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + size])
            if event.session_log.status == SessionLog.START:
                found = [point for point in found if point[0][1] < event.step or not sessions]
                sessions += 1
            found += [((v.tag, event.step), v.simple_value) for v in event.summary.value]
            data = data[16 + size :]
    assert len(dict(found)) == len(found), "a step is shown twice"
    return dict(found)


def test_lines_past_the_resumed_step_are_dropped(tmp_path):
    """Breaks when steps done twice appear twice, or a resumed run loses the step that it resumed
    from.
    """
    path = written(tmp_path, -1, 0, 5, 10, 15)
    assert steps(path) == [0, 5, 10, 15]
    assert steps(written(tmp_path, 10, 12)) == [0, 5, 10, 12]
    assert steps(written(tmp_path, -1, 0)) == [0], "from scratch: nothing of an earlier run stays"


def test_a_line_cut_by_a_kill_is_dropped(tmp_path):
    """Breaks when a broken last line stops the run, or the next line is glued to it."""
    path = written(tmp_path, -1, 1, 2)
    path.write_text(path.read_text() + '{"step": 3, "lo')
    assert steps(path) == [1, 2]
    assert steps(written(tmp_path, 3, 4)) == [1, 2, 4]
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == [0.5, 1.0, 2.0]


def test_means_leave_out_objectives_without_labels():
    """Breaks when a batch without LM targets reports a loss of nan or 0."""
    assert metrics.means({"ae": 6.0, "lm": 0.0}, {"ae": 4.0, "lm": 0.0}) == {"ae": 1.5}


def test_lines_are_scalars_of_tensorboard_as_soon_as_they_are_written(tmp_path):
    """Breaks when a number is not shown, is shown at another step or only after a while, or the
    JSON lines are not what was given.
    """
    with metrics.MetricsFile(tmp_path, -1) as file:
        for line in LINES:
            file.write(line)
        found = shown(tmp_path)
    assert file.path.read_text() == "".join(json.dumps(line) + "\n" for line in LINES)
    train = {
        "k": 4,
        "train/ae": 3.5,
        "grad_norm": 1.25,
        "learning_rate": 1e-3,
        "seconds": 2,
        "tokens_per_second": 64,
        "mfu": 0.5,
    }
    want = {
        ("eval/memory/ae", 0): 4,
        ("eval/memory/lm", 0): 5,
        ("eval/wrong_memory_k1/ae", 0): 6,
        ("eval_loss", 0): 4.5,
    }
    want |= {(tag, 2): value for tag, value in train.items()}
    want |= {
        ("train/ae", 4): 3,
        ("grad_norm", 4): 1.5,
        ("learning_rate", 4): 1e-3,
        ("seconds", 4): 0.5,
        ("tokens_per_second", 4): 128,
    }
    assert found == pytest.approx(want)


def test_a_resumed_run_shows_no_step_twice(tmp_path):
    """Breaks when steps past the resumed one stay on the page, that one or those before it go, or
    one file is written over another.
    """
    written(tmp_path, -1, 0, 5, 10, 15)
    written(tmp_path, 10, 12)
    assert shown(tmp_path) == {("loss", n): n / 2 for n in (0, 5, 10, 12)}
    with metrics.MetricsFile(tmp_path, 5):
        assert shown(tmp_path) == {("loss", n): n / 2 for n in (0, 5)}, "as soon as it starts"
    written(tmp_path, -1, 0)
    assert shown(tmp_path) == {("loss", 0): 0}


def test_no_import_of_tensorboard_before_it_is_needed():
    """Breaks when a command that trains nothing waits for it to load."""
    subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, icae_jax.training.metrics; sys.exit('tensorboardX' in sys.modules)",
        ],
        check=True,
    )


def test_writing_metrics_imports_no_torch(tmp_path, monkeypatch):
    """Breaks when training imports PyTorch through tensorboardX, or hides it from later imports."""
    for name in [
        name for name in sys.modules if name.partition(".")[0] in ("tensorboardX", "torch")
    ]:
        monkeypatch.delitem(sys.modules, name)
    tried = []
    monkeypatch.setattr(
        sys,
        "meta_path",
        [types.SimpleNamespace(find_spec=lambda name, *_: tried.append(name)), *sys.meta_path],
    )
    metrics.MetricsFile(tmp_path, -1).close()
    assert "tensorboardX" in tried and "torch" not in tried and "torch" not in sys.modules
