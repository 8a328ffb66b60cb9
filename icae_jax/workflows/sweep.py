"""`icae sweep`: trains a configuration at every point of a sweep that its file defines, and shows what the swept field is worth.

`sweep_NAME(add)` in a configuration file calls `add(**{"compression.k": 64, …})` for each point: fields by their dotted names, and values.
Every point is a run of `icae train` in a folder of its own.
"""

import contextlib
import json
import os
import pathlib
import re
import runpy
import shlex
import signal
import subprocess
import sys
import threading
import typing

from icae_jax import files, lock
from icae_jax.errors import UserError
from icae_jax.training import config_file
from icae_jax.training.config import TrainConfig
from icae_jax.training.train import DIVERGED, DONE, PREEMPTED
from icae_jax.training.workdir import FREE_FIELDS, steps_done
from icae_jax.workflows import sweep_results

FAILED = 1  # exit code where some points did not end; the same command goes on
NOTE = "DIVERGED"  # beside a point's metrics: it is not tried again
IN_PATHS = "{point}"  # stands for the point's name in a field of the command line

BAD_INPUT = 2


class Point(typing.NamedTuple):
    """One point of a sweep: its folder, named after it, the fields it sets, its whole configuration, what `icae` is called with."""

    folder: pathlib.Path
    changes: dict
    config: TrainConfig
    command: list

    @property
    def name(self):
        return self.folder.name

    @property
    def state(self):
        """done, diverged, unfinished or not started, as its folder says."""
        if steps_done(self.folder) >= self.config.steps:
            return "done"
        if (self.folder / NOTE).exists():
            return "diverged"
        return "unfinished" if self.folder.exists() else "not started"


# ------------------------------------------------------------------------------------------------------------ expansion


def expand(path, name):
    """The points of `sweep_NAME` of a configuration file, each `{dotted field: value}`; UserError where there are none."""
    made = runpy.run_path(str(path))
    known = [key.removeprefix("sweep_") for key in made if key.startswith("sweep_")]
    if name not in known:
        raise UserError(
            f"--sweep {name}: {path} has {', '.join(known) or 'no sweeps; define sweep_NAME(add) there'}"
        )
    points = []
    made[f"sweep_{name}"](
        lambda **changes: points.append(
            {f: tuple(v) if isinstance(v, list) else v for f, v in changes.items()}
        )
    )
    if not points:
        raise UserError(f"--sweep {name}: sweep_{name} of {path} adds no points")
    return points


def varied(points):
    """The fields that the points differ in, in the order in which they come; all of them where there is one point."""
    fields = dict.fromkeys(field for changes in points for field in changes)
    differ = [
        f
        for f in fields
        if any(f not in p or f not in points[0] or p[f] != points[0][f] for p in points)
    ]
    return differ or list(fields)


def names(points):
    """A readable folder name for each point, such as `k=64,rate=8`: what the points differ in."""
    fields = varied(points)
    last = [field.rpartition(".")[2] for field in fields]
    short = {
        field: name if last.count(name) == 1 else field
        for field, name in zip(fields, last, strict=True)
    }
    made = []
    for number, changes in enumerate(points):
        text = (
            ",".join(
                f"{short[f]}={sweep_results.shown(changes[f])}" for f in fields if f in changes
            )
            or "unchanged"
        )
        text = re.sub(r"[^\w.,=+-]", "_", text, flags=re.ASCII)[:100]
        made.append(f"{text}-{number}" if text in made else text)
    return made


def plan(config, name, workdir, overrides):
    """The `Point`s of a sweep, all of their configurations checked.

    config: FILE[:arg]. overrides: `{field: text}` of the command line, where `{point}` stands for the point's name. UserError names what
    the sweep or the command line has wrong, and the point.
    """
    flags = [f"--config.{field}={text}" for field, text in overrides.items()]
    points = []
    listed = expand(config_file.find(config)[0], name)
    for point, changes in zip(names(listed), listed, strict=True):
        try:
            for field in changes.keys() & overrides.keys():
                raise UserError(f"{field} is set by the sweep itself; leave out --config.{field}")
            made = config_file.load(TrainConfig, config, {**overrides, **changes})
            if not made.data.eval or not made.eval_examples:
                raise UserError(
                    "data.eval or eval_examples is not set; a sweep compares held-out losses: give --config.data.eval=PATH"
                )
            twin = next((p.name for p in points if p.config == made), None)
            if twin:
                raise UserError(f"the same configuration as point {twin}; list it once")
        except UserError as error:
            raise UserError(f"sweep {name}, point {point}: {error}") from error
        own = [flag.replace(IN_PATHS, point) for flag in flags] + [
            f"--config.{field}={value}" for field, value in changes.items()
        ]
        folder = workdir / point
        points.append(
            Point(
                folder, changes, made, ["train", "--config", config, "--workdir", str(folder), *own]
            )
        )
    return points


def claim(workdir: pathlib.Path, sweep: dict) -> dict[str, int]:
    """Records the sweep in its folder's sweep.json, and returns each point's number. UserError where the folder holds another sweep.

    A sweep may get more points, more steps, and other values of what changes no mathematics. A point keeps its number for ever: new ones
    count on, wherever in the sweep they stand.
    """
    path, numbers = workdir / "sweep.json", {}
    if path.exists():
        before = files.read_json(path, "the sweep's identity")
        files.check_fields(
            before, {"config": str, "sweep": str, "overrides": dict, "points": dict}, path
        )
        pairs = {key: (before[key], sweep[key]) for key in ("config", "sweep")}
        if before["sweep"] == sweep["sweep"]:
            fixed = [
                f
                for f in {**before["overrides"], **sweep["overrides"]}
                if f not in FREE_FIELDS | {"steps"}
            ]
            pairs |= {
                f"--config.{f}": (before["overrides"].get(f), sweep["overrides"].get(f))
                for f in fixed
            }
            now = json.loads(json.dumps(sweep["points"]))  # as read back: without tuples
            pairs |= {
                f"point {name}": (changes, now.get(name))
                for name, changes in before["points"].items()
            }
        lines = [f"{what}: {old!r} -> {new!r}" for what, (old, new) in pairs.items() if old != new]
        if lines:
            raise UserError(
                f"{workdir} holds another sweep: {'; '.join(lines)}. Give the old values to continue it, or another --workdir"
            )
        numbers = before.get("numbers") or {
            name: number for number, name in enumerate(before["points"])
        }
    for name in sweep["points"]:
        numbers.setdefault(name, len(numbers))
    files.write_json(path, sweep | {"numbers": numbers})
    return numbers


# ------------------------------------------------------------------------------------------------------------ the points


class Trainer:
    """Calls `icae` in one process after another, and passes SIGTERM on to the one that runs. noticed: called when it comes."""

    def __init__(self, noticed=lambda: None):
        self._noticed = noticed

    def __enter__(self):
        self.asked, self._child = False, None
        self._usable = (
            threading.current_thread() is threading.main_thread()
        )  # elsewhere there are no signals
        if self._usable:
            self._before = signal.signal(signal.SIGTERM, self._pass_on)
        return self

    def __exit__(self, *_):
        if self._usable:
            signal.signal(signal.SIGTERM, self._before)

    def _pass_on(self, *_):
        self.asked = True
        self._noticed()
        if self._child:
            self._child.terminate()

    def __call__(self, command):
        """The exit code of `icae COMMAND`; 75 if SIGTERM came meanwhile, however the process took it."""
        if self.asked:
            return PREEMPTED
        # Standard output is for the table.
        with subprocess.Popen(
            [sys.executable, "-m", "icae_jax", *command], stdout=sys.__stderr__.fileno()
        ) as self._child:
            if self.asked:  # it came before there was a process to tell
                self._child.terminate()
            code = self._child.wait()
        self._child = None
        return PREEMPTED if self.asked else code


def train(points, call):
    """Trains the points that are not done, one after another, each with `call(command) -> exit code`.

    A diverged one is noted and not tried again, until its folder is deleted; a preempted one and one with bad input end the sweep.
    Returns (exit code of the sweep, `{name: exit code}` of the points that were trained).
    """
    codes = {}
    for number, point in enumerate(points, 1):
        if point.state in ("done", "diverged"):
            again = f" (to try again: delete {point.folder})" if point.state == "diverged" else ""
            print(
                f"--- point {number} of {len(points)}: {point.name}: {point.state} already{again}",
                file=sys.stderr,
            )
            continue
        print(f"--- point {number} of {len(points)}: {point.name}", file=sys.stderr)
        code = codes[point.name] = call(point.command)
        if code == DIVERGED:
            (point.folder / NOTE).write_text(
                "exit code 3; delete this folder to train the point again\n", encoding="utf-8"
            )
        elif code in (PREEMPTED, BAD_INPUT):
            return code, codes
        elif code != DONE:
            print(f"--- point {point.name} ended with exit code {code}", file=sys.stderr)
    return (FAILED if set(codes.values()) - {DONE, DIVERGED} else DONE), codes


JOB = """#!/bin/sh
# {name}
# Paths may be relative to this folder; where it is not there, as on a TPU worker, to the one in which the launcher starts this.
[ ! -d {here} ] || cd {here}
[ ! -f {folder}/{note} ] || {{ echo {name}: diverged already, to try again delete {folder}; exit 0; }}
[ "$(cat {folder}/DONE 2>/dev/null)" -ge {steps} ] 2>/dev/null && {{ echo {name}: done already; exit 0; }}
exec icae {command}
"""


def write_jobs(
    points: list[Point], numbers: dict[str, int], folder: pathlib.Path
) -> dict[int, pathlib.Path]:
    """Writes an executable file for each point into a folder, point-000.sh, … by its number; returns `{number: path}`.

    A file is always the same point's, so that what Slurm starts again trains what it trained before. Those of points that are done or
    diverged say so, and end.
    """
    jobs = {numbers[point.name]: folder / f"point-{numbers[point.name]:03}.sh" for point in points}
    for old in set(folder.glob("point-*.sh")) - set(jobs.values()):  # another sweep's
        old.unlink()
    for point in points:
        path = jobs[numbers[point.name]]
        with files.replacing_file(path) as tmp:
            text = JOB.format(
                name=point.name,
                here=shlex.quote(os.getcwd()),
                folder=shlex.quote(str(point.folder)),
                note=NOTE,
                steps=point.config.steps,
                command=shlex.join(point.command),
            )
            tmp.write_text(text, encoding="utf-8")
        mode = path.stat().st_mode
        path.chmod(mode | (mode & 0o444) >> 2)  # whoever may read it may run it
    return dict(sorted(jobs.items()))


def _ranges(numbers):
    """Numbers as `sbatch --array` takes them, such as 0-2,5."""
    spans = []
    for number in sorted(numbers):
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(f"{first}-{last}" if first < last else str(first) for first, last in spans)


def _jobs_text(jobs, folder, again):
    """How to start the jobs that are left. jobs: `{number: path}`."""
    quoted = shlex.quote(str(folder))
    lines = (
        f"{folder}: {len(jobs)} jobs to run, each trains one point; run again, it continues",
        f'  one after another  for job in {quoted}/point-*.sh; do sh "$job"; done',
        f"  SLURM              sbatch --array={_ranges(jobs)} launch/slurm.sbatch --jobs {quoted}",
        f"  TPU pod            launch/tpu_pod.sh … -- sh {quoted}/{next(iter(jobs.values())).name}",
        f"and then the table   {again}",
    )
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------- command line


def main(parser, argv):
    """Runs a sweep, or writes its jobs, or sums up what there is of it. Returns the exit code."""
    parser.epilog = (
        "--config.field=value: a field of all points, as with icae train; {point} in it stands for the point's name. "
        "Exit codes: 0 every point is done or diverged, 1 some failed (the same command goes on), 2 bad input, 75 stopped by SIGTERM."
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE[:arg]",
        help="a configuration file with sweep_NAME(add)",
    )
    parser.add_argument("--sweep", required=True, metavar="NAME", help="which sweep of the file")
    parser.add_argument(
        "--workdir",
        required=True,
        help="the points' folders and the results; the same command continues what is there",
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--jobs",
        metavar="DIR",
        help="train nothing, write a shell file for each point, always under the same number",
    )
    instead.add_argument("--table", action="store_true", help="train nothing, sum up what is there")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args, rest = parser.parse_known_args(argv)
    workdir, overrides = pathlib.Path(args.workdir), config_file.overrides(rest)
    points = plan(args.config, args.sweep, workdir, overrides)
    sweep = {"config": pathlib.Path(args.config).name, "sweep": args.sweep, "overrides": overrides}
    sweep["points"] = {point.name: point.changes for point in points}
    if args.table and not (workdir / "sweep.json").exists():
        raise UserError(f"--workdir {workdir} holds no sweep; train it first, without --table")
    with (
        contextlib.nullcontext()
        if args.jobs or args.table
        else lock.only_writer(workdir, "--workdir") as held
    ):
        return _run(args, workdir, points, sweep, overrides, held)


def _run(args, workdir, points, sweep, overrides, held):
    """What `main` does once it is known what is asked for. held: the lock of the workdir, None where nothing is trained."""
    numbers = claim(workdir, sweep)
    if args.jobs:
        jobs = write_jobs(points, numbers, pathlib.Path(args.jobs))
        left = {
            numbers[p.name]: jobs[numbers[p.name]]
            for p in points
            if p.state not in ("done", "diverged")
        }
        flags = [f"--config.{field}={text}" for field, text in overrides.items()]
        again = shlex.join(
            [
                "icae",
                "sweep",
                "--config",
                args.config,
                "--sweep",
                args.sweep,
                "--workdir",
                args.workdir,
                *flags,
            ]
        )
        text = (
            _jobs_text(left, pathlib.Path(args.jobs), again)
            if left
            else f"every point is done; the table: {again}"
        )
        print(
            json.dumps({"jobs": [str(job) for job in jobs.values()], "left": sorted(left)})
            if args.json
            else text
        )
        return DONE

    code, codes = DONE, {}
    if not args.table:
        with Trainer(held.leave) as call:
            code, codes = train(points, call)
        if code in (PREEMPTED, BAD_INPUT):
            print(
                f"icae sweep: {'saved' if code == PREEMPTED else 'stopped'}; the same command continues",
                file=sys.stderr,
            )
            return code
    results = sweep_results.collect(sweep, varied([p.changes for p in points]), points, codes)
    text = sweep_results.write(workdir, results)
    print(json.dumps(results, ensure_ascii=False) if args.json else text)
    if code:
        failed = [name for name, c in codes.items() if c not in (DONE, DIVERGED)]
        print(
            f"icae sweep: {', '.join(failed)} failed; run the same command again", file=sys.stderr
        )
    return code
