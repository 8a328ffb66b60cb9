"""Which checkpoints a workdir holds, whether they are whole, and reading the trained tree of one.

Works on plain files alone: a reader must neither delete what a running training is just writing,
as an Orbax manager does, nor wait for other processes. A checkpoint is complete once Orbax has
renamed its folder to `step_N`; a power loss can still leave its files empty, cut short or absent.
"""

import contextlib
import functools
import gc
import json
import logging
import math
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Iterator

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from jaxtyping import PyTree

from icae_jax import errors, files
from icae_jax.errors import UserError

PathLike = str | os.PathLike
Damage = str  # what is wrong with a checkpoint; "" where nothing is
_DAMAGE_STATUS = re.compile(  # as tensorstore spells it
    r"\b(OUT_OF_RANGE|DATA_LOSS|NOT_FOUND|FAILED_PRECONDITION|INVALID_ARGUMENT)\b: "
    r"|\bError decoding |[Cc]orrupt"
)
_NOT_DAMAGE = (MemoryError, jax.errors.JaxRuntimeError, PermissionError, KeyboardInterrupt)
_DAMAGE_ERRORS = (
    FileNotFoundError,
    NotADirectoryError,
    EOFError,
    KeyError,
    json.JSONDecodeError,
    UnicodeDecodeError,
)
_STEP = re.compile(r"step_(\d+)")


# ------------------------------------------------------------------------------------------ damage


def flaw(folder: PathLike) -> Damage:
    """What is wrong with a checkpoint's files, as far as shows without reading its arrays."""
    folder = pathlib.Path(folder)
    metadata, loss = folder / "default" / "_METADATA", folder / "metrics" / "metrics"
    if not is_whole(folder):
        return "default/_METADATA is missing"
    try:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not path.name.startswith(".") and not path.stat().st_size:
                return f"{path.relative_to(folder)} is empty"
        for path in (metadata, loss, *folder.glob("default/array_metadatas/*")):
            if path.exists() and not isinstance(_json(path), dict):
                return f"{path.relative_to(folder)} is garbled"
        # A checkpoint saved without an evaluation has no metrics.
        if loss.exists() and not files.is_kind(_json(loss).get("loss"), float):
            return "metrics/metrics holds no loss"
        return _index_flaw(folder / "default") if _json(metadata).get("use_ocdbt") else ""
    except FileNotFoundError as error:  # it is just being deleted
        return f"{error.filename} is missing"


def _json(path: pathlib.Path):
    """A file's content; None where it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None


def _index_flaw(folder: pathlib.Path) -> Damage:
    """What is wrong with the index of a folder's arrays: some KiB, with checksums."""
    try:
        spec = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder.resolve()}/"}}
        index = tensorstore.KvStore.open(spec).result().list().result()
    except ValueError as error:
        why = damage(error)
        if not why:
            raise
        return why
    return "" if index else "its index of arrays is missing"


def damage(error: BaseException) -> Damage:
    """What an error from reading a checkpoint says about damage to its files.

    "" where the cause is something else: a disk or network that does not answer, memory, rights.
    """
    if errors.transient(error):
        return ""
    for cause in errors.causes(error):
        text = str(cause)
        if isinstance(cause, _NOT_DAMAGE):
            return ""
        if isinstance(cause, _DAMAGE_ERRORS) or _DAMAGE_STATUS.search(text):
            text = text.split(" [tensorstore_spec")[0].split(" [source locations")[0].strip()
            if not text:
                return type(cause).__name__
            return re.sub(r"^.{200,}(?=.{200}$)", "… ", text.splitlines()[0])
        if "structure" in text and isinstance(cause, ValueError):  # the tree's metadata are missing
            return text.strip().splitlines()[0]
    return ""


@contextlib.contextmanager
def one_error() -> Iterator[None]:
    """Keeps tracebacks off stderr: of several failed reads Orbax raises one, asyncio logs all."""
    logger = logging.getLogger("asyncio")
    before = sys.unraisablehook, logger.disabled
    sys.unraisablehook, logger.disabled = lambda *_: None, True
    try:
        yield
    except Exception as error:
        traceback.clear_frames(error.__traceback__)
        gc.collect()  # coroutines that were never awaited complain when they are collected
        raise
    finally:
        sys.unraisablehook, logger.disabled = before


def all_damaged(where: PathLike, damaged: dict[str, Damage]) -> UserError:
    """The error that no checkpoint is left, naming what is wrong with each."""
    named = "; ".join(f"{name}: {why}" for name, why in damaged.items())
    return UserError(
        f"{where}: no checkpoint there is whole ({named}); "
        "put copies in their place, or delete them to begin anew"
    )


@functools.cache
def _say_once(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------- choosing


def is_whole(folder: PathLike) -> bool:
    """Whether a path is the folder of one complete checkpoint."""
    return (pathlib.Path(folder) / "default" / "_METADATA").is_file()


def step_folders(workdir: PathLike) -> dict[int, pathlib.Path]:
    """The folders of a workdir's checkpoints, whole or not, by rising step."""
    folders = pathlib.Path(workdir).glob("checkpoints/step_*")
    steps = {int(m[1]): folder for folder in folders if (m := _STEP.fullmatch(folder.name))}
    return dict(sorted(steps.items()))


def saved_steps(workdir: PathLike) -> dict[int, float | None]:
    """The whole checkpoints of a workdir by rising step, with their held-out losses.

    None stands for a checkpoint that was not evaluated.
    """
    steps = {}
    for step, folder in step_folders(workdir).items():
        if flaw(folder):
            continue
        path = folder / "metrics" / "metrics"
        steps[step] = (_json(path) or {}).get("loss") if path.exists() else None
    return steps


def best_step(steps: dict[int, float | None]) -> int | None:
    """The step with the lowest finite loss, the earlier of equals; None where there is none."""
    ranked = [
        (loss, step) for step, loss in steps.items() if loss is not None and math.isfinite(loss)
    ]
    return min(ranked)[1] if ranked else None


def step_folder(path: PathLike, exclude: dict[str, Damage] | None = None) -> pathlib.Path | None:
    """The checkpoint that a path means, `…/checkpoints/step_N`; None where it means none.

    That is the folder itself, or for a workdir or its `checkpoints` the best whole one, else the
    latest. Damaged ones that are passed over are named on stderr.

    Args:
      path: a workdir, its folder of checkpoints, or one checkpoint.
      exclude: names of damaged checkpoints not to choose, and what is wrong with them.

    Raises:
      UserError: the checkpoint named is damaged, or all are.
    """
    path, exclude = pathlib.Path(path), exclude or {}
    is_step = _STEP.fullmatch(path.name) and path.parent.name == "checkpoints" and path.is_dir()
    if is_whole(path) or is_step:
        if why := flaw(path):
            raise UserError(
                f"{path}: the checkpoint is damaged ({why}); "
                "name another, or the workdir for its best that is whole"
            )
        return path
    workdir = path if (path / "checkpoints").is_dir() else path.parent
    if path not in (workdir, workdir / "checkpoints"):
        return None
    saved = saved_steps(workdir)
    steps = {step: loss for step, loss in saved.items() if f"step_{step}" not in exclude}
    # A folder without metadata may be one that a running training is deleting, unless it is the
    # latest.
    flaws = {
        folder.name: flaw(folder)
        for step, folder in step_folders(workdir).items()
        if step not in steps and (is_whole(folder) or step > max(steps, default=-1))
    }
    damaged = {name: why for name, why in flaws.items() if why}
    if not steps:
        if damaged or exclude:
            raise all_damaged(workdir, dict(sorted((exclude | damaged).items())))
        return None
    best = best_step(steps)
    chosen = workdir / "checkpoints" / f"step_{max(steps) if best is None else best}"
    for name, why in damaged.items():
        _say_once(
            f"{workdir}/checkpoints/{name} is damaged ({why}) and passed over; "
            f"{chosen.name} is read"
        )
    return chosen


# ----------------------------------------------------------------------------------------- reading


def read_selected(path: PathLike) -> tuple[pathlib.Path, PyTree] | None:
    """(folder, trained tree) of the checkpoint that a path means; None where it means none.

    Chooses again where a running training deletes the chosen one meanwhile, or where its arrays
    turn out damaged. UserError as in `step_folder`.
    """
    what, damaged = f"reading {path}", {}
    while (folder := errors.retrying(lambda: step_folder(path, damaged), what)) is not None:
        try:
            return folder, errors.retrying(functools.partial(read_trained, folder), what)
        except Exception as error:
            if not is_whole(folder):
                continue
            why = damage(error)
            if not why:
                raise
            if folder == pathlib.Path(path):
                raise UserError(
                    f"{path}: the checkpoint is damaged ({why}); "
                    "name another, or the workdir for its best"
                ) from error
            damaged[folder.name] = why
            _say_once(f"{folder} is damaged ({why}) and passed over")
    return None


def read_trained(folder: PathLike) -> PyTree:
    """The trained tree of one checkpoint as numpy arrays, without the optimizer's state."""
    folder = pathlib.Path(folder).resolve() / "default"
    handler = ocp.PyTreeCheckpointHandler()
    stored = handler.metadata(folder).tree["trained"]
    like = {"trained": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), stored)}
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), like)
    with one_error(), ocp.Checkpointer(handler) as checkpointer:
        args = ocp.args.PyTreeRestore(like, as_numpy, partial_restore=True)
        return checkpointer.restore(folder, args=args)["trained"]
