"""Checkpoints of the train state by Orbax: asynchronous, the latest and the best kept."""

import contextlib
import pathlib
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

from icae_jax.training import distributed


@contextlib.contextmanager
def _saving(what):
    """Turns a failed save, which tensorstore reports as ValueError, into an OSError that says what it means for the run."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        if distributed.program_failed(error):  # of what was to be saved, or of waiting for another process, which is dead
            raise
        cause = str(error).strip().splitlines()[-1].split(": ")[-1]
        raise OSError(f"{what} failed: {cause}. Earlier checkpoints are whole; free space and run the same command again") from error


def step_folder(path):
    """The checkpoint meant by a path, `…/checkpoints/step_N`: that one itself, or of a workdir or its checkpoints the best (else the
    latest). None where the path is none of these.
    """
    path = pathlib.Path(path)
    if (path / "default" / "_METADATA").exists():
        return path
    workdir = path if (path / "checkpoints").is_dir() else path.parent
    if path not in (workdir, workdir / "checkpoints") or not any((workdir / "checkpoints").glob("step_*/default/_METADATA")):
        return None
    found = Checkpoints(workdir)
    try:
        step = found.best() or found.latest()
    finally:
        found.close()
    return workdir / "checkpoints" / f"step_{step}"


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
                managers.BestN(get_metric_fn=lambda m: -m["loss"], n=1, keep_checkpoints_without_metrics=False),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep,
            best_fn=lambda m: -m["loss"],  # chooses nothing here, but without it the metrics would not be written to disk
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
        scored = [(self._manager.metrics(s)["loss"], s) for s in self._manager.all_steps() if self._manager.metrics(s)]
        return min(scored)[1] if scored else None

    def restore(self, step, like):
        """The state saved at a step, with the shapes, dtypes and shardings of `like`."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))

    def save(self, step, state, held_out_loss=None):
        """Starts saving. held_out_loss ranks it among the others; without one it is kept only as the latest."""
        metrics = None if held_out_loss is None else {"loss": float(held_out_loss)}
        with _saving(f"starting the checkpoint of step {step}"):
            self._manager.save(step, args=ocp.args.StandardSave(state), metrics=metrics, force=True)

    def wait(self):
        with _saving("finishing the latest checkpoint"):
            self._manager.wait_until_finished()

    def close(self):
        self._manager.close()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None or jax.process_count() == 1:
            self.close()
