"""Checkpoints of the train state by Orbax: asynchronous, the two latest and the best kept; damaged ones are found and passed over."""

import contextlib
import errno
import functools
import gc
import itertools
import json
import logging
import math
import pathlib
import re
import sys
import traceback

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from orbax.checkpoint import checkpoint_managers as managers

from icae_jax import errors, files
from icae_jax.errors import UserError
from icae_jax.runtime import distributed


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
        if distributed.program_failed(
            error
        ):  # of what was to be saved, or of waiting for another process, which is dead
            raise
        cause = re.sub(r" \[\w+='\d+'\]", "", str(error).strip().splitlines()[-1].split(": ")[-1])
        message = f"{what} failed: {cause}. Earlier checkpoints are whole; "
        if errors.disk_full(error):
            raise DiskFullError(f"{message}free space and run the same command again") from error
        raise RuntimeError(f"{message}the same command continues from the latest") from error


# -------------------------------------------------------------------------------------------------------------- damage
#
# A power loss can leave files of a checkpoint empty, cut short or absent, although Orbax had renamed its folder to `step_N`.

ASIDE = "damaged_"  # how a damaged checkpoint is renamed: neither Orbax nor a reader takes it for a step then
_DAMAGE = re.compile(  # tensorstore's words
    r"\b(OUT_OF_RANGE|DATA_LOSS|NOT_FOUND|FAILED_PRECONDITION|INVALID_ARGUMENT)\b: |\bError decoding |[Cc]orrupt"
)
_STEP = re.compile(r"step_(\d+)")


def flaw(folder) -> str:
    """What is wrong with the files of a checkpoint, as far as that shows without reading its arrays: "" where nothing is."""
    folder = pathlib.Path(folder)
    if not is_whole(folder):
        return "default/_METADATA is missing"
    try:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not path.name.startswith(".") and not path.stat().st_size:
                return f"{path.relative_to(folder)} is empty"
        for path in (
            folder / "default" / "_METADATA",
            folder / "metrics" / "metrics",
            *folder.glob("default/array_metadatas/*"),
        ):
            if path.exists() and not isinstance(
                _json(path), dict
            ):  # without metrics it was saved without being evaluated
                return f"{path.relative_to(folder)} is garbled"
        if (folder / "metrics" / "metrics").exists() and not files.is_kind(
            _json(folder / "metrics" / "metrics").get("loss"), float
        ):
            return "metrics/metrics holds no loss"
        return (
            _index_flaw(folder / "default")
            if _json(folder / "default" / "_METADATA").get("use_ocdbt")
            else ""
        )
    except FileNotFoundError as error:  # it is just being deleted
        return f"{error.filename} is missing"


def _json(path):
    """A file's content; None where it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None


def _index_flaw(folder) -> str:
    """What is wrong with the index of a folder's arrays, which has checksums and takes some KiB."""
    try:
        spec = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder.resolve()}/"}}
        index = tensorstore.KvStore.open(spec).result().list().result()
    except ValueError as error:
        why = _damage(error)
        if not why:
            raise
        return why
    return "" if index else "its index of arrays is missing"


def _damage(error) -> str:
    """What an error of reading a checkpoint says of damage to its files; "" where it is of something else: a disk or network that does not
    answer, memory, rights.
    """
    if errors.transient(error):
        return ""
    for e in errors.causes(error):
        if isinstance(
            e, MemoryError | jax.errors.JaxRuntimeError | PermissionError | KeyboardInterrupt
        ):
            return ""
        status = _DAMAGE.search(str(e))
        if status or isinstance(
            e,
            FileNotFoundError
            | NotADirectoryError
            | EOFError
            | KeyError
            | json.JSONDecodeError
            | UnicodeDecodeError,
        ):
            text = (
                str(e)
                .split(" [tensorstore_spec")[0]
                .split(" [source locations")[0]
                .strip()
                .splitlines()
            )
            return re.sub(r"^.{200,}(?=.{200}$)", "… ", text[0]) if text else type(e).__name__
        if "structure" in str(e) and isinstance(
            e, ValueError
        ):  # of the tree: its metadata are missing
            return str(e).strip().splitlines()[0]
    return ""


@contextlib.contextmanager
def _one_error():
    """Of reads that fail at once, Orbax raises the first; within this, the others are not written to stderr too, in tracebacks."""
    logger = logging.getLogger("asyncio")
    before = sys.unraisablehook, logger.disabled
    sys.unraisablehook, logger.disabled = lambda *_: None, True
    try:
        yield
    except Exception as error:
        traceback.clear_frames(error.__traceback__)
        gc.collect()  # coroutines that nobody awaits any more say so when they go
        raise
    finally:
        sys.unraisablehook, logger.disabled = before


_said: set[str] = set()


def _say_once(text):
    if text not in _said:
        _said.add(text)
        print(text, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------------- reading
#
# By plain files alone: whoever only reads must neither take away what a running training is just writing, as a manager of Orbax's does, nor
# wait for other processes. A checkpoint is whole once Orbax has renamed its folder to `step_N`, unless its files were damaged since.


def _step_folders(workdir) -> dict[int, pathlib.Path]:
    """`{step: folder}` of the checkpoints of a workdir, whole or not, rising."""
    found = {
        folder: _STEP.fullmatch(folder.name)
        for folder in pathlib.Path(workdir).glob("checkpoints/step_*")
    }
    return dict(sorted((int(name[1]), folder) for folder, name in found.items() if name))


def saved_steps(workdir) -> dict[int, float | None]:
    """`{step: held-out loss or None}` of the whole checkpoints of a workdir, rising. Nothing there is changed."""
    steps = {}
    for step, folder in _step_folders(workdir).items():
        if flaw(folder):
            continue
        told = folder / "metrics" / "metrics"
        steps[step] = (
            (_json(told) or {}).get("loss") if told.exists() else None
        )  # None: it was saved without being evaluated
    return steps


def is_whole(folder) -> bool:
    """Whether a path is the folder of one complete checkpoint."""
    return (pathlib.Path(folder) / "default" / "_METADATA").is_file()


def best_step(steps: dict[int, float | None]) -> int | None:
    """Of `{step: held-out loss or None}` the one with the lowest loss, the earlier of two; None where none has a finite one."""
    ranked = [
        (loss, step) for step, loss in steps.items() if loss is not None and math.isfinite(loss)
    ]
    return min(ranked)[1] if ranked else None


def _all_damaged(where, damaged):
    """The error that says of damaged checkpoints, `{name: what is wrong}`, that there is no other."""
    told = "; ".join(f"{name}: {why}" for name, why in damaged.items())
    return UserError(
        f"{where}: no checkpoint there is whole ({told}); put copies in their place, or delete them to begin anew"
    )


def step_folder(path, without: dict[str, str] | None = None) -> pathlib.Path | None:
    """The checkpoint meant by a path, `…/checkpoints/step_N`: that one itself, or of a workdir or its checkpoints the best (else the
    latest) of the whole ones. None where the path is none of these. Nothing there is changed.

    without: `{name: what is wrong}` of those that are not to be taken. A damaged one that is passed over is named on stderr; UserError
    where it is the one that is asked for, or there is no other.
    """
    path, without = pathlib.Path(path), without or {}
    if is_whole(path) or (
        _STEP.fullmatch(path.name) and path.parent.name == "checkpoints" and path.is_dir()
    ):
        if why := flaw(path):
            raise UserError(
                f"{path}: the checkpoint is damaged ({why}); name another, or the workdir for its best that is whole"
            )
        return path
    workdir = path if (path / "checkpoints").is_dir() else path.parent
    if path not in (workdir, workdir / "checkpoints"):
        return None
    steps = {
        step: loss for step, loss in saved_steps(workdir).items() if f"step_{step}" not in without
    }
    # What lacks its metadata may be one that a running training is just deleting, unless it is the latest.
    flaws = {
        f.name: flaw(f)
        for s, f in _step_folders(workdir).items()
        if s not in steps and (is_whole(f) or s > max(steps, default=-1))
    }
    damaged = {name: why for name, why in flaws.items() if why}
    if not steps:
        if damaged or without:
            raise _all_damaged(workdir, dict(sorted((without | damaged).items())))
        return None
    best = best_step(steps)
    chosen = workdir / "checkpoints" / f"step_{max(steps) if best is None else best}"
    for name, why in damaged.items():
        _say_once(
            f"{workdir}/checkpoints/{name} is damaged ({why}) and passed over; {chosen.name} is read"
        )
    return chosen


def read_newly(path):
    """(folder, trained tree) of the checkpoint meant by a path, as `step_folder` and `read_trained`; None where there is none.

    A running training deletes checkpoints that are neither its best nor its latest any more: where that happens to the chosen one while
    it is read, the choice is made again. So it is where the chosen one is found damaged, which is said; UserError as in `step_folder`.
    """
    what, damaged = f"reading {path}", {}
    while (folder := errors.retrying(lambda: step_folder(path, damaged), what)) is not None:
        try:
            return folder, errors.retrying(functools.partial(read_trained, folder), what)
        except Exception as error:
            if not is_whole(folder):
                continue
            why = _damage(error)
            if not why:
                raise
            if folder == pathlib.Path(path):
                raise UserError(
                    f"{path}: the checkpoint is damaged ({why}); name another, or the workdir for its best"
                ) from error
            damaged[folder.name] = why
            _say_once(f"{folder} is damaged ({why}) and passed over")
    return None


def read_trained(step_folder):
    """The trained tree alone of one checkpoint, numpy arrays, without the optimizer's state."""
    folder = pathlib.Path(step_folder).resolve() / "default"
    handler = ocp.PyTreeCheckpointHandler()
    stored = handler.metadata(folder).tree["trained"]
    want = {"trained": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), stored)}
    how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), want)
    with _one_error(), ocp.Checkpointer(handler) as checkpointer:
        return checkpointer.restore(
            folder, args=ocp.args.PyTreeRestore(want, how, partial_restore=True)
        )["trained"]


# ------------------------------------------------------------------------------------------------------------ resuming


def restore(folder, like):
    """The state saved in a step's folder, with the shapes, dtypes and shardings of `like`. Waits for no other process."""
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    reading = functools.partial(
        ocp.StandardCheckpointHandler().restore,
        pathlib.Path(folder).resolve() / "default",
        args=ocp.args.StandardRestore(abstract),
    )
    with _one_error():
        return errors.retrying(reading, f"reading {folder}")


def resume(workdir, like, say):
    """(step, state) of the latest whole checkpoint of a workdir, the same in all processes; (None, like) where there is none.

    Damaged ones later than that are said, by `say(text)`, and renamed so that they are not taken again; nothing is deleted. UserError
    where all are damaged; they stay as they are. To be called before `Checkpoints` is made, by whoever alone writes there.
    """
    folders = _step_folders(workdir)
    flaws = distributed.from_main(
        lambda: {
            str(s): errors.retrying(lambda f=f: flaw(f), f"reading {f}") for s, f in folders.items()
        }
    )
    damaged, state, found = {int(step): why for step, why in flaws.items() if why}, like, None
    for step in sorted(map(int, flaws), reverse=True):
        if step in damaged:
            continue
        why, folder = "", pathlib.Path(workdir) / "checkpoints" / f"step_{step}"
        try:
            state = restore(folder, like)
        except Exception as error:
            why = _damage(error)
            if not why:
                raise
        whys = [told for told in distributed.gathered(why) if told]
        if not whys:
            found = step
            break
        damaged[step] = whys[0]
    if damaged and found is None:
        raise _all_damaged(workdir, {f"step_{step}": damaged[step] for step in sorted(damaged)})
    for step in sorted(damaged):
        there, to = (
            pathlib.Path(workdir) / "checkpoints" / f"{prefix}step_{step}" for prefix in ("", ASIDE)
        )
        if distributed.main_after_all():
            tried = itertools.count(2)
            while to.exists():
                to = to.with_name(f"{ASIDE}step_{step}.{next(tried)}")
            there.rename(to)
        say(f"{there} is damaged ({damaged[step]}); it is kept as {to.name}")
    distributed.main_after_all()
    if damaged and max(damaged) > found:
        lost = max(damaged) - found
        say(
            f"going back from step {max(damaged)} to step {found}, the latest whole checkpoint: {lost} steps are trained again"
        )
    return found, state


# -------------------------------------------------------------------------------------------------------------- saving


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
                managers.LatestN(n=2),  # of the last one, files may be empty after a power loss
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
        self._workdir = pathlib.Path(workdir).resolve()
        with errors.naming(
            f"--workdir {workdir}: no folder of checkpoints can be made",
            "put in place what a link leads to, or give another folder",
        ):
            (self._workdir / "checkpoints").mkdir(parents=True, exist_ok=True)
        self._manager = _Manager(self._workdir / "checkpoints", options=options)

    def latest(self):
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def best(self):
        """The step with the lowest held-out loss, or None."""
        return best_step(saved_steps(self._workdir))

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
