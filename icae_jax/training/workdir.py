"""What a training's workdir records of itself, and whether a configuration may continue it."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from icae_jax import errors, files
from icae_jax.compression.config import EARLIER
from icae_jax.errors import UserError
from icae_jax.training import config_file, metrics
from icae_jax.training.config import LoopConfig

# Paths are compared by the content that they stand for, which `identity` fingerprints.
PATH_FIELDS = frozenset(
    {"base", "init_from", "data.train", "data.eval", "data.cache_dir", "data.tfds_dir"}
    | {"objectives.teacher"}
)
# Fields that may change when a workdir is continued; any other changes the mathematics. On other
# devices (mesh) results agree within rounding.
FREE_FIELDS = PATH_FIELDS | {
    "log_every",
    "eval_every",
    "eval_examples",
    "checkpoint_every",
    "remat",
    "remat_decoder",
    "attention",
    "unroll",
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
    "data.max_row_bytes",
    "data.strict",
}
# Fingerprints that older workdirs lack: the first run that finds none records its own.
LATER_IDENTITY = frozenset(
    {"identity.tokenizer", "identity.weights", "identity.template", "identity.trigger"}
)


# --------------------------------------------------------------------------------------- reading


def steps_done(workdir: str | pathlib.Path) -> int:
    """Steps after which a workdir's training ended, from its DONE; 0 if it did not end."""
    done = pathlib.Path(workdir) / "DONE"
    text = done.read_bytes().strip() if done.is_file() else b""
    return int(text) if text.isdigit() else 0


def nothing_trained(workdir: str | pathlib.Path) -> bool:
    """Whether a workdir holds no trained step: no checkpoint, even damaged, no metrics, no DONE."""
    workdir = pathlib.Path(workdir)
    if any(workdir.glob("checkpoints/*step_*")) or (workdir / "DONE").exists():
        return False
    return not any(line["step"] > 0 for line in metrics.read_lines(workdir / "metrics.jsonl"))


def read_run(path: str | pathlib.Path) -> dict[str, Any]:
    """A workdir's config.json: `{dotted field: value}`, with the fingerprints as `identity.NAME`.

    UserError where the file is something else.
    """
    flat = files.read_json(path, "the run's configuration")
    for field, value in flat.items():
        if isinstance(value, dict):
            raise UserError(
                f"{path}: {field} is {value!r}; expected fields by their dotted names, "
                "such as compression.k"
            )
        if field.startswith("identity.") and isinstance(value, int | float | bool):
            raise UserError(
                f"{path}: {field} is {value!r}; expected a fingerprint, which is a text"
            )
    return flat


def recorded(workdir: str | pathlib.Path) -> dict[str, Any]:
    """`read_run` of a workdir; empty where no run has begun."""
    path = pathlib.Path(workdir) / "config.json"
    return read_run(path) if path.exists() else {}


# -------------------------------------------------------------------------------------- comparing


def _as_json(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields as JSON holds them: tuples are lists."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}


def shared_fields(config: LoopConfig) -> dict[str, Any]:
    """What a run's processes must agree on: every field but paths, which may differ by host."""
    fields = config_file.flatten(dataclasses.asdict(config))
    return _as_json({name: value for name, value in fields.items() if name not in PATH_FIELDS})


def _check_types(recorded: Mapping[str, Any], now: Mapping[str, Any], path: pathlib.Path) -> None:
    """UserError where a recorded field has another type than the same field of a configuration."""
    for field, value in recorded.items():
        like = now.get(field)
        kind = type(like)
        if field.startswith("identity.") or kind not in (bool, int, float, str, list):
            continue  # an older version's fingerprint may have had another form
        if not (isinstance(value, bool) if kind is bool else files.is_kind(value, kind)):
            raise UserError(
                f"{path}: {field} is {value!r}; expected {kind.__name__}, such as {like!r}. "
                "Mend that line of the file"
            )


def _refused(
    before: Mapping[str, Any], now: Mapping[str, Any], accepted: Mapping[str, tuple[Any, ...]]
) -> list[str]:
    """The changed fields with which a workdir cannot be continued."""
    unrecorded = LATER_IDENTITY - before.keys()
    refused = [
        name
        for name in _changed(before, now)
        if name not in FREE_FIELDS | unrecorded and before.get(name) not in accepted.get(name, ())
    ]
    fixed_schedule = now["optimizer.schedule"] == "constant" or now["optimizer.decay_steps"]
    if "steps" in refused and now["steps"] > before["steps"] and fixed_schedule:
        refused.remove("steps")
    return refused


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k)]


def check_workdir(
    workdir: str | pathlib.Path,
    config: LoopConfig,
    identity: Mapping[str, Any] | None,
    writes: Callable[[], bool] = lambda: True,
    binding: bool = True,
) -> list[str]:
    """Compares a configuration with the one a workdir was started with, and records the new one.

    A field that is newer than the workdir counts as its default, or as what `EARLIER` says where
    that depends on other fields: as what was done before.

    Args:
      workdir: the run's folder.
      config: its configuration now.
      identity: `{name: fingerprint}` of what the configuration's paths stand for, compared in their
        place. A tuple holds the fingerprint and its forms in earlier versions, which count as the
        same and are replaced. None: not known yet; the configuration alone is compared.
      writes: asked after everything is checked, whether this process records the configuration.
      binding: False if nothing is trained there yet (`nothing_trained`), for instance after a start
        without enough memory: then any configuration may take the workdir.

    Returns:
      The changes to log, as lines of text.

    Raises:
      UserError: lists the changed fields that change the mathematics; nothing is written.
    """
    path = pathlib.Path(workdir) / "config.json"
    accepted = {
        f"identity.{name}": forms if isinstance(forms, tuple) else (forms,)
        for name, forms in (identity or {}).items()
    }
    now = _as_json(config_file.flatten(dataclasses.asdict(config)))
    now |= {name: forms[0] for name, forms in accepted.items()}

    def record():
        if writes():
            errors.retrying(lambda: files.write_json(path, now), f"writing {path}")

    if not path.exists():
        lost = binding and not nothing_trained(workdir)
        record()
        note = (
            f"{path} was missing, and is now this run's: what was trained there before is unknown"
        )
        return [f"{note}, and so is its base"] if lost else []
    found = read_run(path)
    _check_types(found, now, path)
    earlier = {f"compression.{name}": value for name, value in EARLIER.items()}
    defaults = _as_json(config_file.default_fields(type(config)))
    before = defaults | {k: v for k, v in earlier.items() if k in defaults} | found
    if identity is None:
        before = {k: v for k, v in before.items() if not k.startswith("identity.")}
    lines = {k: f"{k}: {before.get(k)!r} -> {now.get(k)!r}" for k in _changed(before, now)}
    refused = _refused(before, now, accepted)
    notes = []
    if refused and not binding:
        notes = [f"the run itself, as nothing has been trained in {workdir} yet"]
    elif refused:
        raise UserError(
            f"{workdir} was started with another configuration, and these fields change its "
            f"mathematics: {'; '.join(lines[k] for k in refused)}. "
            "Give the old values to continue it, or another --workdir"
        )
    record()
    return notes + list(lines.values())
