"""Several processes as one run: joining, agreeing, stopping at the same step, ending together.

Each host of a TPU slice, or each task of a Slurm job, runs the same command. All of them see the
same workdir.
"""

import contextlib
import importlib.util
import itertools
import json
import os
import pathlib
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import ClassVar, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from icae_jax import errors, lock
from icae_jax.errors import UserError
from icae_jax.runtime import platforms

T = TypeVar("T")

START_SECONDS = 300  # initialization timeout: the processes wait so long for each other
PATIENCE_SECONDS = 20  # after which a process says that it is waiting
HEARTBEAT_SECONDS = 30  # heartbeat timeout, after which JAX aborts the other processes
# Process 0's end aborts the others at once: it leaves them this grace period to report their
# errors.
LINGER_SECONDS = 5
CRASHED = 1  # exit code of a process that failed, or lost the others


def _slurm_tasks() -> int:
    """The tasks of this process's Slurm step; 1 outside a step, as in the shell that salloc opens.

    The step's own count decides: SLURM_NTASKS may be that of the allocation, in which an
    interactive step is a single task.
    """
    count = os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS", "")
    return int(count) if count.isdecimal() and os.environ.get("SLURM_STEP_NODELIST") else 1


def _cluster() -> str | None:
    """The cluster that JAX can detect here, "Slurm" or "TPU"; None elsewhere."""
    if _slurm_tasks() > 1:
        return "Slurm"
    wanted = "tpu" in os.environ.get("JAX_PLATFORMS", "") or not os.environ.get("JAX_PLATFORMS")
    has_tpu = platforms.tpu_chips() and importlib.util.find_spec("libtpu") is not None
    return "TPU" if wanted and has_tpu else None


def _check_slurm(tasks: int) -> None:
    """UserError if the Slurm variables of a step of several tasks are malformed or contradict."""
    values = {
        name: os.environ[name]
        for name in ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID")
        if name in os.environ
    }
    wrong = [f"${name} is {value!r}" for name, value in values.items() if not value.isdecimal()]
    if not wrong and int(values.get("SLURM_PROCID", 0)) >= tasks:
        wrong = [f"$SLURM_PROCID is {values['SLURM_PROCID']}"]
    if wrong:
        raise UserError(
            f"Slurm: this step has {tasks} tasks, and {', '.join(wrong)}; start each by srun, or "
            "give --processes 1 for this process alone"
        )
    os.environ.setdefault("SLURM_NTASKS", str(tasks))  # without it JAX detects no job


def _from_environment() -> tuple[str | None, int | None, int | None]:
    """(coordinator, processes, process) from JAX's variables; None of each if none is set.

    The variables are JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. UserError if
    only some of them are set.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    coordinator, *numbers = (os.environ.get(name, "") for name in names)
    if not any(numbers):
        return None, None, None
    if not (coordinator and all(number.isdecimal() for number in numbers)):
        values = zip(names, (coordinator, *numbers), strict=True)
        raise UserError(
            f"{', '.join(f'${name} is {value!r}' for name, value in values)}; set all three "
            "(HOST:PORT and two numbers), or none, or give --processes 1 for this process alone"
        )
    return coordinator, int(numbers[0]), int(numbers[1])


def start(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
    """Joins the other processes, if there are any; to be called before JAX touches a device.

    Without arguments, JAX's own variables count, then TPU slices and Slurm jobs (`srun`) are
    detected, and anything else is a process on its own, as it is with `processes` 1.

    Args:
        coordinator: HOST:PORT of process 0. All three arguments must be given, or none.
        processes: how many there are.
        process: the index of this one.

    Raises:
        UserError: the arguments, or the variables, do not go together.
        SystemExit: process 0 cannot serve at its port.
    """
    if processes == 1 and process in (None, 0):
        return
    if coordinator is None and processes is None and process is None:
        coordinator, processes, process = _from_environment()
    if not os.environ.get("JAX_COORDINATOR_ADDRESS", "-"):
        del os.environ["JAX_COORDINATOR_ADDRESS"]  # JAX would take "" for an address
    given = (coordinator, processes, process)
    cluster = None if any(x is not None for x in given) else _cluster()
    if given == (None, None, None) and cluster is None:
        return
    if cluster is None:
        if processes == 1 and process == 0:
            return
        _check_given(coordinator, processes, process)
    method = None
    if cluster == "Slurm":
        _check_slurm(_slurm_tasks())
        method = "slurm"  # JAX might try another method first, such as Open MPI's
        if os.environ.get("SLURM_STEP_NUM_TASKS"):
            processes = _slurm_tasks()  # JAX would take SLURM_NTASKS
    who = cluster or f"process {process} of {processes}"
    where = coordinator or "the first of them"
    with _saying_if_slow(who, where):
        try:
            jax.distributed.initialize(
                coordinator,
                processes,
                process,
                cluster_detection_method=method,
                initialization_timeout=START_SECONDS,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            )
            jax.devices()  # the processes exchange their devices
        except jax.errors.JaxRuntimeError as error:
            raise SystemExit(
                f"{who}: cannot join the others at {where}: {error}; "
                "is another run using that port?"
            ) from error
        except (ValueError, KeyError, IndexError, TypeError) as error:  # a variable that JAX reads
            raise UserError(
                f"{who}: JAX cannot tell the processes ({error}); give --coordinator HOST:PORT "
                "--processes N --process I, or --processes 1 for this one alone"
            ) from error


def _check_given(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """UserError if the arguments of `start` do not go together."""
    if coordinator is None or processes is None or process is None:
        raise UserError(
            "--coordinator, --processes and --process go together; give all three, or none on TPU "
            "slices and Slurm"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 <= process < processes:
        raise UserError(
            f"--coordinator {coordinator} --processes {processes} --process {process}: give "
            "HOST:PORT of process 0, how many processes there are, and a number from 0 below that"
        )


@contextlib.contextmanager
def _saying_if_slow(who: str, where: str) -> Iterator[None]:
    """Says that a process is waiting for the others, if the block takes `PATIENCE_SECONDS`."""
    text = (
        f"{who}: waiting for the other processes at {where}; each must run this command. "
        f"Aborts after {START_SECONDS} seconds"
    )
    timer = threading.Timer(PATIENCE_SECONDS, print, [text], {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


_FAILED = re.compile(
    "(ABORTED|CANCELLED|DATA_LOSS|DEADLINE_EXCEEDED|FAILED_PRECONDITION|INTERNAL|UNAVAILABLE"
    "|UNKNOWN): "
)


def program_failed(error: BaseException) -> bool:
    """Whether JAX raised this because a program failed, as it does if another process is dead.

    It is a JaxRuntimeError, or a ValueError where the call itself runs the program. Errors of
    tensorstore about files look like the latter, and do not count.
    """
    return isinstance(error, jax.errors.JaxRuntimeError) or bool(
        _FAILED.match(str(error)) and "Error writing" not in str(error)
    )


@contextlib.contextmanager
def ending_together(bad_input: int) -> Iterator[None]:
    """Ends this process at once on an error, so that the others notice instead of waiting.

    Wraps all work of a run. A process on its own is left to Python.

    Args:
        bad_input: the exit code of errors that the user must fix (`errors.is_users`); that of all
            others is `CRASHED`.
    """
    try:
        yield
    except BaseException as error:
        if (
            not jax.distributed.is_initialized()
            or jax.process_count() == 1
            or (isinstance(error, SystemExit) and not error.code)
        ):
            raise
        who = f"process {jax.process_index()} of {jax.process_count()}"
        bad = errors.is_users(error)
        try:
            if bad:
                print(f"{who}: {error}", file=sys.stderr, flush=True)
                time.sleep(0 if jax.process_index() else LINGER_SECONDS)
            else:
                traceback.print_exc()
                print(
                    f"{who}: {type(error).__name__}. If another process died, its output says why; "
                    "the same command continues from what is saved",
                    file=sys.stderr,
                    flush=True,
                )
        finally:  # also if stderr is on the full disk
            # Not sys.exit, which would wait for processes that may be dead.
            os._exit(bad_input if bad else CRASHED)


def agreed(value: T) -> T:
    """Process 0's number or bool, in every process.

    All must do the same even if their disks differ.
    """
    if jax.process_count() == 1:
        return value
    return type(value)(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def gathered(value: object) -> list:
    """Every process's value, in their order; values must be representable in JSON."""
    if jax.process_count() == 1:
        return [value]
    mine = np.frombuffer(json.dumps(value, sort_keys=True, default=str).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(mine.size)).reshape(-1)
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: mine.size] = mine
    rows = multihost_utils.process_allgather(padded)
    return [
        json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes.tolist(), strict=True)
    ]


def from_main(function: Callable[[], T]) -> T:
    """Calls `function()` in process 0 only, and returns its result in every process.

    Its UserError is raised in all of them, so that all end alike.
    """
    if jax.process_count() == 1:
        return function()
    value, refused = None, ""
    if jax.process_index() == 0:
        try:
            value = function()
        except UserError as error:
            refused = str(error)
    value, refused = gathered([value, refused])[0]
    if refused:
        raise UserError(refused)
    return value


@contextlib.contextmanager
def only_writer(folder: str | os.PathLike, flag: str) -> Iterator[lock.Lock]:
    """Holds the lock of an existing folder for all processes of this run; process 0 has it.

    UserError, in every process, if another run has it.

    Args:
        folder: the folder.
        flag: the flag that gives it, for messages.
    """
    held = lock.Lock(folder, flag)
    try:
        while not from_main(held.attempt):
            time.sleep(lock.POLL_SECONDS)
        yield held
    finally:
        held.close()


def check_agreement(items: dict[str, object]) -> None:
    """UserError, in every process, which names the items that differ between processes.

    All must call it before anything on which shapes or the order of collectives depend.

    Args:
        items: named values, representable in JSON.
    """
    first, *others = gathered(items)
    lines = [
        f"{name}: {json.dumps(first.get(name))} in process 0, "
        f"{json.dumps(other.get(name))} in process {number}"
        for number, other in enumerate(others, 1)
        for name in sorted(first.keys() | other.keys())
        if first.get(name) != other.get(name)
    ]
    if lines:
        shown = "; ".join(lines[:5]) + (f"; and {len(lines) - 5} more" if len(lines) > 5 else "")
        raise UserError(
            f"the processes of this run differ in what must be alike: {shown}. "
            "Give all the same command, data and versions"
        )


def main_after_all() -> bool:
    """Waits for every process; True in process 0, which may now write what all have read."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("main_after_all")
    return jax.process_index() == 0


def check_shared(folder: pathlib.Path) -> None:
    """UserError, in every process, if one does not see the folder of process 0."""
    if jax.process_count() == 1:
        return
    # A new name: network filesystems cache the absence of files that were looked up before.
    mark = folder / f".shared-{agreed(time.time_ns() % 10**9)}"
    if jax.process_index() == 0:
        mark.touch()
    main_after_all()
    seen = multihost_utils.process_allgather(np.asarray(mark.exists())).reshape(-1)
    if jax.process_index() == 0:
        mark.unlink()
    if not seen.all():
        other = int(seen.argmin())
        raise UserError(
            f"{folder} is not the same folder in processes 0 and {other}; "
            "give one on a filesystem that all share"
        )


class Preemption:
    """Notices that the run must stop: SIGTERM, or the platform's notice through JAX.

    A context around the training loop. With one process, Python handles SIGTERM (only the main
    thread can). With several, JAX handles it in whichever process gets it, and makes `asked` return
    True at the same call in all of them.

    Args:
        noticed: called as soon as this process knows, possibly in a signal handler.
    """

    # JAX's count of calls is global to the process and never starts again, so this one is too: it
    # must exceed all earlier numbers. Counting steps would miss a notice during the start.
    _call_numbers: ClassVar[Iterator[int]] = itertools.count(1)

    def __init__(self, noticed: Callable[[], None] = lambda: None):
        self._noticed = noticed

    def __enter__(self) -> "Preemption":
        self._signalled = False
        self._handles_signals = (
            jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
        )
        if self._handles_signals:
            self._before = signal.signal(signal.SIGTERM, self._on_signal)
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True
        self._noticed()

    def asked(self) -> bool:
        """Whether to save and stop: the same in every process. All must call it once per step."""
        if jax.process_count() == 1:
            return self._signalled
        stop = multihost_utils.reached_preemption_sync_point(next(self._call_numbers))
        if stop:
            self._noticed()
        return stop

    def __exit__(self, *_: object) -> None:
        if self._handles_signals:
            signal.signal(signal.SIGTERM, self._before)
