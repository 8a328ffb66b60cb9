"""A run's metrics as JSON lines and TensorBoard events, in step order, surviving restarts."""

import contextlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from icae_jax import errors, files

WALL_CLOCK = ("seconds", "tokens_per_second", "mfu")  # all that may differ between equal runs


@contextlib.contextmanager
def _without(module: str) -> Iterator[None]:
    """Makes a module look absent: tensorboardX would spend seconds importing an unused PyTorch."""
    absent = module not in sys.modules
    if absent:
        sys.modules[module] = None
    try:
        yield
    finally:
        if absent:
            del sys.modules[module]


class MetricsFile:
    """`metrics.jsonl` of a workdir, continued after a step.

    Lines past that step, and a line cut short by a kill, are dropped. Every number of a line is
    also a TensorBoard scalar in `tensorboard/`, nested names joined by slashes ("train/ae",
    "eval/memory/ae"); TensorBoard itself drops what an earlier run wrote there past the step.
    Close it, or use it as a context manager.
    """

    def __init__(self, workdir: str | os.PathLike, resume_step: int):
        # Not SummaryWriter: once its thread dies of a full disk, it blocks the training loop.
        with _without("torch"):
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto import event_pb2, summary_pb2

        self.path = pathlib.Path(workdir) / "metrics.jsonl"
        if self.path.exists():
            lines = [line for line in read_lines(self.path) if line["step"] <= resume_step]
            with files.replacing_file(self.path) as tmp:
                tmp.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        folder = self.path.parent / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        # EventsWriter's name has whole seconds: a second file in the same second would replace it.
        self._events = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        # Also in a new run: TensorBoard takes only the second and later START for restarts.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write_event(step=resume_step + 1, session_log=start)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _write_event(self, **fields):
        self._events.write_event(self._event(wall_time=time.time(), **fields))
        self._events.flush()

    def write(self, line: dict[str, Any]) -> None:
        """Appends one line and flushes it to disk."""
        size = self.path.stat().st_size if self.path.exists() else 0

        def append():
            with open(self.path, "a", encoding="utf-8") as f:
                f.truncate(size)  # removes what a failed attempt wrote
                f.write(json.dumps(line) + "\n")
                f.flush()
                os.fsync(f.fileno())

        errors.retrying(append, f"writing {self.path}")
        values = [
            self._summary.Value(tag=tag, simple_value=number)
            for tag, number in _scalars(line)
            if tag != "step"
        ]
        self._write_event(step=line["step"], summary=self._summary(value=values))

    def has_evaluation(self, step: int) -> bool:
        """Whether the held-out losses of a step are in the file."""
        return any(line["step"] == step and "eval" in line for line in read_lines(self.path))

    def close(self) -> None:
        """Closes the TensorBoard file; lines are on disk already."""
        self._events.close()


def _scalars(line: dict, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yields (name, number) of every number in nested groups."""
    for name, value in line.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield prefix + name, value


def read_lines(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a metrics file up to the first broken one (left by a kill); [] if none."""
    path, lines = pathlib.Path(path), []
    if not path.exists():
        return lines
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not isinstance(line, dict) or not files.is_kind(line.get("step"), int):
            break
        lines.append(line)
    return lines


def means(sums: Mapping[str, Any], counts: Mapping[str, Any]) -> dict[str, float]:
    """Mean loss in nats by objective, of those that had labels, from summed losses and counts."""
    return {o: float(sums[o]) / float(counts[o]) for o in sums if float(counts[o]) > 0}
