"""Several processes as one run: how they find each other, agree, stop at the same step, and end together.

Each host of a TPU slice, or each task of a Slurm job, runs the same command. All of them see the same workdir.
"""

import contextlib
import glob
import importlib.util
import os
import signal
import sys
import threading

import jax
import numpy as np

HEARTBEAT_SECONDS = 30  # a host not heard of for so long is dead, and the others end
CRASHED = 1  # exit code of a process that lost the others


def _found():
    """Whether this process is one of a cluster that JAX can read from its environment."""
    if int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_STEP_NODELIST" in os.environ:
        return True
    return importlib.util.find_spec("libtpu") is not None and bool(glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*"))


def start(coordinator=None, processes=None, process=None):
    """Joins the other processes, where there are any; before JAX first touches a device.

    coordinator: HOST:PORT of process 0, processes: how many there are, process: which this is; all three or none. Without them TPU
    slices and Slurm jobs (`srun`) are recognised, and anything else is a process alone. ValueError where they do not go together.
    """
    given = (coordinator, processes, process)
    if any(x is not None for x in given):
        if any(x is None for x in given):
            raise ValueError("--coordinator, --processes and --process go together; give all three, or none on TPU slices and Slurm")
        if ":" not in coordinator or not 0 <= process < processes:
            raise ValueError(
                f"--coordinator {coordinator} --processes {processes} --process {process}: give HOST:PORT of process 0, how many "
                "processes there are, and a number from 0 below that"
            )
        if processes == 1:
            return
    elif not _found():
        return
    jax.distributed.initialize(coordinator, processes, process, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)


@contextlib.contextmanager
def ending_together(bad_input):
    """Around all that several processes do: an error in one ends that one at once, so that the others notice instead of waiting for it.

    A process alone is left to Python. bad_input: the exit code of ValueError and OSError.
    """
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1 or (isinstance(error, SystemExit) and not error.code):
            raise
        who = f"process {jax.process_index()} of {jax.process_count()}"
        if isinstance(error, ValueError | OSError) and not isinstance(error, jax.errors.JaxRuntimeError):
            print(f"{who}: {error}", file=sys.stderr, flush=True)
            os._exit(bad_input)
        cause = str(error).strip().splitlines() or [repr(error)]
        print(
            f"{who}: {type(error).__name__}: {cause[0]}\n{who}: another process may have died; the same command continues from the "
            "latest checkpoint",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        os._exit(CRASHED)  # not `exit`: that would wait for the dead


def agreed(value):
    """Process 0's yes or no, in every process: they must all go on, or none, where their disks differ."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def main_after_all():
    """Waits until every process is here; true in the first, which writes what all have read."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("main_after_all")
    return jax.process_index() == 0


class Preemption:
    """Notes that the run must leave: SIGTERM, or the platform's notice through JAX. A context round the training loop.

    In one process SIGTERM is Python's to handle (outside the main thread there are no signals). In several, JAX notes it, whichever
    process it came to, and names one step to all of them.
    """

    def __enter__(self):
        self._asked = False
        self._usable = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
        if self._usable:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, *_):
        self._asked = True

    def at(self, step):
        """Whether to save after this step and leave: the same in every process. To be asked once a step, by all."""
        if jax.process_count() == 1:
            return self._asked
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)

    def __exit__(self, *_):
        if self._usable:
            signal.signal(signal.SIGTERM, self._before)
