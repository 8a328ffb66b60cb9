"""Compilations in processes of their own: what is told of one that fails, dies or does not fit."""

import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from icae_jax import errors
from icae_jax.performance import worker

RUN = subprocess.run


def made_of(monkeypatch, code):
    """Has `worker.ask` run this code in the worker's place; its output is the worker's."""
    monkeypatch.setattr(
        worker.subprocess, "run", lambda command, **given: RUN([command[0], "-c", code], **given)
    )


def test_an_answer_among_other_output(monkeypatch):
    """Breaks when a library's output is taken for the answer, or the process gets other devices."""
    code = (
        "import json, os, pickle, sys; r = pickle.load(sys.stdin.buffer)\n"
        "print('a library, loading'); r['env'] = dict(os.environ)\n"
        f"print({worker.MARK!r} + json.dumps(r)); print('goodbye')"
    )
    made_of(monkeypatch, code)
    monkeypatch.setenv("XLA_FLAGS", "--of_the_caller")
    answer = worker.ask({"kind": "host", "n": 3}, 12)
    assert answer["n"] == 3 and answer["env"]["JAX_PLATFORMS"] == "cpu"
    assert (
        "device_count=12" in answer["env"]["XLA_FLAGS"]
        and "of_the_caller" not in answer["env"]["XLA_FLAGS"]
    )


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (
            "import os; os.kill(os.getpid(), 9)",
            r"\.worker failed \(SIGKILL, usually because this machine ran out of memory\): $",
        ),
        (
            "import os, sys; print('bad fold', file=sys.stderr); os.abort()",
            r"icae_jax\.performance\.worker failed \(SIGABRT\): bad fold",
        ),
        (
            "import sys; sys.stderr.write('x' * 9000 + 'the end'); sys.exit(4)",
            r"icae_jax\.performance\.worker failed \(exit code 4\): x{1993}the end$",
        ),
        ("print('no answer')", r"icae_jax\.performance\.worker failed \(exit code 0\)"),
    ],
    ids=["killed", "aborted", "much output", "no answer"],
)
def test_a_process_that_dies(monkeypatch, code, said):
    """Breaks when a crash is taken for a program that does not fit, or its reason is lost."""
    made_of(monkeypatch, code)
    with pytest.raises(RuntimeError, match=said) as caught:
        worker.ask({"kind": "host"})
    assert not errors.is_users(caught.value)


def test_answers_that_are_errors(monkeypatch):
    """Breaks when a program that does not fit looks like bad input, or the reverse."""
    made_of(monkeypatch, f'print({worker.MARK!r} + \'{{"out_of_memory": "Used 2G of 1G hbm"}}\')')
    with pytest.raises(worker.OutOfMemory, match=r"^Used 2G of 1G hbm$"):
        worker.ask({})
    made_of(monkeypatch, f'print({worker.MARK!r} + \'{{"error": "--topology v"}}\')')
    with pytest.raises(errors.UserError, match=r"^--topology v$"):
        worker.ask({})
    assert not issubclass(worker.OutOfMemory, ValueError)


def test_an_exception_of_the_real_worker():
    """Breaks when a failure in the worker's own code is not seen."""
    with pytest.raises(RuntimeError, match=r"(?s)exit code 1.*Traceback.*KeyError: 'gpu'"):
        worker.ask({"kind": "gpu"})


def gone(pid):
    return not pathlib.Path(f"/proc/{pid}").exists()


@pytest.mark.skipif(
    not pathlib.Path("/proc/self/status").exists(),
    reason="processes are looked for in /proc, which is not here",
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_no_worker_outlives_its_caller(number, tmp_path):
    """Breaks when Ctrl-C or a job's end leaves a compilation behind that goes on for minutes."""
    busy = (
        "import os, pathlib, time; from icae_jax.performance import worker\n"
        f"pid = pathlib.Path({str(tmp_path / 'pid')!r})\n"
        "def wait(topology):\n"
        "    pid.write_text(str(os.getpid()))\n"
        "    time.sleep(60)\n"
        "worker.KINDS['topology'] = wait\n"
        "worker.answer_request(worker.KINDS)"
    )
    caller = (
        "import signal, subprocess; from icae_jax.performance import worker; run = subprocess.run\n"
        # Jobs in the background inherit that the signal is ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "worker.subprocess.run = lambda command, **given: "
        f"run([command[0], '-c', {busy!r}], **given)\n"
        "worker.ask({'kind': 'topology', 'topology': 'v5e:2x2'})"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", caller], stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        for _ in range(300):
            if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
                break
            time.sleep(0.1)
        pid = int((tmp_path / "pid").read_text())
        assert not gone(pid)
        process.send_signal(number)
        process.communicate(timeout=20)
        for _ in range(100):
            if gone(pid):
                break
            time.sleep(0.1)
        assert gone(pid)
    finally:
        process.kill()
        process.communicate()


# -------------------------------------------------------------------------------------- with libtpu


@pytest.mark.nightly
def test_topologies(monkeypatch):
    """Breaks when a topology that does not exist is taken, or its devices are single cores."""
    pytest.importorskip("libtpu", reason="needs libtpu, which is not installed")
    assert worker.ask({"kind": "topology", "topology": "v5e:2x4"}) == {
        "kind": "TPU v5 lite",
        "chips": 8,
    }
    bad = {
        "v5e": "invalid",
        "v9z:2x2": "Invalid TPU",
        "v5e:3x5": "not divisible",
        "v3:2x2": "single cores",
    }
    with pytest.raises(ValueError, match=r"^--topology v3:2x2: .*single cores"):
        worker.ask({"kind": "topology", "topology": "v3:2x2"})
    made_of(  # all in one process
        monkeypatch,
        "import json; from icae_jax.performance import worker\n"
        f"answers = {{name: worker.KINDS['topology'](name) for name in {list(bad)!r}}}\n"
        "print(worker.MARK + json.dumps(answers))",
    )
    for name, answer in worker.ask({}).items():
        assert (
            re.search(rf"^--topology {name}: .*{bad.pop(name)}", answer["error"])
            and "\n" not in answer["error"]
        )
    assert not bad
