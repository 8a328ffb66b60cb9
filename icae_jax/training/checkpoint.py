"""Saving and resuming the train state with Orbax; damaged checkpoints are set aside.

Saves are asynchronous; the two latest checkpoints and the best are kept.
"""

import contextlib
import errno
import functools
import itertools
import math
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterator

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree
from orbax.checkpoint import checkpoint_managers as managers

from icae_jax import errors
from icae_jax.runtime import distributed
from icae_jax.training.checkpoint_files import (
    all_damaged,
    best_step,
    damage,
    flaw,
    one_error,
    saved_steps,
    step_folders,
)

ASIDE = "damaged_"  # prefix of a damaged checkpoint's new name, which nothing takes for a step


class DiskFullError(OSError):
    """A save for which there was no room (exit code 2)."""

    def __init__(self, message: str):
        super().__init__(errno.ENOSPC, message)

    def __str__(self):
        return self.strerror


@contextlib.contextmanager
def _saving(what: str) -> Iterator[None]:
    """Turns tensorstore's error of a failed save into `DiskFullError` or RuntimeError."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        if distributed.program_failed(error):  # the step failed, or another process has died
            raise
        cause = re.sub(r" \[\w+='\d+'\]", "", str(error).strip().splitlines()[-1].split(": ")[-1])
        message = f"{what} failed: {cause}. Earlier checkpoints are whole; "
        if errors.disk_full(error):
            raise DiskFullError(f"{message}free space and run the same command again") from error
        raise RuntimeError(f"{message}the same command continues from the latest") from error


# ---------------------------------------------------------------------------------------- resuming


def restore(folder: str | os.PathLike, like: PyTree) -> PyTree:
    """The state in a step's folder, with the shapes, dtypes and shardings of `like`.

    Not a collective: waits for no other process.
    """
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    read = functools.partial(
        ocp.StandardCheckpointHandler().restore,
        pathlib.Path(folder).resolve() / "default",
        args=ocp.args.StandardRestore(abstract),
    )
    with one_error():
        return errors.retrying(read, f"reading {folder}")


def resume(
    workdir: str | os.PathLike, like: PyTree, say: Callable[[str], object]
) -> tuple[int | None, PyTree]:
    """(step, state) of the latest whole checkpoint, the same in all processes.

    (None, `like`) where there is none. Later damaged ones are reported to `say` and renamed, so
    that they are not chosen again; nothing is deleted. Call it as the only writer of the workdir,
    before making `Checkpoints`. UserError where all are damaged; they keep their names.
    """
    folders = step_folders(workdir)
    flaws = distributed.from_main(
        lambda: {
            str(step): errors.retrying(functools.partial(flaw, folder), f"reading {folder}")
            for step, folder in folders.items()
        }
    )
    damaged = {int(step): why for step, why in flaws.items() if why}
    resumed, state = None, like
    for step in sorted(map(int, flaws), reverse=True):
        if step in damaged:
            continue
        why = ""
        try:
            state = restore(pathlib.Path(workdir) / "checkpoints" / f"step_{step}", like)
        except Exception as error:
            why = damage(error)
            if not why:
                raise
        damage_anywhere = next(filter(None, distributed.gathered(why)), None)
        if damage_anywhere is None:
            resumed = step
            break
        damaged[step] = damage_anywhere
    if damaged and resumed is None:
        raise all_damaged(workdir, {f"step_{step}": damaged[step] for step in sorted(damaged)})
    for step in sorted(damaged):
        folder = pathlib.Path(workdir) / "checkpoints" / f"step_{step}"
        aside = folder.with_name(ASIDE + folder.name)
        if distributed.main_after_all():
            numbers = itertools.count(2)
            while aside.exists():
                aside = aside.with_name(f"{ASIDE}{folder.name}.{next(numbers)}")
            folder.rename(aside)
        say(f"{folder} is damaged ({damaged[step]}); it is kept as {aside.name}")
    distributed.main_after_all()
    if damaged and max(damaged) > resumed:
        say(
            f"going back from step {max(damaged)} to step {resumed}, the latest whole checkpoint: "
            f"{errors.counted(max(damaged) - resumed, 'steps')} to train again"
        )
    return resumed, state


# ------------------------------------------------------------------------------------------ saving


def _barrier(*, key, timeout_ms):
    """Orbax's barrier, skipped where a save has just failed.

    The others are then at another barrier, and this one would report it only after 20 minutes.
    """
    if sys.exc_info()[1] is None:
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def _rank(metrics: dict[str, float]) -> float:
    """Larger is better; a loss that is not finite, which earlier versions saved, comes last."""
    return -metrics["loss"] if math.isfinite(metrics["loss"]) else -math.inf


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step):
        """Never: the training loop alone asks JAX.

        Asking also announces this process's step, and Orbax asks about old steps, in a thread.
        """
        return False


class Checkpoints:
    """The checkpoints of a workdir: `save` returns at once, `wait` blocks until all is on disk.

    A context manager that closes at its end, except after an error in one of several processes:
    closing waits for the others, which may be dead.
    """

    def __init__(self, workdir: str | os.PathLike):
        # max_to_keep with best_fn would delete the latest step, hence a policy for what to keep.
        keep = managers.AnyPreservationPolicy(
            [
                managers.LatestN(n=2),  # a power loss may leave the last one's files empty
                managers.BestN(get_metric_fn=_rank, n=1, keep_checkpoints_without_metrics=False),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep,
            best_fn=_rank,  # chooses nothing here, but without it metrics are not written to disk
            create=True,
            cleanup_tmp_directories=True,
            step_prefix="step",
            enable_async_checkpointing=True,
            async_options=ocp.AsyncOptions(barrier_sync_fn=_barrier),
        )
        self._workdir = pathlib.Path(workdir).resolve()
        with errors.naming(
            f"--workdir {workdir}: no folder of checkpoints can be made",
            "put in place what a link leads to, or give another folder",
        ):
            (self._workdir / "checkpoints").mkdir(parents=True, exist_ok=True)
        self._manager = _Manager(self._workdir / "checkpoints", options=options)

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """The step with the lowest held-out loss, or None."""
        return best_step(saved_steps(self._workdir))

    def save(self, step: int, state: PyTree, held_out_loss: float | None = None) -> None:
        """Starts saving. Without a finite held-out loss, it is kept only while it is recent."""
        ranked = held_out_loss is not None and math.isfinite(held_out_loss)
        self._latest = (step, state, {"loss": float(held_out_loss)} if ranked else None)
        with _saving(f"starting the checkpoint of step {step}"):
            self._retrying(self._start, f"saving step {step}")

    def _start(self):
        step, state, metrics = self._latest
        self._manager.save(step, args=ocp.args.StandardSave(state), metrics=metrics, force=True)

    def _retrying(self, function, what):
        """Retries in a single process; of several, one alone would wait for the others for ever."""
        return errors.retrying(function, what) if jax.process_count() == 1 else function()

    def wait(self) -> None:
        """Blocks until the latest save is on disk.

        A save that failed for a transient reason is started again, unless its state was donated.
        """
        attempts = itertools.count()

        def finish():
            if next(attempts) and not any(x.is_deleted() for x in jax.tree.leaves(self._latest[1])):
                self._start()
            self._manager.wait_until_finished()

        with _saving("finishing the latest checkpoint"):
            self._retrying(finish, "saving the latest checkpoint")

    def close(self) -> None:
        """Waits for saves and frees the manager."""
        self._manager.close()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None or jax.process_count() == 1:
            self.close()
