"""Metrics of a run as one JSON object a line, in step order, surviving restarts."""

import json
import os
import pathlib

from icae_jax.interop import files

WALL_CLOCK = ("seconds", "tokens_per_second")  # the only fields that two equal runs may differ in


class MetricsFile:
    """`metrics.jsonl` of a workdir, continued from a step: lines past it, and a line cut short by a kill, are dropped."""

    def __init__(self, workdir, resume_step):
        self.path = pathlib.Path(workdir) / "metrics.jsonl"
        if self.path.exists():
            kept = [line for line in read(self.path) if line["step"] <= resume_step]
            with files.replacing_file(self.path) as tmp:
                tmp.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def write(self, line):
        """Appends one line and flushes it to disk."""
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps(line) + "\n")
            f.flush()
            os.fsync(f.fileno())


def read(path):
    """The complete lines of a metrics file."""
    lines = []
    for line in pathlib.Path(path).read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break  # a kill while writing leaves at most one broken line, the last
    return lines


def means(sums, counts):
    """`{objective: mean loss in nats}` of summed losses, for objectives that had labels."""
    return {o: float(sums[o]) / float(counts[o]) for o in sums if float(counts[o]) > 0}
