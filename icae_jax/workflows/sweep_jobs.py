"""A sweep as jobs: one shell file per point, for a Slurm array or a TPU pod."""

import os
import pathlib
import shlex
from collections.abc import Iterable, Mapping, Sequence

from icae_jax import files
from icae_jax.workflows.sweep_points import DIVERGED_NOTE, Point

JOB = """#!/bin/sh
# {name}
# Paths may be relative to this folder. If it does not exist, as on a TPU worker, they are relative
# to the folder in which the launcher starts this.
[ ! -d {here} ] || cd {here}
[ ! -f {folder}/{note} ] || {{
  echo {name}: diverged already, to try again delete {folder}
  exit 0
}}
[ "$(cat {folder}/DONE 2>/dev/null)" -ge {steps} ] 2>/dev/null && {{
  echo {name}: done already
  exit 0
}}
exec icae {command}
"""


def write_jobs(
    points: Sequence[Point], numbers: Mapping[str, int], folder: pathlib.Path
) -> dict[int, pathlib.Path]:
    """Writes an executable file per point into a folder; returns `{number: path}`.

    A file keeps its point for ever, so that what Slurm starts again trains what it trained before.
    The files of points that are done or diverged say so, and end.
    """
    jobs = {numbers[point.name]: folder / f"point-{numbers[point.name]:03}.sh" for point in points}
    for stale in set(folder.glob("point-*.sh")) - set(jobs.values()):  # another sweep's
        stale.unlink()
    for point in points:
        path = jobs[numbers[point.name]]
        text = JOB.format(
            name=point.name,
            here=shlex.quote(os.getcwd()),
            folder=shlex.quote(str(point.folder)),
            note=DIVERGED_NOTE,
            steps=point.config.steps,
            command=shlex.join(point.command),
        )
        files.write_text(path, text)
        mode = path.stat().st_mode
        path.chmod(mode | (mode & 0o444) >> 2)  # whoever may read it may run it
    return dict(sorted(jobs.items()))


def array_ranges(numbers: Iterable[int]) -> str:
    """Numbers as `sbatch --array` takes them, such as 0-2,5."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(f"{first}-{last}" if first < last else str(first) for first, last in spans)


def how_to_run(jobs: Mapping[int, pathlib.Path], folder: pathlib.Path, table_command: str) -> str:
    """How to start the unfinished jobs, `{number: path}`, and then to sum up."""
    if not jobs:
        return f"every point is done; the table: {table_command}"
    quoted = shlex.quote(str(folder))
    first = next(iter(jobs.values())).name
    return "\n".join(
        (
            f"{folder}: {len(jobs)} jobs to run, each trains one point; run again, it continues",
            f'  one after another  for job in {quoted}/point-*.sh; do sh "$job"; done',
            f"  SLURM              sbatch --array={array_ranges(jobs)} launch/slurm.sbatch "
            f"--jobs {quoted}",
            f"  TPU pod            launch/tpu_pod.sh … -- sh {quoted}/{first}",
            f"and then the table   {table_command}",
        )
    )
