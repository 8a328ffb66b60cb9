"""Checkpoints of the train state by Orbax: asynchronous, the latest and the best kept."""

import contextlib
import errno
import functools
import itertools
import json
import math
import pathlib
import re
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

from icae_jax import errors
from icae_jax.training import distributed


class DiskFullError(OSError):
    """A save for which there was no room (exit code 2)."""

    def __init__(self, message):
        super().__init__(errno.ENOSPC, message)

    def __str__(self):
        return self.strerror


@contextlib.contextmanager
def _saving(what):
    """Says of a failed save, which tensorstore reports as ValueError, what it means for the run: `DiskFullError`, or RuntimeError."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        if distributed.program_failed(error):  # of what was to be saved, or of waiting for another process, which is dead
            raise
        cause = re.sub(r" \[\w+='\d+'\]", "", str(error).strip().splitlines()[-1].split(": ")[-1])
        message = f"{what} failed: {cause}. Earlier checkpoints are whole; "
        if errors.disk_full(error):
            raise DiskFullError(f"{message}free space and run the same command again") from error
        raise RuntimeError(f"{message}the same command continues from the latest") from error


# ------------------------------------------------------------------------------------------------------------- reading
#
# By plain files alone: whoever only reads must neither take away what a running training is just writing, as a manager of Orbax's does, nor
# wait for other processes. A checkpoint is whole once Orbax has renamed its folder to `step_N`.


def saved_steps(workdir) -> dict[int, float | None]:
    """`{step: held-out loss or None}` of the whole checkpoints of a workdir, rising. Nothing there is changed."""
    steps = {}
    for folder in pathlib.Path(workdir).glob("checkpoints/step_*"):
        number = folder.name.removeprefix("step_")
        if not number.isdigit() or not is_whole(folder):
            continue
        try:
            loss = json.loads((folder / "metrics" / "metrics").read_text(encoding="utf-8"))["loss"]
        except (FileNotFoundError, NotADirectoryError):
            loss = None  # saved without being evaluated; or deleted meanwhile, which whoever reads it will find
        steps[int(number)] = loss
    return dict(sorted(steps.items()))


def is_whole(folder) -> bool:
    """Whether a path is the folder of one complete checkpoint."""
    return (pathlib.Path(folder) / "default" / "_METADATA").is_file()


def best_step(steps: dict[int, float | None]) -> int | None:
    """Of `{step: held-out loss or None}` the one with the lowest loss, the earlier of two; None where none has a finite one."""
    ranked = [(loss, step) for step, loss in steps.items() if loss is not None and math.isfinite(loss)]
    return min(ranked)[1] if ranked else None


def step_folder(path) -> pathlib.Path | None:
    """The checkpoint meant by a path, `…/checkpoints/step_N`: that one itself, or of a workdir or its checkpoints the best (else the
    latest). None where the path is none of these. Nothing there is changed.
    """
    path = pathlib.Path(path)
    if is_whole(path):
        return path
    workdir = path if (path / "checkpoints").is_dir() else path.parent
    steps = saved_steps(workdir) if path in (workdir, workdir / "checkpoints") else {}
    if not steps:
        return None
    best = best_step(steps)
    return workdir / "checkpoints" / f"step_{max(steps) if best is None else best}"


def read_newly(path):
    """(folder, trained tree) of the checkpoint meant by a path, as `step_folder` and `read_trained`; None where there is none.

    A running training deletes checkpoints that are neither its best nor its latest any more: where that happens to the chosen one while
    it is read, the choice is made again.
    """
    what = f"reading {path}"
    while (folder := errors.retrying(lambda: step_folder(path), what)) is not None:
        try:
            return folder, errors.retrying(functools.partial(read_trained, folder), what)
        except Exception:
            if is_whole(folder):
                raise
    return None


def read_trained(step_folder):
    """The trained tree alone of one checkpoint, numpy arrays, without the optimizer's state."""
    folder = pathlib.Path(step_folder).resolve() / "default"
    handler = ocp.PyTreeCheckpointHandler()
    stored = handler.metadata(folder).tree["trained"]
    want = {"trained": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), stored)}
    how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), want)
    with ocp.Checkpointer(handler) as checkpointer:
        return checkpointer.restore(folder, args=ocp.args.PyTreeRestore(want, how, partial_restore=True))["trained"]


def _barrier(*, key, timeout_ms):
    """Waits for the other processes; not where a save has just failed: they wait elsewhere, and it would be told after 20 minutes only."""
    if sys.exc_info()[1] is None:
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def _rank(metrics):
    """The larger the better. A loss that is not finite, which earlier versions kept, comes last."""
    return -metrics["loss"] if math.isfinite(metrics["loss"]) else -math.inf


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step):
        """The training loop alone asks JAX for this: asking also says how far a process is, and Orbax asks for old steps, in a thread."""
        return False


class Checkpoints:
    """The checkpoints of a workdir. `save` returns at once; `wait` blocks until what was saved is on disk.

    A context that closes at its end, but for an error in one of several processes: closing waits for the others, which may be dead.
    """

    def __init__(self, workdir):
        # max_to_keep with best_fn would delete the latest step, so preservation is stated as a policy of its own.
        keep = managers.AnyPreservationPolicy(
            [
                managers.LatestN(n=1),
                managers.BestN(get_metric_fn=_rank, n=1, keep_checkpoints_without_metrics=False),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep,
            best_fn=_rank,  # chooses nothing here, but without it the metrics would not be written to disk
            create=True,
            cleanup_tmp_directories=True,
            step_prefix="step",
            enable_async_checkpointing=True,
            async_options=ocp.AsyncOptions(barrier_sync_fn=_barrier),
        )
        self._manager = _Manager(pathlib.Path(workdir).resolve() / "checkpoints", options=options)

    def latest(self):
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def best(self):
        """The step with the lowest held-out loss, or None."""
        return best_step({s: (self._manager.metrics(s) or {}).get("loss") for s in self._manager.all_steps()})

    def restore(self, step, like):
        """The state saved at a step, with the shapes, dtypes and shardings of `like`."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        restore = functools.partial(self._manager.restore, step, args=ocp.args.StandardRestore(abstract))
        return self._retrying(restore, f"reading the checkpoint of step {step}")

    def save(self, step, state, held_out_loss=None):
        """Starts saving. held_out_loss ranks it among the others; without one that is finite it is kept only as the latest."""
        ranked = held_out_loss is not None and math.isfinite(held_out_loss)
        self._latest = (step, state, {"loss": float(held_out_loss)} if ranked else None)
        with _saving(f"starting the checkpoint of step {step}"):
            self._retrying(self._start, f"saving step {step}")

    def _start(self):
        step, state, metrics = self._latest
        self._manager.save(step, args=ocp.args.StandardSave(state), metrics=metrics, force=True)

    def _retrying(self, function, what):
        """Several processes save together: where one fails alone, trying again would wait for the others, which do not."""
        return errors.retrying(function, what) if jax.process_count() == 1 else function()

    def wait(self):
        """Blocks until the latest save is on disk. One that failed for a passing reason is begun again, unless its state is donated."""
        tried = itertools.count()

        def finish():
            if next(tried) and not any(x.is_deleted() for x in jax.tree.leaves(self._latest[1])):
                self._start()
            self._manager.wait_until_finished()

        with _saving("finishing the latest checkpoint"):
            self._retrying(finish, "saving the latest checkpoint")

    def close(self):
        self._manager.close()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None or jax.process_count() == 1:
            self.close()
