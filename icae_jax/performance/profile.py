"""Where a step's time goes: a trace of device events, summed by the named parts of the program.

Events name instructions of the compiled program. Their metadata (`op_name`) says which
`jax.named_scope`s and modules they came from, and whether from the backward pass.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

import jax

from icae_jax.errors import UserError
from icae_jax.performance import hlo

# Named scopes; "arguments" is what the compiler first does to arguments, such as converting the
# whole base to float32 on CPUs.
PARTS = ("encoder", "memory_prefix", "decoder", "cross_entropy", "optimizer", "arguments", "other")
PASSES = ("forward", "recomputed", "backward")
# Pieces of a block; the first match counts: dropout's random bits are named inside a projection.
_PIECES = {
    "dropout": r"_threefry|random_bits",
    "attention": r"(^|[/(])attention[/)]",
    "projections": r"/[qkvo]_proj/",
    "mlp": r"/mlp/",
    "norms": r"/\w*norm/",
}
_CONTROL = ("while", "call", "conditional")  # their time is that of the instructions inside


class Row(NamedTuple):
    """One part of a step.

    part: of `PARTS`. piece: within a block, such as "mlp", else "". direction: of `PASSES`.
    seconds: of one step. share: of all seconds that have a name.
    """

    part: str
    piece: str
    direction: str
    seconds: float
    share: float


@dataclasses.dataclass(frozen=True)
class Profile:
    """The parts of one step, the longest first; their seconds add up to `busy_seconds`.

    Seconds are those of a device (the mean over several), all of its streams together; on CPUs, of
    all threads together. idle_seconds: of the same streams or threads, without an instruction:
    idle, or on CPUs helping another thread with a matmul.
    """

    rows: tuple[Row, ...]
    busy_seconds: float
    idle_seconds: float

    def text(self) -> str:
        """A table: parts and their pieces down, passes across, milliseconds of a step."""
        header = "".join(f"{name:>12}" for name in (*PASSES, "all", "share"))
        lines = [f"{'ms of a step':28}{header}"]
        for part in PARTS:
            rows = [row for row in self.rows if row.part == part]
            if rows:
                lines.append(_table_line(part, rows))
            pieces = {row.piece for row in rows if row.piece}
            by_piece = [[row for row in rows if row.piece == piece] for piece in pieces]
            by_piece.sort(key=lambda rows: -sum(row.seconds for row in rows))
            lines += [_table_line(f"  {rows[0].piece}", rows) for rows in by_piece]
        lines.append(_table_line("all that has a name", self.rows))
        lines.append(f"{'idle, or without a name':28}{'':36}{1000 * self.idle_seconds:12.2f}")
        return "\n".join(lines)


def _table_line(name, rows):
    seconds = [
        sum(row.seconds for row in rows if row.direction == direction) for direction in PASSES
    ]
    cells = [f"{1000 * s:12.2f}" if s else f"{'-':>12}" for s in seconds]
    share = 100 * sum(row.share for row in rows)
    return f"{name:28}{''.join(cells)}{1000 * sum(seconds):12.2f}{share:10.1f} %"


def newest_trace(folder: str | os.PathLike) -> jax.profiler.ProfileData:
    """The newest trace that `runtime.profiler.tracing` wrote into a folder.

    UserError if there is none.
    """
    traces = sorted(
        pathlib.Path(folder).glob("plugins/profile/*/*.xplane.pb"),
        key=lambda path: path.stat().st_mtime,
    )
    if not traces:
        raise UserError(
            f"{folder}: no trace (plugins/profile/*/*.xplane.pb) in it; "
            f"make one with icae bench train --profile {folder}"
        )
    return jax.profiler.ProfileData.from_file(str(traces[-1]))


# ---------------------------------------------------------------------------- naming instructions


def place(op_name: str) -> tuple[str, str, str]:
    """(part, piece, direction) of an instruction.

    op_name: such as "jit(step)/transpose(jvp(encoder))/…/mlp/…".
    """
    if re.match(r"\w+\[", op_name):  # an argument's own name, such as "frozen['embed']"
        return "arguments", "", "forward"
    part = next((p for p in PARTS if re.search(rf"(^|[/(]){p}([/)]|$)", op_name)), "other")
    piece = ""
    if part in ("encoder", "memory_prefix", "decoder"):
        matching = (name for name, pattern in _PIECES.items() if re.search(pattern, op_name))
        piece = next(matching, "rest")
    direction = "forward"
    if "rematted_computation" in op_name:
        direction = "recomputed"
    elif "transpose(" in op_name:
        direction = "backward"
    return part, piece, direction


def _op_names(program: hlo.Program) -> dict[str, str]:
    """`{instruction: op_name}` of a program.

    An instruction without one, such as a copy, takes that of what it contains, of an operand, or of
    the loop around it.
    """
    own, callers = {}, {}
    for body in program.computations.values():
        for instruction in body.values():
            if match := re.search(r'op_name="([^"]*)"', instruction.attributes):
                own[instruction.name] = match[1]
            for attribute in ("calls", "to_apply", "body", "condition"):
                callers.setdefault(instruction.called(attribute), instruction.name)
    names = {}
    for computation, body in program.computations.items():
        for instruction in body.values():
            inside = {}
            if instruction.opcode == "fusion":
                inside = program.computations.get(instruction.called("calls"), {})
            near = [
                instruction.name,
                *reversed(inside),
                *instruction.operands,
                callers.get(computation),
            ]
            names[instruction.name] = next((own[name] for name in near if name in own), "")
    return names


# ---------------------------------------------------------------------------------- summing events


class _Event(NamedTuple):
    """An instruction's run. Times in nanoseconds; op_name: as the trace has it, or ""."""

    start: float
    end: float
    instruction: str
    op_name: str


def _event_lines(plane, module: str) -> Iterator[list[_Event]]:
    """A plane's lines that hold a module's instructions, each ordered by start.

    TPUs and processed traces have a line "XLA Ops" for them. Elsewhere (GPU streams, CPU threads)
    an event's `hlo_op` names its instruction.
    """
    all_lines = list(plane.lines)
    op_lines = [line for line in all_lines if line.name == "XLA Ops"]
    for line in op_lines or all_lines:
        events = []
        for event in line.events:
            stats = dict(event.stats)
            name = stats.get("hlo_op")
            if op_lines and not name:
                name = event.name.partition(" = ")[0].lstrip("%")
            if name and stats.get("hlo_module", module) == module:
                end = event.start_ns + event.duration_ns
                events.append(_Event(event.start_ns, end, name, str(stats.get("tf_op", ""))))
        if events:
            yield sorted(events, key=lambda e: (e.start, -e.end))


def _self_times(events: list[_Event]) -> list[float]:
    """Nanoseconds of each event, without those of events within it."""
    own = [event.end - event.start for event in events]
    open_events: list[int] = []  # indices, the innermost last
    for number, event in enumerate(events):
        while open_events and events[open_events[-1]].end <= event.start:
            open_events.pop()
        if open_events:
            outer = open_events[-1]
            own[outer] -= min(event.end, events[outer].end) - event.start
        open_events.append(number)
    return own


def read_profile(trace: jax.profiler.ProfileData, compiled_text: str, steps: int) -> Profile:
    """Sums up a trace of so many steps.

    compiled_text: `compiled.as_text()` of the program that ran. UserError if the trace holds none
    of its instructions.
    """
    program = hlo.Program(compiled_text)
    names = _op_names(program)
    control = {
        instruction.name
        for body in program.computations.values()
        for instruction in body.values()
        if instruction.opcode in _CONTROL
    }
    module = re.match(r"HloModule ([\w.\-]+)", compiled_text)[1]
    planes = [(plane.name, list(_event_lines(plane, module))) for plane in trace.planes]
    planes = [(name, lines) for name, lines in planes if lines]
    devices = [lines for name, lines in planes if name.startswith("/device:")]
    devices = devices or [lines for _, lines in planes]
    nanoseconds, busy, idle = {}, 0.0, 0.0
    for lines in devices:
        window = max(e.end for events in lines for e in events)
        window -= min(events[0].start for events in lines)
        spent = []
        for events in lines:
            spent.append(0.0)
            for event, own in zip(events, _self_times(events), strict=True):
                if event.instruction not in control:
                    where = place(names.get(event.instruction) or event.op_name)
                    nanoseconds[where] = nanoseconds.get(where, 0.0) + own
                    spent[-1] += own
        # Leaves out the thread that only starts the others.
        working = [s for s in spent if s >= 0.01 * max(spent)]
        busy += sum(spent)
        idle += max(0.0, window * len(working) - sum(working))
    if not busy:
        raise UserError(
            "the trace holds no instruction of the program; trace steps that run while it is taken"
        )
    scale = 1e-9 / (steps * len(devices))
    rows = [
        Row(*where, own * scale, own / busy)
        for where, own in sorted(nanoseconds.items(), key=lambda item: -item[1])
    ]
    return Profile(tuple(rows), busy * scale, idle * scale)
