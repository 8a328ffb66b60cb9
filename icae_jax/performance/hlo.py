"""Reading compiled programs: what `compiled.as_text()` prints of one device's part, with how often each loop turns.

XLA's own `cost_analysis` counts the body of a loop once; here it counts as often as it runs.
"""

import dataclasses
import math
import re
import typing

ELEMENT_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4,
    "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16, "f8e4m3fn": 1, "f8e5m2": 1,
}  # fmt: skip
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# What moves nothing: names for parts of other results, and control flow, whose computations are counted on their own.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "after-all", "partition-id",
    "replica-id", "iota", "opt-barrier", "add-dependency",
}  # fmt: skip
SLICES = ("dynamic-slice", "slice", "gather")
FREE_CALLS = (
    "AllocateBuffer",
    "ConcatBitcast",
    "AsyncCollectiveStart",
    "AsyncCollectiveDone",
)  # of TPU programs: names alone
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program. shapes: `[(element type, dimensions, whether elsewhere than in main memory)]` of its result, several
    for a tuple.

    operands: names of other instructions. inside: what stands between its parentheses, a constant's value for one.
    """

    name: str
    opcode: str
    shapes: tuple
    operands: tuple
    inside: str
    attributes: str
    root: bool

    @property
    def bytes(self):
        """Of the result, where it lies in main memory (TPU programs keep some in other spaces, as 1 on the chip)."""
        return sum(map(_main_bytes, self.shapes))

    def called(self, attribute):
        """The computation that an attribute names, or None."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return found and found[1]


def _bytes(shape):
    return ELEMENT_BYTES.get(shape[0], 0) * math.prod(shape[1])


def _main_bytes(shape):
    return 0 if shape[2] else _bytes(shape)


def _closing(text, start):
    """Index behind the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i + 1
    raise ValueError(f"not a line of an HLO program: {text[:200]}")


def _instruction(line):
    head, _, rest = line.strip().partition(" = ")
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    shapes = tuple(
        (kind, tuple(int(n) for n in dims.split(",") if n), "S(" in (layout or ""))
        for kind, dims, layout in _SHAPE.findall(rest[:end])
    )
    opcode, _, _ = rest[end:].strip().partition("(")
    start = rest.index("(", end)
    stop = _closing(rest, start)
    inside = rest[start + 1 : stop - 1]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    name = head.removeprefix("ROOT ").lstrip("%")
    return Instruction(
        name, opcode, shapes, operands, inside, rest[stop:], head.startswith("ROOT ")
    )


class Collective(typing.NamedTuple):
    """One collective operation. bytes: of its whole result on one device, of reduce-scatter of its operand: of the larger one. shape: the
    same. times: how often it runs.
    """

    kind: str
    bytes: float
    times: int
    shape: str


def _collective(kind, instruction, times, body):
    shapes, count = instruction.shapes, len(instruction.operands)
    if kind == "reduce-scatter":
        shapes = [shape for name in instruction.operands for shape in body[name].shapes]
    elif instruction.opcode.endswith("-start") and kind != "all-reduce":
        shapes = shapes[count : 2 * count]  # the operands stand in front of the results
    text = ", ".join(f"{element}[{','.join(map(str, dims))}]" for element, dims, _ in shapes)
    return Collective(kind, sum(map(_bytes, shapes)), times, text)


class Program:
    """A compiled module: its computations, and how often each runs."""

    def __init__(self, text):
        self.computations, self.entry, body = {}, None, None
        for line in text.splitlines():
            if not line.startswith(" "):
                opened = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{\s*$", line)
                body = None
                if opened and not line.startswith("HloModule"):
                    body = self.computations.setdefault(opened[2], {})
                    self.entry = opened[2] if opened[1] else self.entry
            elif body is not None and " = " in line:
                instruction = _instruction(line)
                body[instruction.name] = instruction
        if self.entry is None:
            raise ValueError(
                "the program has no entry computation; give the text of a compiled module"
            )
        self.times = {}
        self._run(self.entry, 1)

    def _run(self, name, times):
        self.times[name] = self.times.get(name, 0) + times
        for instruction in self.computations[name].values():
            if instruction.opcode == "while":
                turns = self.turns(instruction)
                self._run(instruction.called("body"), times * turns)
            elif instruction.opcode in ("call", "async-start"):
                called = instruction.called("to_apply") or instruction.called("calls")
                self._run(called, times)
            elif instruction.opcode == "conditional":
                for called in re.findall(
                    r"%([\w.\-]+)", instruction.attributes.partition("metadata=")[0]
                ):
                    if called in self.computations:
                        self._run(called, times)

    def turns(self, loop):
        """How often a while loop turns: as its backend configuration says, or the bound in its condition; 1 where neither does."""
        known = re.search(r'known_trip_count[^\d]*"?n"?[^\d]*(\d+)', loop.attributes)
        if known:
            return int(known[1])
        bounds, names = [1], [loop.called("condition")]
        while names:
            for instruction in self.computations.get(names.pop(), {}).values():
                if (
                    instruction.opcode == "constant"
                    and instruction.shapes[0][0] == "s32"
                    and instruction.inside.isdigit()
                ):
                    bounds.append(int(instruction.inside))
                elif instruction.opcode == "fusion":
                    names.append(instruction.called("calls"))
        return max(bounds)

    def _counted(self):
        """Every instruction that runs by itself, not within a fusion, with how often it does and its computation."""
        for name, times in self.times.items():
            for instruction in self.computations[name].values():
                yield instruction, times, self.computations[name]

    def collectives(self):
        """Every `Collective`, those of loops once with their number of turns.

        Fusions that overlap one with other work hold it too, several of them the same one, which its channel tells.
        """
        found = {}
        for instruction, times, body in self._counted():
            for one, beside in self._with_fused(instruction, body):
                kind = one.opcode.removesuffix("-start")
                if kind in COLLECTIVES:
                    channel = re.search(r"channel_id=(\d+)", one.attributes)
                    found.setdefault(
                        channel[1] if channel else one.name, _collective(kind, one, times, beside)
                    )
        return list(found.values())

    def _with_fused(self, instruction, body):
        yield instruction, body
        if instruction.opcode == "fusion":
            fused = self.computations[instruction.called("calls")]
            for inner in fused.values():
                yield from self._with_fused(inner, fused)

    def bytes_accessed(self):
        """Bytes read from and written to main memory, each instruction by itself: operands and results, of slices only what is taken."""
        return sum(
            times * self._traffic(instruction, body) for instruction, times, body in self._counted()
        )

    def _traffic(self, instruction, body):
        opcode = instruction.opcode
        if opcode in FREE or opcode.endswith("-done") or opcode in ("async-start", "async-update"):
            return 0
        if opcode == "custom-call" and any(
            f'"{name}"' in instruction.attributes for name in FREE_CALLS
        ):
            return 0
        operands = [body[name] for name in instruction.operands if name in body]
        if opcode in SLICES:
            return (
                _main_bytes((*instruction.shapes[0][:2], operands[0].shapes[0][2]))
                + instruction.bytes
            )
        if opcode == "slice-start":  # the result is (operand, slice, …), in two memory spaces
            whole, part = instruction.shapes[:2]
            return _main_bytes((*part[:2], whole[2])) + _main_bytes(part)
        if (
            opcode.endswith("-start") and opcode != "all-reduce-start"
        ):  # the operand is part of the result
            return instruction.bytes
        if opcode in ("dynamic-update-slice", "scatter"):
            return 2 * sum(operand.bytes for operand in operands[1:])
        if opcode != "fusion":
            return instruction.bytes + sum(operand.bytes for operand in operands)
        inner = self.computations[instruction.called("calls")]
        parameters = {int(i.inside): i for i in inner.values() if i.opcode == "parameter"}
        # A collective that goes on beside a fusion passes through it: its buffers are aliased, and counted where it starts.
        passing = {}
        if any(i.opcode in COLLECTIVES for i in inner.values()):
            passing = dict(re.findall(r"\{(\d*)\}: \((\d+),", instruction.attributes))
        own = [
            (n, operand)
            for n, operand in enumerate(operands)
            if n in parameters and str(n) not in passing.values()
        ]
        results = [
            n for n in range(len(instruction.shapes)) if str(n) not in passing and "" not in passing
        ]
        written = min(
            sum(_main_bytes(instruction.shapes[n]) for n in results), self._written(inner, results)
        )
        return written + sum(
            min(operand.bytes, self._read(parameters[n], inner)) for n, operand in own
        )

    def _through(self, instruction, inner):
        """The instructions that use one, names for the same bytes looked through."""
        for user in inner.values():
            if instruction.name in user.operands:
                if user.opcode in ("bitcast", "copy", "convert") and not user.root:
                    yield from self._through(user, inner)
                else:
                    yield user, instruction.name

    def _read(self, parameter, inner):
        """Bytes of a fusion's operand that are read."""
        total = 0
        for user, name in self._through(parameter, inner):
            if user.opcode in SLICES and user.operands[0] == name:
                total += user.bytes
            elif not (
                user.opcode in ("dynamic-update-slice", "scatter") and user.operands[0] == name
            ):  # updated in place
                return math.inf
        return total

    def _written(self, inner, results):
        """Bytes that are written of a fusion's results of these numbers."""
        root = next(i for i in inner.values() if i.root)
        parts = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
        written = []
        for part in parts:
            source = part
            while source.opcode in ("bitcast", "copy", "convert") and source.operands:
                source = inner[source.operands[0]]
            written.append(
                inner[source.operands[1]].bytes
                if source.opcode == "dynamic-update-slice"
                else part.bytes
            )
        return sum(size for n, size in enumerate(written) if n in results)
