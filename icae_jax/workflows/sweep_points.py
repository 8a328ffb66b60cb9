"""The points of a sweep, as a configuration file defines them.

`sweep_NAME(add)` in the file calls `add(**{"compression.k": 64, …})` once per point, with dotted
field names and values. Each point is a run of `icae train` in a folder of its own.
"""

import pathlib
import re
import runpy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from icae_jax.errors import UserError
from icae_jax.training import config_file
from icae_jax.training.config import TrainConfig
from icae_jax.training.workdir import steps_done

DIVERGED_NOTE = "DIVERGED"  # a file beside a point's metrics: the point is not tried again
POINT_MARK = "{point}"  # stands for the point's name in a field of the command line

Changes = Mapping[str, Any]  # {dotted field: value}


class Point(NamedTuple):
    """One point of a sweep.

    folder: named after the point. changes: the fields it sets. config: its whole configuration.
    command: the arguments of `icae` that train it.
    """

    folder: pathlib.Path
    changes: Changes
    config: TrainConfig
    command: list[str]

    @property
    def name(self) -> str:
        """The point's name, such as `k=64,rate=8`."""
        return self.folder.name

    @property
    def state(self) -> str:
        """What its folder says: done, diverged, unfinished or not started."""
        if steps_done(self.folder) >= self.config.steps:
            return "done"
        if (self.folder / DIVERGED_NOTE).exists():
            return "diverged"
        return "unfinished" if self.folder.exists() else "not started"

    @property
    def ended(self) -> bool:
        """Whether it need not be trained any more."""
        return self.state in ("done", "diverged")


def make_points(
    config: str, name: str, workdir: pathlib.Path, overrides: Mapping[str, Any]
) -> list[Point]:
    """The points of `sweep_NAME`, with all of their configurations checked.

    config: FILE[:arg]. overrides: `{field: text}` of the command line; `{point}` in a text stands
    for the point's name. UserError names the point and what is wrong with it.
    """
    all_changes = read_sweep(config_file.find(config)[0], name)
    points: list[Point] = []
    for point_name, changes in zip(point_names(all_changes), all_changes, strict=True):
        try:
            point_config = _point_config(config, overrides, changes)
            twin = next((p.name for p in points if p.config == point_config), None)
            if twin:
                raise UserError(f"the same configuration as point {twin}; list it once")
        except UserError as error:
            raise UserError(f"sweep {name}, point {point_name}: {error}") from error
        folder = workdir / point_name
        command = ["train", "--config", config, "--workdir", str(folder)]
        command += [flag.replace(POINT_MARK, point_name) for flag in override_flags(overrides)]
        command += override_flags(changes)
        points.append(Point(folder, changes, point_config, command))
    return points


def override_flags(overrides: Mapping[str, Any]) -> list[str]:
    """The flags that set these fields on a command line."""
    return [f"--config.{field}={value}" for field, value in overrides.items()]


def _point_config(config, overrides, changes):
    fields = config_file.field_types(TrainConfig)
    for field in changes:
        if field not in fields:
            raise UserError(f"{field} is not a field of the configuration")
    for field in changes.keys() & overrides.keys():
        raise UserError(f"{field} is set by the sweep itself; leave out --config.{field}")
    point_config = config_file.load(TrainConfig, config, {**overrides, **changes})
    if not point_config.data.eval or not point_config.eval_examples:
        raise UserError(
            "data.eval or eval_examples is not set; a sweep compares held-out losses: "
            "give --config.data.eval=PATH"
        )
    return point_config


def read_sweep(path: pathlib.Path, name: str) -> list[dict[str, Any]]:
    """What each point of `sweep_NAME` changes. UserError if the file has no such sweep."""
    module = runpy.run_path(str(path))
    sweeps = [key.removeprefix("sweep_") for key in module if key.startswith("sweep_")]
    if name not in sweeps:
        known = ", ".join(sweeps) or "no sweeps; define sweep_NAME(add) there"
        raise UserError(f"--sweep {name}: {path} has {known}")
    points = []

    def add(**changes):
        points.append(
            {field: tuple(v) if isinstance(v, list) else v for field, v in changes.items()}
        )

    module[f"sweep_{name}"](add)
    if not points:
        raise UserError(f"--sweep {name}: sweep_{name} of {path} adds no points")
    return points


def varied_fields(points: Sequence[Changes]) -> list[str]:
    """The fields in which points differ, in order of appearance; all of them for a single point."""
    fields = dict.fromkeys(field for changes in points for field in changes)
    first = points[0]
    differing = [
        field
        for field in fields
        if any(
            field not in changes or field not in first or changes[field] != first[field]
            for changes in points
        )
    ]
    return differing or list(fields)


def point_names(points: Sequence[Changes]) -> list[str]:
    """A readable folder name for each point, such as `k=64,rate=8`: only what varies."""
    fields = varied_fields(points)
    leaves = [field.rpartition(".")[2] for field in fields]
    labels = {
        field: leaf if leaves.count(leaf) == 1 else field
        for field, leaf in zip(fields, leaves, strict=True)
    }
    names: list[str] = []
    for number, changes in enumerate(points):
        pairs = [f"{labels[f]}={short_text(changes[f])}" for f in fields if f in changes]
        name = re.sub(r"[^\w.,=+-]", "_", ",".join(pairs) or "unchanged", flags=re.ASCII)[:100]
        names.append(f"{name}-{number}" if name in names else name)
    return names


def short_text(value: Any) -> str:
    """A field's value in a few characters."""
    if isinstance(value, tuple):
        return "+".join(map(short_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
