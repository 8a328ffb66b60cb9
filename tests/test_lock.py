"""One writer of a folder: who is refused, who is waited for, and how a lock ends."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT

from icae_jax import lock
from icae_jax.errors import UserError

HOLDER = """
import contextlib, os, sys, time
from icae_jax import lock

lock.BEAT_SECONDS, lock.SETTLING_SECONDS = 0.05, 0.01
if "shared" in sys.argv:
    lock._is_local = lambda folder: False
with lock.only_writer(sys.argv[1], "--workdir") as held:
    print(flush=True)
    for line in sys.stdin:
        held.leave() if line == "leave\\n" else exec(line)
"""


@pytest.fixture
def holders():
    """A function that starts a process which holds a folder's lock until told otherwise on its
    stdin.
    """
    with contextlib.ExitStack() as stack:

        def start(folder, *how):
            pipes = {
                "stdin": subprocess.PIPE,
                "stdout": subprocess.PIPE,
                "text": True,
                "bufsize": 1,
            }
            command = [sys.executable, "-c", HOLDER, str(folder), *how]
            process = stack.enter_context(
                subprocess.Popen(command, **pipes, env=os.environ | {"PYTHONPATH": str(ROOT)})
            )
            stack.callback(process.kill)
            process.stdout.readline()
            return process

        yield start


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Times for tests."""
    for name, seconds in {
        "BEAT": 0.05,
        "STALE": 0.6,
        "LEAVING": 20.0,
        "ENDING": 0.1,
        "SETTLING": 0.01,
        "POLL": 0.02,
    }.items():
        monkeypatch.setattr(lock, f"{name}_SECONDS", seconds)


@pytest.fixture
def shared(monkeypatch):
    """Simulates a disk that several hosts share, each with flocks of its own."""
    monkeypatch.setattr(lock, "_is_local", lambda folder: False)
    monkeypatch.setattr(lock, "_boot", lambda: "another host's")


def take(folder):
    """Takes a folder's lock, and gives it back."""
    with lock.only_writer(folder, "--workdir") as held:
        held.check()
        return json.loads(held.path.read_text())


def refused(folder):
    with pytest.raises(UserError) as raised, lock.only_writer(folder, "--workdir"):
        pass
    return str(raised.value)


@pytest.mark.parametrize("how", ["local", "shared"])
def test_another_process_is_refused_and_told_who_has_it(how, holders, tmp_path, request):
    """Breaks when two processes write one folder, the message does not name the holder, or the
    folder changes.
    """
    if how == "shared":
        request.getfixturevalue("shared")
    holder = holders(tmp_path, how)
    before = os.listdir(tmp_path)
    message = refused(tmp_path)
    assert re.search(
        rf"--workdir {tmp_path} is in use: process {holder.pid} on \S+, since 2\S+ \S+ \(-c .*\), "
        "is writing there",
        message,
    )
    assert (
        f"kill {holder.pid} on" in message
        and "\n" not in message
        and os.listdir(tmp_path) == before
    )
    holder.stdin.close()
    holder.wait()
    assert os.listdir(tmp_path) == [], "the lock's file goes with the lock"
    assert take(tmp_path)["pid"] == os.getpid()


@pytest.mark.parametrize("how", ["exception", "kill"])
def test_a_lock_ends_with_its_process(how, holders, tmp_path, capsys):
    """Breaks when the lock of a run that failed or was killed must be waited for or removed by
    hand, on its own host.
    """
    holder = holders(tmp_path)
    if how == "kill":
        holder.send_signal(signal.SIGKILL)
    else:
        holder.stdin.write("raise SystemExit(3)\n")
    holder.wait()
    assert (tmp_path / lock.NAME).exists() == (how == "kill")
    assert take(tmp_path)["pid"] == os.getpid() and capsys.readouterr().err == ""


def test_the_dead_of_another_host_are_waited_for_and_passed_over(holders, tmp_path, shared, capsys):
    """Breaks when a run that a power loss ended needs a person, starts before the other is known to
    be dead, or does so silently.
    """
    holder = holders(tmp_path, "shared")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    began = time.monotonic()
    assert take(tmp_path)["pid"] == os.getpid() and time.monotonic() - began >= lock.STALE_SECONDS
    first, second = capsys.readouterr().err.splitlines()
    assert (
        f"process {holder.pid} on" in first
        and "waiting up to 0.6 s" in first
        and "is dead: no heartbeat" in second
    )


def test_the_dead_of_this_host_are_not_waited_for_on_a_shared_disk(
    holders, tmp_path, monkeypatch, capsys
):
    """Breaks when a job that restarts on its node waits for its own dead process."""
    monkeypatch.setattr(lock, "_is_local", lambda folder: False)
    holder = holders(tmp_path, "shared")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert take(tmp_path)["pid"] == os.getpid() and capsys.readouterr().err == ""


@pytest.mark.parametrize("how", ["local", "shared"])
def test_whoever_leaves_is_waited_for(how, holders, tmp_path, request, capsys):
    """Breaks when a job is refused because its first copy is still saving: no launcher would retry
    it.
    """
    if how == "shared":
        request.getfixturevalue("shared")
    holder = holders(tmp_path, how)
    holder.stdin.write("leave\n")
    while not json.loads((tmp_path / lock.NAME).read_text())["leaving"]:
        time.sleep(0.01)
    threading.Timer(1.0, holder.stdin.close).start()
    assert take(tmp_path)["pid"] == os.getpid() and holder.wait() == 0
    assert (
        f"process {holder.pid} on" in (err := capsys.readouterr().err)
        and "has been told to end, and is saving" in err
    )


def test_one_who_never_leaves_is_not_waited_for_for_ever(holders, tmp_path, monkeypatch):
    """Breaks when a job waits forever for a process that hangs while saving."""
    monkeypatch.setattr(lock, "LEAVING_SECONDS", 0.2)
    holder = holders(tmp_path)
    holder.stdin.write("leave\n")
    while not json.loads((tmp_path / lock.NAME).read_text())["leaving"]:
        time.sleep(0.01)
    assert "is in use" in refused(tmp_path)


def test_a_process_that_was_passed_over_stops(holders, tmp_path, shared):
    """Breaks when a process on a machine that was suspended for an hour goes on to write where
    another took over.
    """
    holder = holders(tmp_path, "shared")
    holder.send_signal(signal.SIGSTOP)
    with lock.only_writer(tmp_path, "--workdir") as held:
        holder.send_signal(signal.SIGCONT)
        time.sleep(0.3)
        holder.stdin.write("held.check()\n")
        assert holder.wait(10) == 1
        held.check()
        assert held.path.exists(), "what is another's is not removed"


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", '{"pid": 1}', "garbage " * 999, "\0" * 99, "[" * 10**5]
)
def test_what_a_crash_left_is_no_lock(content, tmp_path, capsys):
    """Breaks when an empty, truncated or unknown lock file keeps a run from starting, or its
    content outlives the next record.
    """
    (tmp_path / lock.NAME).write_text(content)
    assert take(tmp_path)["pid"] == os.getpid() and capsys.readouterr().err == ""


def test_threads_are_apart(tmp_path):
    """Breaks when two threads of a process hold one lock."""
    with lock.only_writer(tmp_path, "--workdir"):
        assert f"process {os.getpid()} on" in refused(tmp_path)


def test_a_forked_child_does_not_keep_the_lock(holders, tmp_path):
    """Breaks when a killed process seems to live on in its child, such as a data reader."""
    holder = holders(tmp_path)
    holder.stdin.write("os.fork() or (time.sleep(5), os._exit(0))\nprint(flush=True)\n")
    holder.stdout.readline()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert take(tmp_path)["pid"] == os.getpid()


def test_a_filesystem_without_flocks(holders, tmp_path, monkeypatch):
    """Breaks when a lock counts as free on a disk without flock, or can never be taken there."""
    monkeypatch.setattr(lock, "flock", lambda *_: None)
    monkeypatch.setattr(lock, "_is_local", lambda folder: False)
    holder = holders(tmp_path, "shared")
    assert f"process {holder.pid} on" in refused(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert take(tmp_path)["flock"] is False


def test_two_who_take_it_at_once(tmp_path, shared, monkeypatch):
    """Breaks when two that find the lock free on a shared disk both take it, or neither does."""
    monkeypatch.setattr(lock, "flock", lambda *_: None)
    monkeypatch.setattr(lock, "SETTLING_SECONDS", 0.2)
    monkeypatch.setattr(lock, "STALE_SECONDS", 5.0)
    ends, start, done = [], threading.Barrier(4), threading.Event()

    def run():
        start.wait()
        try:
            with lock.only_writer(tmp_path, "--workdir"):
                ends.append("held")
                done.wait(10)
        except UserError:
            ends.append("refused")
        if len(ends) == 4:
            done.set()

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 10
    while len(ends) < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    done.set()
    for thread in threads:
        thread.join()
    assert sorted(ends) == ["held", "refused", "refused", "refused"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    """Breaks when a lock file that cannot be created gives a traceback."""
    (tmp_path / lock.NAME).mkdir()
    assert re.match(
        rf"--workdir {tmp_path}: is a directory \({tmp_path}/.lock\); give a folder",
        refused(tmp_path),
    )
    (tmp_path / "file").touch()
    assert "--workdir" in refused(tmp_path / "file")


def test_what_is_a_local_disk(monkeypatch, tmp_path):
    """Breaks when a nested mount, or one whose name has a space, gets the outer mount's type."""
    mounts = (
        "22 1 0:1 / / rw - ext4 /dev/vda rw\n"
        "23 22 0:2 / /data rw - nfs4 host:/ rw\n"
        "24 23 0:3 / /data/my\\040disk rw - xfs /dev/b rw\n"
        "25 22 0:4 / /gcs rw - fuse.gcsfuse bucket rw\n"
    )
    monkeypatch.setattr(lock, "_read", lambda path: mounts)
    kinds = {
        "/home/w": True,
        "/data/w": False,
        "/data/my disk/w": True,
        "/gcs/w": False,
        "/database/w": True,
    }
    assert {path: lock._is_local(lock.pathlib.Path(path)) for path in kinds} == kinds
