"""Trains a configuration at every point of a sweep, and sums up what the swept field is worth."""

import dataclasses
import functools
import json
import pathlib
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from icae_jax import files, lock
from icae_jax.errors import UserError
from icae_jax.training import config_file
from icae_jax.training.train import DIVERGED, DONE, PREEMPTED
from icae_jax.training.workdir import FREE_FIELDS
from icae_jax.workflows import sweep_jobs, sweep_points, sweep_results
from icae_jax.workflows.sweep_points import DIVERGED_NOTE, Point

FAILED = 1  # exit code if some points failed; the same command continues
BAD_INPUT = 2

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sweep of a configuration file, its points checked.

    config: FILE[:arg]. overrides: `{field: text}` for all points, from the command line.
    """

    config: str
    name: str
    workdir: pathlib.Path
    overrides: Mapping[str, Any]

    @functools.cached_property
    def points(self) -> list[Point]:
        """Its points; UserError names what is wrong with one."""
        return sweep_points.make_points(self.config, self.name, self.workdir, self.overrides)

    @property
    def identity(self) -> dict[str, Any]:
        """What sweep.json records."""
        path, arg = config_file.find(self.config)  # the same by the file's path and by its name
        return {
            "config": f"{path.name}:{arg}" if arg else path.name,
            "sweep": self.name,
            "overrides": dict(self.overrides),
            "points": {point.name: point.changes for point in self.points},
        }

    @property
    def command(self) -> str:
        """The command that trains it, and shows its table once all is done."""
        flags = ["--config", self.config, "--sweep", self.name, "--workdir", str(self.workdir)]
        return shlex.join(["icae", "sweep", *flags, *sweep_points.override_flags(self.overrides)])


def claim(workdir: pathlib.Path, identity: Mapping[str, Any]) -> dict[str, int]:
    """Records a sweep in its folder's sweep.json; returns each point's number.

    UserError if the folder holds another sweep. A sweep may get more points, more steps, and other
    values of fields that do not change the mathematics. A point keeps its number for ever: new ones
    count on, wherever in the sweep they stand.
    """
    path, numbers = workdir / "sweep.json", {}
    if path.exists():
        recorded = files.read_json(path, "the sweep's identity")
        kinds = {"config": str, "sweep": str, "overrides": dict, "points": dict}
        files.check_fields(recorded, kinds, path)
        if changes := _conflicts(recorded, identity):
            raise UserError(
                f"{workdir} holds another sweep: {'; '.join(changes)}. "
                "Give the old values to continue it, or another --workdir"
            )
        numbers = recorded.get("numbers") or {
            name: number for number, name in enumerate(recorded["points"])
        }
    for name in identity["points"]:
        numbers.setdefault(name, len(numbers))
    files.write_json(path, {**identity, "numbers": numbers})
    return numbers


def _conflicts(recorded, identity):
    """What makes this another sweep than the one recorded, as lines `field: old -> new`."""
    pairs = {key: (recorded[key], identity[key]) for key in ("config", "sweep")}
    if recorded["sweep"] == identity["sweep"]:
        old, new = recorded["overrides"], identity["overrides"]
        fixed = [field for field in {**old, **new} if field not in FREE_FIELDS | {"steps"}]
        pairs |= {f"--config.{field}": (old.get(field), new.get(field)) for field in fixed}
        points = json.loads(json.dumps(identity["points"]))  # tuples as JSON reads them back
        pairs |= {
            f"point {name}": (changes, points.get(name))
            for name, changes in recorded["points"].items()
        }
    return [f"{what}: {old!r} -> {new!r}" for what, (old, new) in pairs.items() if old != new]


class Trainer:
    """Calls `icae` in one process after another, and passes SIGTERM on to the one that runs."""

    def __init__(self, on_sigterm: Callable[[], None] = lambda: None):
        self._on_sigterm = on_sigterm
        self._preempted, self._process, self._old_handler = False, None, None
        # Python handles signals in the main thread only.
        self._handles_signals = threading.current_thread() is threading.main_thread()

    def __enter__(self):
        if self._handles_signals:
            self._old_handler = signal.signal(signal.SIGTERM, self._pass_on)
        return self

    def __exit__(self, *_):
        if self._handles_signals:
            signal.signal(signal.SIGTERM, self._old_handler)

    def _pass_on(self, *_):
        self._preempted = True
        self._on_sigterm()
        if self._process:
            self._process.terminate()

    def __call__(self, command: Sequence[str]) -> int:
        """The exit code of `icae COMMAND`; 75 if SIGTERM came meanwhile, however it ended."""
        if self._preempted:
            return PREEMPTED
        arguments = [sys.executable, "-m", "icae_jax", *command]
        # Standard output is for the table.
        with subprocess.Popen(arguments, stdout=sys.__stderr__.fileno()) as self._process:
            if self._preempted:  # SIGTERM came before there was a process to pass it to
                self._process.terminate()
            code = self._process.wait()
        self._process = None
        return PREEMPTED if self._preempted else code


def train_points(
    points: Sequence[Point], call: Callable[[Sequence[str]], int], say: Say
) -> tuple[int, dict[str, int]]:
    """Trains the points that have not ended; `call(command)` returns an exit code.

    A diverged point is noted and not tried again until its folder is deleted. A preemption or bad
    input ends the sweep. Returns (exit code of the sweep, `{name: exit code}` of trained points).
    """
    codes: dict[str, int] = {}
    for number, point in enumerate(points, 1):
        heading = f"--- point {number} of {len(points)}: {point.name}"
        if point.ended:
            retry = f" (to try again: delete {point.folder})" if point.state == "diverged" else ""
            say(f"{heading}: {point.state} already{retry}")
            continue
        say(heading)
        code = codes[point.name] = call(point.command)
        if code == DIVERGED:
            note = "exit code 3; delete this folder to train the point again\n"
            (point.folder / DIVERGED_NOTE).write_text(note, encoding="utf-8")
        elif code in (PREEMPTED, BAD_INPUT):
            return code, codes
        elif code != DONE:
            say(f"--- point {point.name} ended with exit code {code}")
    return (FAILED if set(codes.values()) - {DONE, DIVERGED} else DONE), codes


def write_jobs(sweep: Sweep, folder: pathlib.Path) -> tuple[list[pathlib.Path], list[int], str]:
    """Writes a job per point. Returns (their paths, numbers of those left to run, how to run)."""
    numbers = claim(sweep.workdir, sweep.identity)
    jobs = sweep_jobs.write_jobs(sweep.points, numbers, folder)
    left = sorted(numbers[point.name] for point in sweep.points if not point.ended)
    unfinished = {number: jobs[number] for number in left}
    return list(jobs.values()), left, sweep_jobs.how_to_run(unfinished, folder, sweep.command)


def train_sweep(sweep: Sweep, say: Say) -> tuple[int, dict[str, Any] | None]:
    """Trains a sweep. Returns (exit code, its results; None after a preemption or bad input)."""
    identity = sweep.identity  # checks every point before the workdir is touched
    with lock.only_writer(sweep.workdir, "--workdir") as held:
        claim(sweep.workdir, identity)
        with Trainer(held.leave) as call:
            code, codes = train_points(sweep.points, call, say)
        if code in (PREEMPTED, BAD_INPUT):
            stopped = "saved" if code == PREEMPTED else "stopped"
            say(f"icae sweep: {stopped}; the same command continues")
            return code, None
        results = sweep_results.collect(identity, sweep.points, codes)
        sweep_results.write(sweep.workdir, results)
    if code:
        failed = [name for name, point in codes.items() if point not in (DONE, DIVERGED)]
        say(f"icae sweep: {', '.join(failed)} failed; run the same command again")
    return code, results


def sum_up(sweep: Sweep) -> dict[str, Any]:
    """The results of what was trained so far, written as files too. UserError if nothing was."""
    identity = sweep.identity
    if not (sweep.workdir / "sweep.json").exists():
        raise UserError(
            f"--workdir {sweep.workdir} holds no sweep; train it first, without --table"
        )
    claim(sweep.workdir, identity)
    results = sweep_results.collect(identity, sweep.points, {})
    sweep_results.write(sweep.workdir, results)
    return results
