"""Reads compiled programs: `compiled.as_text()` of one device's part, with its loops counted.

XLA's own `cost_analysis` counts the body of a loop once; here it counts as often as it runs.
"""

import dataclasses
import math
import re
from collections.abc import Container, Iterator
from typing import NamedTuple

_TYPES_BY_BYTES = {
    0.5: ("s4", "u4"),
    1: ("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"),
    2: ("s16", "u16", "bf16", "f16"),
    4: ("s32", "u32", "f32"),
    8: ("s64", "u64", "f64", "c64"),
    16: ("c128",),
}
ELEMENT_BYTES = {name: size for size, names in _TYPES_BY_BYTES.items() for name in names}
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# Move nothing: names for parts of other results, and control flow, whose computations are counted
# on their own.
FREE = frozenset(
    [
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "while",
        "call",
        "conditional",
        "after-all",
        "partition-id",
        "replica-id",
        "iota",
        "opt-barrier",
        "add-dependency",
    ]
)
# Custom calls of TPU programs that are only names.
FREE_CALLS = ("AllocateBuffer", "ConcatBitcast", "AsyncCollectiveStart", "AsyncCollectiveDone")
SLICES = ("dynamic-slice", "slice", "gather")
_RENAMES = ("bitcast", "copy", "convert")  # within a fusion: the same bytes under another name
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")


class Shape(NamedTuple):
    """An array's type. elsewhere: not in main memory, as some arrays of TPU programs."""

    element: str
    dimensions: tuple[int, ...]
    elsewhere: bool

    @property
    def bytes(self) -> int | float:
        """Its size, wherever it lies."""
        return ELEMENT_BYTES.get(self.element, 0) * math.prod(self.dimensions)

    @property
    def main_bytes(self) -> int | float:
        """Its size in main memory."""
        return 0 if self.elsewhere else self.bytes

    def __str__(self):
        return f"{self.element}[{','.join(map(str, self.dimensions))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program.

    shapes: of its result, several for a tuple. operands: names of other instructions. inside: the
    text between its parentheses, such as a constant's value.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    inside: str
    attributes: str
    root: bool

    @property
    def bytes(self) -> int | float:
        """Bytes of the result in main memory."""
        return sum(shape.main_bytes for shape in self.shapes)

    def called(self, attribute: str) -> str | None:
        """The computation that an attribute names."""
        match = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return match and match[1]


Body = dict[str, Instruction]  # a computation, by instruction names


def _closing(text: str, start: int) -> int:
    """Index behind the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i + 1
    raise ValueError(f"not a line of an HLO program: {text[:200]}")


def _parse_instruction(line: str) -> Instruction:
    head, _, rest = line.strip().partition(" = ")
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    shapes = tuple(
        Shape(element, tuple(int(n) for n in dims.split(",") if n), "S(" in (layout or ""))
        for element, dims, layout in _SHAPE.findall(rest[:end])
    )
    opcode = rest[end:].strip().partition("(")[0]
    start = rest.index("(", end)
    stop = _closing(rest, start)
    inside = rest[start + 1 : stop - 1]
    return Instruction(
        name=head.removeprefix("ROOT ").lstrip("%"),
        opcode=opcode,
        shapes=shapes,
        operands=tuple(re.findall(r"%([\w.\-]+)", inside)),
        inside=inside,
        attributes=rest[stop:],
        root=head.startswith("ROOT "),
    )


class Collective(NamedTuple):
    """One collective operation.

    bytes: of its whole result on one device; of reduce-scatter, of its operand, which is larger.
    times: how often it runs. shape: of the same arrays.
    """

    kind: str
    bytes: int | float
    times: int
    shape: str


def _collective(kind: str, instruction: Instruction, times: int, body: Body) -> Collective:
    shapes, count = instruction.shapes, len(instruction.operands)
    if kind == "reduce-scatter":
        shapes = [shape for name in instruction.operands for shape in body[name].shapes]
    elif instruction.opcode.endswith("-start") and kind != "all-reduce":
        shapes = shapes[count : 2 * count]  # the operands come before the results
    size = sum(shape.bytes for shape in shapes)
    return Collective(kind, size, times, ", ".join(map(str, shapes)))


class Program:
    """A compiled module: its computations, and how often each runs."""

    def __init__(self, text: str):
        self.computations: dict[str, Body] = {}
        self.entry: str | None = None
        body = None
        for line in text.splitlines():
            if not line.startswith(" "):
                opened = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{\s*$", line)
                body = None
                if opened and not line.startswith("HloModule"):
                    body = self.computations.setdefault(opened[2], {})
                    self.entry = opened[2] if opened[1] else self.entry
            elif body is not None and " = " in line:
                instruction = _parse_instruction(line)
                body[instruction.name] = instruction
        if self.entry is None:
            raise ValueError(
                "the program has no entry computation; give the text of a compiled module"
            )
        self.times: dict[str, int] = {}
        self._run(self.entry, 1)

    def _run(self, name: str, times: int) -> None:
        """Counts a computation and those that it calls."""
        self.times[name] = self.times.get(name, 0) + times
        for instruction in self.computations[name].values():
            if instruction.opcode == "while":
                turns = self.turns(instruction)
                self._run(instruction.called("body"), times * turns)
            elif instruction.opcode in ("call", "async-start"):
                self._run(instruction.called("to_apply") or instruction.called("calls"), times)
            elif instruction.opcode == "conditional":
                attributes = instruction.attributes.partition("metadata=")[0]
                for branch in re.findall(r"%([\w.\-]+)", attributes):
                    if branch in self.computations:
                        self._run(branch, times)

    def turns(self, loop: Instruction) -> int:
        """How often a while loop runs: by its backend configuration, or the bound in its condition.

        1 if neither tells.
        """
        known = re.search(r'known_trip_count[^\d]*"?n"?[^\d]*(\d+)', loop.attributes)
        if known:
            return int(known[1])
        bounds, names = [1], [loop.called("condition")]
        while names:
            for instruction in self.computations.get(names.pop(), {}).values():
                is_constant = instruction.opcode == "constant" and instruction.inside.isdigit()
                if is_constant and instruction.shapes[0].element == "s32":
                    bounds.append(int(instruction.inside))
                elif instruction.opcode == "fusion":
                    names.append(instruction.called("calls"))
        return max(bounds)

    def _counted(self) -> Iterator[tuple[Instruction, int, Body]]:
        """(instruction, how often it runs, its computation), without those within fusions."""
        for name, times in self.times.items():
            body = self.computations[name]
            for instruction in body.values():
                yield instruction, times, body

    # ---------------------------------------------------------------------------------- collectives

    def collectives(self) -> list[Collective]:
        """Every collective; those of loops once, with their number of turns.

        A collective that overlaps with fusions appears within several of them; its channel tells
        that they are one.
        """
        by_channel: dict[str, Collective] = {}
        for outer, times, outer_body in self._counted():
            for instruction, body in self._with_fused(outer, outer_body):
                kind = instruction.opcode.removesuffix("-start")
                if kind in COLLECTIVES:
                    channel = re.search(r"channel_id=(\d+)", instruction.attributes)
                    key = channel[1] if channel else instruction.name
                    by_channel.setdefault(key, _collective(kind, instruction, times, body))
        return list(by_channel.values())

    def _with_fused(
        self, instruction: Instruction, body: Body
    ) -> Iterator[tuple[Instruction, Body]]:
        """An instruction and, of a fusion, all those within it."""
        yield instruction, body
        if instruction.opcode == "fusion":
            fused = self.computations[instruction.called("calls")]
            for inner in fused.values():
                yield from self._with_fused(inner, fused)

    # -------------------------------------------------------------------------------------- traffic

    def bytes_accessed(self) -> int | float:
        """Bytes read from and written to main memory, as if each instruction ran by itself.

        Operands and results count, slices only with what they take.
        """
        return sum(
            times * self._traffic(instruction, body) for instruction, times, body in self._counted()
        )

    def _traffic(self, instruction: Instruction, body: Body) -> int | float:
        opcode = instruction.opcode
        if opcode in FREE or opcode.endswith("-done") or opcode in ("async-start", "async-update"):
            return 0
        if opcode == "custom-call" and any(
            f'"{name}"' in instruction.attributes for name in FREE_CALLS
        ):
            return 0
        operands = [body[name] for name in instruction.operands if name in body]
        if opcode in SLICES:
            read = instruction.shapes[0]._replace(elsewhere=operands[0].shapes[0].elsewhere)
            return read.main_bytes + instruction.bytes
        if opcode == "slice-start":  # the result is (operand, slice, …), in two memory spaces
            whole, part = instruction.shapes[:2]
            return part._replace(elsewhere=whole.elsewhere).main_bytes + part.main_bytes
        if opcode.endswith("-start") and opcode != "all-reduce-start":
            return instruction.bytes  # the operand is part of the result
        if opcode in ("dynamic-update-slice", "scatter"):
            return 2 * sum(operand.bytes for operand in operands[1:])
        if opcode == "fusion":
            return self._fusion_traffic(instruction, operands)
        return instruction.bytes + sum(operand.bytes for operand in operands)

    def _fusion_traffic(self, fusion: Instruction, operands: list[Instruction]) -> int | float:
        inner = self.computations[fusion.called("calls")]
        parameters = {int(i.inside): i for i in inner.values() if i.opcode == "parameter"}
        # A collective that goes on beside a fusion passes through it: its buffers are aliased, and
        # counted where it starts.
        aliases = {}
        if any(i.opcode in COLLECTIVES for i in inner.values()):
            aliases = dict(re.findall(r"\{(\d*)\}: \((\d+),", fusion.attributes))
        results = [
            n for n in range(len(fusion.shapes)) if str(n) not in aliases and "" not in aliases
        ]
        result_bytes = sum(fusion.shapes[n].main_bytes for n in results)
        read = sum(
            min(operand.bytes, _bytes_read(parameters[n], inner))
            for n, operand in enumerate(operands)
            if n in parameters and str(n) not in aliases.values()
        )
        return min(result_bytes, _bytes_written(inner, results)) + read


def _users(instruction: Instruction, inner: Body) -> Iterator[tuple[Instruction, str]]:
    """(user, name it uses) of an instruction, looking through other names for the same bytes."""
    for user in inner.values():
        if instruction.name in user.operands:
            if user.opcode in _RENAMES and not user.root:
                yield from _users(user, inner)
            else:
                yield user, instruction.name


def _bytes_read(parameter: Instruction, inner: Body) -> int | float:
    """Bytes of a fusion's operand that are read; infinite for all of it."""
    total = 0
    for user, name in _users(parameter, inner):
        first = user.operands[0] == name
        if user.opcode in SLICES and first:
            total += user.bytes
        elif not (user.opcode in ("dynamic-update-slice", "scatter") and first):
            return math.inf
        # Otherwise it is updated in place, which reads nothing.
    return total


def _bytes_written(inner: Body, results: Container[int]) -> int | float:
    """Bytes written of a fusion's results of these numbers."""
    root = next(i for i in inner.values() if i.root)
    parts = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
    total = 0
    for n, part in enumerate(parts):
        if n not in results:
            continue
        source = part
        while source.opcode in _RENAMES and source.operands:
            source = inner[source.operands[0]]
        updates = source.opcode == "dynamic-update-slice"
        total += inner[source.operands[1]].bytes if updates else part.bytes
    return total
