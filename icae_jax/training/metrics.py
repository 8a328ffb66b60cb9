"""Metrics of a run as one JSON object a line and as TensorBoard events, in step order, surviving restarts."""

import contextlib
import json
import os
import pathlib
import sys
import time

from icae_jax import errors, files

WALL_CLOCK = (
    "seconds",
    "tokens_per_second",
    "mfu",
)  # the only fields that two equal runs may differ in


@contextlib.contextmanager
def _without(module):
    """Imports within find no such module: tensorboardX would import PyTorch for what is not used here, which takes seconds."""
    absent = module not in sys.modules
    if absent:
        sys.modules[module] = None
    try:
        yield
    finally:
        if absent:
            del sys.modules[module]


class MetricsFile:
    """`metrics.jsonl` of a workdir, continued from a step: lines past it, and a line cut short by a kill, are dropped.

    Every number of a line is a TensorBoard scalar too, in `tensorboard/`, nested names joined by slashes ("train/ae",
    "eval/memory/ae"); what an earlier run wrote there past the step, TensorBoard drops when it reads this one's file. Close it, or use it
    as a context manager.
    """

    def __init__(self, workdir, resume_step):
        # Not its SummaryWriter, whose thread, once a full disk ends it, blocks the training loop.
        with _without("torch"):
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto import event_pb2, summary_pb2

        self.path = pathlib.Path(workdir) / "metrics.jsonl"
        if self.path.exists():
            kept = [line for line in read(self.path) if line["step"] <= resume_step]
            with files.replacing_file(self.path) as tmp:
                tmp.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        folder = self.path.parent / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        # The name that it makes has whole seconds: one more file in the same second would be written over the first.
        self._events = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        # Every file has one, that of a new run too: TensorBoard takes the first for the start and only later ones for restarts.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._events.write_event(
            self._event(wall_time=time.time(), step=resume_step + 1, session_log=start)
        )
        self._events.flush()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def write(self, line):
        """Appends one line and flushes it to disk."""
        size = self.path.stat().st_size if self.path.exists() else 0

        def append():
            with open(self.path, "a", encoding="utf-8") as f:
                f.truncate(size)  # of a try that failed halfway
                f.write(json.dumps(line) + "\n")
                f.flush()
                os.fsync(f.fileno())

        errors.retrying(append, f"writing {self.path}")
        values = [
            self._summary.Value(tag=tag, simple_value=number)
            for tag, number in _scalars(line)
            if tag != "step"
        ]
        self._events.write_event(
            self._event(
                wall_time=time.time(), step=line["step"], summary=self._summary(value=values)
            )
        )
        self._events.flush()

    def has_evaluation(self, step: int) -> bool:
        """Whether the held-out losses of a step are in the file."""
        return self.path.exists() and any(
            line["step"] == step and "eval" in line for line in read(self.path)
        )

    def close(self):
        self._events.close()


def _scalars(line, prefix=""):
    """(name, number) of every number in a line's nested groups."""
    for name, value in line.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield prefix + name, value


def read(path):
    """The complete lines of a metrics file, up to the first broken one: a kill while writing, or a power loss, leaves such at its end."""
    lines = []
    for text in pathlib.Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not isinstance(line, dict) or not files.is_kind(line.get("step"), int):
            break
        lines.append(line)
    return lines


def means(sums, counts):
    """`{objective: mean loss in nats}` of summed losses, for objectives that had labels."""
    return {o: float(sums[o]) / float(counts[o]) for o in sums if float(counts[o]) > 0}


def mfu(least_flops, seconds, chip, devices):
    """Model FLOPs utilisation (arXiv 2204.02311, appendix B): the share of the devices' peak that the mathematics' own FLOPs took.

    least_flops: of all the work done in `seconds`, on all `devices` together (`performance.flops`). chip: `performance.chips.Chip` of each, or
    None where it is not known; then None.
    """
    return None if chip is None else least_flops / (seconds * devices * chip.bf16_flops)
