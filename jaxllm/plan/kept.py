"""What a training step's forward pass keeps for its backward pass, read off the compiled text."""

from __future__ import annotations

from jaxllm.plan import hlo
from jaxllm.plan.hlo import Computation, Instruction, Module

__all__ = ["kept_bytes"]

_SAME = {
    *("copy", "copy-start", "copy-done", "bitcast", "reshape"),
    *("optimization-barrier", "opt-barrier"),
}
"""Instructions whose result is their operand, for where an array comes from."""
_GIVEN = {"parameter", "constant", "iota"}


def kept_bytes(module: Module) -> int:
    """Bytes of the arrays that a forward pass makes and a backward pass takes.

    jax names the former `jvp(...)` and the latter `transpose(jvp(...))`. Of a fusion of both the
    root's name counts, so this is exact only up to what XLA fuses across the two.
    """
    found: dict[tuple[str, int], int] = {}
    inside = {v.computation.name: v.computation for v in hlo.visits(module) if not v.fused}
    for computation in inside.values():
        for one in computation.instructions.values():
            if one.opcode in _SAME or one.opcode in ("tuple", "get-tuple-element"):
                continue
            if _side(module, one) != "backward":
                continue
            for maker, index in _makers(module, computation, one):
                if maker.opcode not in _GIVEN and _side(module, maker) == "forward":
                    array = maker.arrays[index if index < len(maker.arrays) else 0]
                    size = array.size_bytes if array.space == 0 else 0
                    found[f"{computation.name}/{maker.name}", index] = size
    return sum(found.values())


def _side(module: Module, one: Instruction) -> str | None:
    """`forward`, `backward`, or neither; a loop or fusion without a name is what all in it are.

    A loop that a kernel stands in bears the kernel's name; one over parts of a batch holds both.
    """
    if "jvp(" in one.op_name or one.opcode not in ("fusion", "while", "call"):
        return _named(one.op_name)
    called = one.attribute("calls") or one.attribute("body") or one.attribute("to_apply") or ""
    body = module.computations.get(called.lstrip("%"))
    sides = {_named(x.op_name) for x in body.instructions.values()} if body is not None else set()
    sides.discard(None)
    return sides.pop() if len(sides) == 1 else None


def _named(name: str) -> str | None:
    return "backward" if "transpose(jvp(" in name else "forward" if "jvp(" in name else None


def _makers(module: Module, inside: Computation, one: Instruction) -> list[tuple[Instruction, int]]:
    """(instruction, which of its results) of all that an instruction takes."""
    out = []
    for name in one.operands:
        operand = inside.instructions.get(name)
        while operand is not None and operand.opcode in _SAME and operand.operands:
            operand = inside.instructions.get(operand.operands[0])
        if operand is None:
            continue
        names = operand.operands if operand.opcode == "tuple" else (operand.name,)
        out += [x for n in names if (x := _maker(module, inside, n)) is not None]
    return out


def _maker(
    module: Module, inside: Computation, name: str, index: int | None = None
) -> tuple[Instruction, int] | None:
    """Where an array, or one of a tuple, comes from: through what only hands it on."""
    one = inside.instructions.get(name)
    if one is None:
        return None
    if one.opcode == "get-tuple-element":
        return _maker(module, inside, one.operands[0], int(one.attribute("index") or 0))
    if one.opcode == "tuple" and index is not None and index < len(one.operands):
        return _maker(module, inside, one.operands[index])
    if one.opcode in _SAME and one.operands:
        return _maker(module, inside, one.operands[0], index)
    if one.opcode == "while" and index is not None:
        body = module.computations.get((one.attribute("body") or "").lstrip("%"))
        root = None if body is None else body.root
        if body is not None and root is not None and index < len(root.operands):
            made = _maker(module, body, root.operands[index])
            if made is not None and made[0].opcode == "parameter" and made[1] == index:
                return _maker(module, inside, one.operands[0], index)
    return one, index or 0
