"""Several processes as one run: how they find each other, agree, stop at the same step, and end together.

Each host of a TPU slice, or each task of a Slurm job, runs the same command. All of them see the same workdir.
"""

import contextlib
import importlib.util
import itertools
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from icae_jax import errors, lock
from icae_jax.errors import UserError
from icae_jax.runtime import platforms

T = TypeVar("T")

START_SECONDS = 300  # so long the processes wait for each other; JAX then aborts them
PATIENCE_SECONDS = 20  # and after so long they say that they wait
HEARTBEAT_SECONDS = 30  # a process not heard of for so long is dead: JAX aborts the others
LINGER_SECONDS = 5  # the first process's end aborts the others at once: it leaves them the time to tell their own errors
CRASHED = 1  # exit code of a process that failed, or lost the others


def _slurm_tasks() -> int:
    """How many tasks the Slurm step has that this process is one of; 1 outside a step, as in the shell that salloc opens.

    The step's own count decides: SLURM_NTASKS may be the allocation's, of which an interactive step is one task.
    """
    count = os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS", "")
    return int(count) if count.isdecimal() and os.environ.get("SLURM_STEP_NODELIST") else 1


def _found():
    """What JAX can read a cluster from, "Slurm" or "TPU"; None on other machines."""
    if _slurm_tasks() > 1:
        return "Slurm"
    wanted = "tpu" in os.environ.get("JAX_PLATFORMS", "") or not os.environ.get("JAX_PLATFORMS")
    return (
        "TPU"
        if wanted and platforms.tpu_chips() and importlib.util.find_spec("libtpu") is not None
        else None
    )


def _of_slurm(tasks: int) -> None:
    """UserError where Slurm's variables, of a step of several tasks, are no numbers or contradict each other."""
    told = {
        name: os.environ[name]
        for name in ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID")
        if name in os.environ
    }
    wrong = [f"${name} is {value!r}" for name, value in told.items() if not value.isdecimal()]
    if not wrong and int(told.get("SLURM_PROCID", 0)) >= tasks:
        wrong = [f"$SLURM_PROCID is {told['SLURM_PROCID']}"]
    if wrong:
        raise UserError(
            f"Slurm: this step has {tasks} tasks, and {', '.join(wrong)}; start each by srun, or give --processes 1 for this process alone"
        )
    os.environ.setdefault("SLURM_NTASKS", str(tasks))  # without it JAX takes this for no job


def _of_environment() -> tuple[str | None, int | None, int | None]:
    """coordinator, processes and process as JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID tell; None of what is not set, or
    empty. UserError where they do not go together.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    coordinator, *numbers = (os.environ.get(name, "") for name in names)
    if not any(numbers):
        return None, None, None
    if not (coordinator and all(number.isdecimal() for number in numbers)):
        shown = ", ".join(
            f"${name} is {value!r}"
            for name, value in zip(names, (coordinator, *numbers), strict=True)
        )
        raise UserError(
            f"{shown}; set all three (HOST:PORT and two numbers), or none, or give --processes 1 for this process alone"
        )
    return coordinator, int(numbers[0]), int(numbers[1])


def start(coordinator=None, processes=None, process=None):
    """Joins the other processes, where there are any; before JAX first touches a device.

    coordinator: HOST:PORT of process 0, processes: how many there are, process: which this is; all three or none. Without them those of
    JAX's own variables count, then TPU slices and Slurm jobs (`srun`) are recognised, and anything else is a process alone, as is
    `processes` 1. UserError where they do not go together; SystemExit with a message where process 0 cannot serve at its port.
    """
    if processes == 1 and process in (None, 0):
        return
    if not any(x is not None for x in (coordinator, processes, process)):
        coordinator, processes, process = _of_environment()
    if not os.environ.get("JAX_COORDINATOR_ADDRESS", "-"):
        del os.environ["JAX_COORDINATOR_ADDRESS"]  # JAX would take the empty text for an address
    given = (coordinator, processes, process)
    found, method = None, None
    if any(x is not None for x in given):
        if processes == 1 and process == 0:
            return
        if any(x is None for x in given):
            raise UserError(
                "--coordinator, --processes and --process go together; give all three, or none on TPU slices and Slurm"
            )
        if (
            not coordinator.rpartition(":")[0]
            or not coordinator.rpartition(":")[2].isdigit()
            or not 0 <= process < processes
        ):
            raise UserError(
                f"--coordinator {coordinator} --processes {processes} --process {process}: give HOST:PORT of process 0, how many "
                "processes there are, and a number from 0 below that"
            )
    elif not (found := _found()):
        return
    elif found == "Slurm":
        _of_slurm(_slurm_tasks())
        method = (
            "slurm"  # not what else a variable, such as of Open MPI, may make JAX think of first
        )
        if os.environ.get("SLURM_STEP_NUM_TASKS"):
            processes = _slurm_tasks()  # JAX would take SLURM_NTASKS
    who, where = (
        f"process {process} of {processes}" if found is None else found,
        coordinator or "the first of them",
    )
    waiting = threading.Timer(
        PATIENCE_SECONDS,
        lambda: print(
            f"{who}: waiting for the other processes at {where}; each must run this command. Aborts after {START_SECONDS} seconds",
            file=sys.stderr, flush=True,
        ),
    )  # fmt: skip
    waiting.daemon = True
    waiting.start()
    try:
        jax.distributed.initialize(
            coordinator, processes, process, cluster_detection_method=method, initialization_timeout=START_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )  # fmt: skip
        jax.devices()  # the processes tell each other theirs
    except jax.errors.JaxRuntimeError as error:
        raise SystemExit(
            f"{who}: cannot join the others at {where}: {error}; is another run using that port?"
        ) from error
    except (ValueError, KeyError, IndexError, TypeError) as error:  # of the variables that it reads
        raise UserError(f"{who}: JAX cannot tell the processes ({error}); give --coordinator HOST:PORT --processes N --process I, "
                         "or --processes 1 for this one alone") from error  # fmt: skip
    finally:
        waiting.cancel()


def program_failed(error):
    """Whether an error is JAX's of a program that failed, as it does where another process is dead.

    Mostly a JaxRuntimeError, it is a ValueError where the call itself runs the program; tensorstore's of files look like these.
    """
    status = "(ABORTED|CANCELLED|DATA_LOSS|DEADLINE_EXCEEDED|FAILED_PRECONDITION|INTERNAL|UNAVAILABLE|UNKNOWN): "
    return isinstance(error, jax.errors.JaxRuntimeError) or bool(
        re.match(status, str(error)) and "Error writing" not in str(error)
    )


@contextlib.contextmanager
def ending_together(bad_input):
    """Around all that several processes do: an error in one ends that one at once, so that the others notice instead of waiting for it.

    A process alone is left to Python. bad_input: the exit code of what the user must change (`errors.is_users`); others give `CRASHED`.
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
                why = "If another process died, its output says why; the same command continues from what is saved"
                print(f"{who}: {type(error).__name__}. {why}", file=sys.stderr, flush=True)
        finally:  # also where stderr is on the disk that is full
            os._exit(
                bad_input if bad else CRASHED
            )  # not `exit`: that would wait for the others, which may be dead


def agreed(value):
    """Process 0's number, or yes or no, in every process: they must all do the same, where their disks differ."""
    if jax.process_count() == 1:
        return value
    return type(value)(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def gathered(value: object) -> list:
    """What each process holds, in their order: anything that JSON has."""
    if jax.process_count() == 1:
        return [value]
    mine = np.frombuffer(json.dumps(value, sort_keys=True, default=str).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(mine.size)).reshape(-1)
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: mine.size] = mine
    return [
        json.loads(row[:size].tobytes())
        for row, size in zip(multihost_utils.process_allgather(padded), sizes.tolist(), strict=True)
    ]


def from_main(function: Callable[[], T]) -> T:
    """What `function()` gives in process 0, which alone calls it, in every process; its UserError too, so that all end alike."""
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
    """Holds the lock of a folder, which must exist, for all processes of this run: process 0 has it. UserError, in all, where another run
    has it. flag: what gives the folder.
    """
    held = lock.Lock(folder, flag)
    try:
        while not from_main(held.attempt):
            time.sleep(lock.POLL_SECONDS)
        yield held
    finally:
        held.close()


def check_agreement(items: dict[str, object]) -> None:
    """UserError, in every process, that names what differs between them: of `items` each must have the same in all.

    items: `{name: value}`, values as JSON has them. To be called by all, before anything whose shapes or order of collectives depend on it.
    """
    first, *others = gathered(items)
    lines = [
        f"{name}: {json.dumps(first.get(name))} in process 0, {json.dumps(other.get(name))} in process {number}"
        for number, other in enumerate(others, 1)
        for name in sorted(first.keys() | other.keys())
        if first.get(name) != other.get(name)
    ]
    if lines:
        shown = "; ".join(lines[:5]) + (f"; and {len(lines) - 5} more" if len(lines) > 5 else "")
        raise UserError(
            f"the processes of this run differ in what must be alike: {shown}. Give all the same command, data and versions"
        )


def main_after_all():
    """Waits until every process is here; true in the first, which writes what all have read."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("main_after_all")
    return jax.process_index() == 0


def check_shared(folder):
    """UserError, in every process, where one does not see the folder of process 0: they need one filesystem."""
    if jax.process_count() == 1:
        return
    # A name that nobody has looked for: network filesystems remember what was not there.
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
            f"{folder} is not the same folder in processes 0 and {other}; give one on a filesystem that all share"
        )


_times_asked = itertools.count(1)


class Preemption:
    """Notes that the run must leave: SIGTERM, or the platform's notice through JAX. A context round the training loop.

    noticed: called as soon as this process knows, in a signal handler where there is one.

    In one process SIGTERM is Python's to handle (outside the main thread there are no signals). In several, JAX notes it, whichever
    process it came to, and names one time of asking to all of them.
    """

    def __init__(self, noticed: Callable[[], None] = lambda: None):
        self._noticed = noticed

    def __enter__(self):
        self._noted = False
        self._usable = (
            jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
        )
        if self._usable:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, *_):
        self._noted = True
        self._noticed()

    def asked(self):
        """Whether to save and leave: the same in every process. To be called once a step, by all."""
        if jax.process_count() == 1:
            return self._noted
        # JAX names the number after the largest so far, 1 before the first: counted by the step, a notice during a start would be missed.
        noted = multihost_utils.reached_preemption_sync_point(next(_times_asked))
        if noted:
            self._noticed()
        return noted

    def __exit__(self, *_):
        if self._usable:
            signal.signal(signal.SIGTERM, self._before)
