"""Bytes that an instruction moves between a device's main memory and its units.

Operands are read once and results written once; slices count as slices, and an update in place as
what it writes, inside of fusions too. What lies in another memory space (a TPU's VMEM) is free.
"""

from __future__ import annotations

import math

from jaxllm.plan.hlo import Array, Computation, Instruction, Module, Visit

__all__ = ["NO_TRAFFIC", "moved_bytes"]

NO_TRAFFIC = frozenset(
    (
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
    )
)
"""Opcodes that name or order things."""

_SLICES = ("dynamic-slice", "slice", "gather")
_SMALL = 1 << 16
"""Bytes below which nobody asks whether only a slice is read."""


def _main(arrays: tuple[Array, ...]) -> int:
    return sum(array.size_bytes for array in arrays if array.space == 0)


def _body(module: Module, one: Instruction) -> Computation | None:
    """The computation of a fusion."""
    if one.opcode != "fusion":
        return None
    return module.computations.get((one.attribute("calls") or "").lstrip("%"))


def _taken(module: Module, one: Instruction, place: int) -> float:
    """Bytes that an instruction takes out of an operand; infinite where it reads it whole."""
    if one.opcode in _SLICES:
        return float(one.size_bytes) if place == 0 else math.inf
    if one.opcode == "dynamic-update-slice" and place == 0:
        return 0.0  # what stands there is written over in place
    body = _body(module, one)
    if body is None:
        return math.inf
    total = 0.0
    queue = [
        x.name
        for x in body.instructions.values()
        if x.opcode == "parameter" and x.literal.strip() == str(place)
    ]
    while queue:
        name = queue.pop()
        for user in body.instructions.values():
            if name not in user.operands:
                continue
            if user.opcode == "bitcast":
                queue.append(user.name)
            if user.opcode in ("bitcast", "tuple"):
                continue
            places = [i for i, operand in enumerate(user.operands) if operand == name]
            total += sum(_taken(module, user, i) for i in places)
    return total


def _read(module: Module, one: Instruction, inside: Computation) -> int:
    total = 0.0
    for place, name in enumerate(one.operands):
        source = inside.instructions.get(name)
        whole = 0 if source is None else _main(source.arrays)
        total += whole if whole <= _SMALL else min(whole, _taken(module, one, place))
    return int(total)


def _written(module: Module, one: Instruction, inside: Computation) -> int:
    """Bytes written: those of results, or of what is put into an array that stays in place."""
    if one.opcode == "bitcast" and one.operands and one.operands[0] in inside.instructions:
        return _written(module, inside.instructions[one.operands[0]], inside)
    if one.opcode == "dynamic-update-slice":
        update = inside.instructions.get(one.operands[1])
        return 0 if update is None else update.size_bytes
    body = _body(module, one)
    if body is None:
        return _main(one.arrays)
    if body.root.opcode != "tuple":
        return min(_main(one.arrays), _written(module, body.root, body))
    parts = [body.instructions.get(name) for name in body.root.operands]
    if len(parts) != len(one.arrays):
        return _main(one.arrays)
    return sum(
        0 if array.space else min(array.size_bytes, _written(module, part, body))
        for part, array in zip(parts, one.arrays, strict=True)
        if part is not None
    )


def moved_bytes(module: Module, visit: Visit) -> int:
    """Bytes that one run of an instruction reads from and writes to main memory.

    Args:
      module: the program.
      visit: an instruction that is not inside of a fusion.
    """
    one = visit.instruction
    if one.opcode in NO_TRAFFIC or one.opcode.endswith("-done"):
        return 0
    if "AllocateBuffer" in one.attributes:
        return 0
    if one.opcode in ("copy-start", "slice-start"):  # the tuple holds what goes in as well
        sides = one.arrays[:2]
        return min(array.size_bytes for array in sides) * sum(a.space == 0 for a in sides)
    written = _written(module, one, visit.computation)
    if one.opcode == "dynamic-update-slice":
        return 2 * written
    return _read(module, one, visit.computation) + written
