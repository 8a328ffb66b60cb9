"""Where a step's time goes: a trace of the device's own events, added up by the named parts of the program.

Events name instructions of the compiled program, whose metadata (`op_name`) says which `jax.named_scope`s and modules they came from, and
whether from the backward pass.
"""

import dataclasses
import pathlib
import re
import typing

import jax

from icae_jax.errors import UserError
from icae_jax.performance import hlo

# Named scopes; what the compiler does to arguments before all else, such as converting the whole base to float32 on CPUs; the rest.
PARTS = ("encoder", "memory_prefix", "decoder", "cross_entropy", "optimizer", "arguments", "other")
PASSES = ("forward", "recomputed", "backward")
# Within a block, the first that a name holds: dropout's random bits stand inside the projection that they are for.
_PIECES = {
    "dropout": r"_threefry|random_bits",
    "attention": r"(^|[/(])attention[/)]",
    "projections": r"/[qkvo]_proj/",
    "mlp": r"/mlp/",
    "norms": r"/\w*norm/",
}
_CONTROL = (
    "while",
    "call",
    "conditional",
)  # what they spend is spent by the instructions that they hold


class Row(typing.NamedTuple):
    """One part of a step. part: of `PARTS`. piece: within a block, such as "mlp"; "" elsewhere. direction: of `PASSES`. seconds: of one
    step. share: of all seconds that have a name.
    """

    part: str
    piece: str
    direction: str
    seconds: float
    share: float


@dataclasses.dataclass(frozen=True)
class Profile:
    """What a trace holds of one step. rows: `Row`s, the longest first; their seconds sum to `busy_seconds`.

    Seconds are those of a device, all of its streams together (the mean, of several); on CPUs of all threads together. idle_seconds: of
    the same streams or threads, without an instruction's name: idle, or on CPUs helping another thread with a matmul.
    """

    rows: tuple[Row, ...]
    busy_seconds: float
    idle_seconds: float

    def text(self):
        """A table: parts and their pieces down, passes across, milliseconds of a step."""
        lines = [
            f"{'ms of a step':28}" + "".join(f"{name:>12}" for name in (*PASSES, "all", "share"))
        ]
        groups = {}
        for row in self.rows:
            groups.setdefault((row.part, row.piece), {})[row.direction] = row

        def line(name, rows):
            seconds = [
                sum(row.seconds for row in rows if row.direction == direction)
                for direction in PASSES
            ]
            cells = [f"{1000 * s:12.2f}" if s else f"{'-':>12}" for s in seconds]
            return f"{name:28}{''.join(cells)}{1000 * sum(seconds):12.2f}{100 * sum(row.share for row in rows):10.1f} %"

        for part in PARTS:
            rows = [row for row in self.rows if row.part == part]
            if rows:
                lines.append(line(part, rows))
            pieces = {
                piece: list(of.values()) for (p, piece), of in groups.items() if p == part and piece
            }
            lines += [
                line(f"  {piece}", of)
                for piece, of in sorted(
                    pieces.items(), key=lambda x: -sum(row.seconds for row in x[1])
                )
            ]
        lines.append(line("all that has a name", self.rows))
        lines.append(f"{'idle, or without a name':28}{'':36}{1000 * self.idle_seconds:12.2f}")
        return "\n".join(lines)


# -------------------------------------------------------------------------------------------------------------- tracing


def newest(folder):
    """The `jax.profiler.ProfileData` that `runtime.profiler.tracing` wrote last into a folder. UserError where there is none."""
    found = sorted(
        pathlib.Path(folder).glob("plugins/profile/*/*.xplane.pb"),
        key=lambda path: path.stat().st_mtime,
    )
    if not found:
        raise UserError(
            f"{folder}: no trace (plugins/profile/*/*.xplane.pb) in it; make one with icae bench train --profile {folder}"
        )
    return jax.profiler.ProfileData.from_file(str(found[-1]))


# ------------------------------------------------------------------------------------------------------------ what it is


def place(op_name):
    """(part, piece, direction) of an instruction by its `op_name`, such as "jit(step)/transpose(jvp(encoder))/…/mlp/…"."""
    if re.match(r"\w+\[", op_name):  # an argument's own name, such as "frozen['embed']"
        return "arguments", "", "forward"
    part = next((p for p in PARTS if re.search(rf"(^|[/(]){p}([/)]|$)", op_name)), "other")
    piece = ""
    if part in ("encoder", "memory_prefix", "decoder"):
        piece = next(
            (name for name, pattern in _PIECES.items() if re.search(pattern, op_name)), "rest"
        )
    direction = (
        "recomputed"
        if "rematted_computation" in op_name
        else "backward"
        if "transpose(" in op_name
        else "forward"
    )
    return part, piece, direction


def _op_names(program):
    """`{instruction: op_name}` of a `hlo.Program`. One without, such as a copy, has that of what it holds, of an operand, or of the loop
    that it stands in.
    """
    names, callers = {}, {}
    own = {
        i.name: found[1]
        for body in program.computations.values()
        for i in body.values()
        if (found := re.search(r'op_name="([^"]*)"', i.attributes))
    }
    for body in program.computations.values():
        for i in body.values():
            for called in ("calls", "to_apply", "body", "condition"):
                callers.setdefault(i.called(called), i.name)
    for name, body in program.computations.items():
        for i in body.values():
            inside = program.computations.get(i.called("calls"), {}) if i.opcode == "fusion" else {}
            near = [i.name, *reversed(inside), *i.operands, callers.get(name)]
            names[i.name] = next((own[n] for n in near if n in own), "")
    return names


def _lines(plane, module):
    """The lines of a plane that hold a module's instructions, each `[(start, end, instruction, op_name or "")]`, nanoseconds, by start.

    TPUs and traces that were worked on have a line "XLA Ops" of them; else (GPU streams, CPU threads) an event's `hlo_op` says which.
    """
    every = list(plane.lines)
    ops = [line for line in every if line.name == "XLA Ops"]
    for line in ops or every:
        events = []
        for event in line.events:
            stats = dict(event.stats)
            name = stats.get("hlo_op") or (
                event.name.partition(" = ")[0].lstrip("%") if ops else None
            )
            if name and stats.get("hlo_module", module) == module:
                events.append(
                    (
                        event.start_ns,
                        event.start_ns + event.duration_ns,
                        name,
                        str(stats.get("tf_op", "")),
                    )
                )
        if events:
            yield sorted(events, key=lambda e: (e[0], -e[1]))


def _self_times(events):
    """(instruction, op_name, nanoseconds without those of events within it) of a line's events."""
    own, stack = [], []
    for start, end, name, op_name in events:
        while stack and stack[-1][0] <= start:
            stack.pop()
        if stack:
            own[stack[-1][1]][2] -= min(end, stack[-1][0]) - start
        stack.append((end, len(own)))
        own.append([name, op_name, end - start])
    return own


def read(trace, compiled_text, steps):
    """The `Profile` of a trace of so many steps.

    trace: `jax.profiler.ProfileData`. compiled_text: of the program that ran, `compiled.as_text()`. UserError where the trace holds none
    of its instructions.
    """
    program = hlo.Program(compiled_text)
    names, opcodes = (
        _op_names(program),
        {i.name: i.opcode for body in program.computations.values() for i in body.values()},
    )
    module = re.match(r"HloModule ([\w.\-]+)", compiled_text)[1]
    planes = [
        (plane.name, lines) for plane in trace.planes if (lines := list(_lines(plane, module)))
    ]
    devices = [lines for name, lines in planes if name.startswith("/device:")] or [
        lines for _, lines in planes
    ]
    seconds, busy, idle = {}, 0.0, 0.0
    for lines in devices:
        window = max(end for events in lines for _, end, *_ in events) - min(
            events[0][0] for events in lines
        )
        spent = []
        for events in lines:
            spent.append(0.0)
            for name, op_name, own in _self_times(events):
                if opcodes.get(name) not in _CONTROL:
                    where = place(names.get(name) or op_name)
                    seconds[where] = seconds.get(where, 0.0) + own
                    spent[-1] += own
        working = [
            s for s in spent if s >= 0.01 * max(spent)
        ]  # not the thread that only starts the others
        busy, idle = busy + sum(spent), idle + max(0.0, window * len(working) - sum(working))
    if not busy:
        raise UserError(
            "the trace holds no instruction of the program; trace steps that run while it is taken"
        )
    scale = 1e-9 / (steps * len(devices))
    rows = [
        Row(*where, own * scale, own / busy)
        for where, own in sorted(seconds.items(), key=lambda x: -x[1])
    ]
    return Profile(tuple(rows), busy * scale, idle * scale)
