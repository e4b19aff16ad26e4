"""XLA's program text (HLO) as data: computations, their instructions, and how often each runs.

Only what planning reads is kept. Source of the grammar: openxla.org/xla/operation_semantics and the
printer's output for CPU and TPU programs of jaxlib 0.11.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

__all__ = ["Array", "Computation", "Instruction", "Module", "Visit", "parse", "trips", "visits"]

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_NAME = re.compile(r"%([\w.\-]+)")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|branch_computations)=\{?%?([^}\s]+)")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Array:
    """Type of one array on one device.

    Attributes:
      dtype: as HLO writes it, `bf16`.
      dims: sizes.
      space: memory space; 0 is the device's main memory.
    """

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def size_bytes(self) -> int:
        """Without the padding of its layout."""
        bits = _BITS.get(self.dtype)
        if bits is None:
            digits = re.search(r"\d+", self.dtype)
            bits = int(digits.group()) if digits else 0
        return math.prod(self.dims) * bits // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: unique in the module.
      opcode: `dot`, `fusion`, `all-gather-start` …
      arrays: what it gives, tuples flattened.
      operands: names of instructions; of a constant or parameter, nothing.
      literal: what stands between the parentheses.
      attributes: the rest of the line.
      root: whether it is the computation's result.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    literal: str
    attributes: str
    root: bool

    @property
    def size_bytes(self) -> int:
        """Of all that it gives."""
        return sum(array.size_bytes for array in self.arrays)

    @property
    def op_name(self) -> str:
        """Where in the traced function it comes from."""
        found = _OP_NAME.search(self.attributes)
        return found.group(1) if found else ""

    def attribute(self, name: str) -> str | None:
        """The text of a simple attribute, or of one in braces, without the braces."""
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^,\s]+)", self.attributes)
        return found.group(1).strip("{}") if found else None

    def numbers(self, name: str) -> tuple[int, ...]:
        """The integers of an attribute such as `lhs_contracting_dims={1,2}`."""
        return tuple(int(x) for x in re.findall(r"\d+", self.attribute(name) or ""))


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in their order."""

    name: str
    instructions: dict[str, Instruction]

    @property
    def root(self) -> Instruction:
        """The result."""
        last = list(self.instructions.values())
        return next((one for one in last if one.root), last[-1])


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: computations by name, and the one that runs."""

    computations: dict[str, Computation]
    entry: str


@dataclasses.dataclass(frozen=True)
class Visit:
    """An instruction where it runs.

    Attributes:
      instruction: it.
      computation: in which it stands.
      times: how often it runs in one call of the program.
      owner: the computation that runs it; another than `computation` inside of a fusion.
    """

    instruction: Instruction
    computation: Computation
    times: int
    owner: str

    @property
    def fused(self) -> bool:
        """Whether its operands and results need no memory of their own."""
        return self.owner != self.computation.name


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        if text[i] == "(":
            depth += 1
        elif text[i] == ")":
            depth -= 1
            if depth == 0:
                return i
    return len(text) - 1


def _arrays(text: str) -> tuple[Array, ...]:
    out = []
    for dtype, dims, layout in _ARRAY.findall(text):
        space = _SPACE.search(layout)
        sizes = tuple(int(x.lstrip("<=")) for x in dims.split(",") if x)
        out.append(Array(dtype, sizes, int(space.group(1)) if space else 0))
    return tuple(out)


def _instruction(line: str) -> Instruction | None:
    left, equals, right = line.strip().partition(" = ")
    if not equals:
        return None
    root = left.startswith("ROOT ")
    end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
    kind, rest = right[:end], right[end:].lstrip()
    opening = rest.find("(")
    if opening < 0:
        return None
    closing = _closing(rest, opening)
    literal = rest[opening + 1 : closing]
    return Instruction(
        name=left.removeprefix("ROOT ").lstrip("%"),
        opcode=rest[:opening],
        arrays=_arrays(kind),
        operands=tuple(_NAME.findall(literal)),
        literal=literal,
        attributes=rest[closing + 1 :],
        root=root,
    )


def parse(text: str) -> Module:
    """Read a program's text, as `compiled.as_text()` gives it."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line.startswith("}"):
            current = None
        elif not line.startswith(" "):
            header = _HEADER.match(line)
            if header is not None:
                current = Computation(header.group(2), {})
                computations[current.name] = current
                entry = current.name if header.group(1) else entry
        elif current is not None:
            made = _instruction(line)
            if made is not None:
                current.instructions[made.name] = made
    return Module(computations, entry or next(reversed(computations), ""))


def _called(module: Module, one: Instruction) -> list[Computation]:
    names = [name for text in _CALLED.findall(one.attributes) for name in text.split(",")]
    names = [name.strip().lstrip("%") for name in names]
    return [module.computations[name] for name in names if name in module.computations]


def _constant(one: Instruction | None) -> int | None:
    if one is None or one.opcode != "constant":
        return None
    return int(one.literal) if re.fullmatch(r"-?\d+", one.literal) else None


def _counter(root: Instruction, inside: Computation) -> tuple[int, int] | None:
    """(index in the loop's tuple, bound) of a condition `counter < bound`."""
    if root.opcode != "compare" or "direction=LT" not in root.attributes:
        return None
    first, second = (inside.instructions.get(name) for name in root.operands)
    bound = _constant(second)
    if first is None or first.opcode != "get-tuple-element" or bound is None:
        return None
    return int(first.attribute("index") or 0), bound


def _element(tuple_: Instruction | None, index: int, inside: Computation) -> Instruction | None:
    if tuple_ is None or tuple_.opcode != "tuple" or index >= len(tuple_.operands):
        return None
    one = inside.instructions.get(tuple_.operands[index])
    while one is not None and one.opcode in ("copy", "bitcast") and one.operands:
        one = inside.instructions.get(one.operands[0])
    return one


def _step(body: Computation, index: int) -> int:
    one = _element(body.root, index, body)
    if one is None or one.opcode != "add":
        return 1
    found = [_constant(body.instructions.get(name)) for name in one.operands]
    return next((x for x in found if x), 1)


def trips(module: Module, loop: Instruction, inside: Computation) -> int | None:
    """How often a `while` turns, or None where its text does not say.

    XLA writes the number for CPUs and GPUs; for TPUs it is read off the counter.
    """
    known = _TRIPS.search(loop.attributes)
    if known is not None:
        return int(known.group(1))
    named = {
        name: module.computations.get((loop.attribute(name) or "").lstrip("%"))
        for name in ("condition", "body")
    }
    condition, body = named["condition"], named["body"]
    counter = None if condition is None else _counter(condition.root, condition)
    if counter is None or body is None:
        return None
    index, bound = counter
    start = _element(inside.instructions.get(loop.operands[0]), index, inside)
    return max(0, -(-(bound - (_constant(start) or 0)) // _step(body, index)))


def visits(module: Module) -> Iterator[Visit]:
    """Every instruction that runs, once for each place that runs it.

    A loop whose turns are unknown counts as one turn.
    """
    yield from _walk(module, module.computations[module.entry], 1, module.entry)


def _walk(module: Module, inside: Computation, times: int, owner: str) -> Iterator[Visit]:
    for one in inside.instructions.values():
        yield Visit(one, inside, times, owner)
        match one.opcode:
            case "while":
                turns = trips(module, one, inside) or 1
                body = module.computations.get((one.attribute("body") or "").lstrip("%"))
                if body is not None:
                    yield from _walk(module, body, times * turns, body.name)
            case "call" | "conditional":
                for called in _called(module, one):
                    yield from _walk(module, called, times, called.name)
            case "fusion" | "async-start":
                for called in _called(module, one):
                    yield from _walk(module, called, times, owner)
