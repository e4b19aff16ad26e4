# Types of jax's Mosaic GPU objects are not public.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportArgumentType=false, reportOptionalMemberAccess=false
"""Codes of four and eight bits as bfloat16 in registers, a pair an instruction.

A thread reads eight codes of a row that lie together and makes four pairs of them, in the order of
`order.py`: none moves between threads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

__all__ = ["KINDS", "Word", "constant", "ptx", "widen"]


Word = Any
"""A register of 32 bits: a value of MLIR's, or numpy's words where a test computes them."""


def constant(number: int) -> Word:
    """A word of this number."""
    return mgpu.c(number - (1 << 32) if number >> 31 else number, ir.IntegerType.get_signless(32))


def _shifted(word: Word, right: int) -> Word:
    if right == 0:
        return word
    if right < 0:
        return arith.shli(word, constant(-right))
    return arith.shrui(word, constant(right))


def ptx(text: str, *words: Word) -> Word:
    """What an instruction of PTX gives in $0, of words in $1 and so on."""
    kind = ir.IntegerType.get_signless(32)
    return llvm.inline_asm(kind, list(words), text, ",".join(["=r", *"r" * len(words)]))


def _both(number: int) -> int:
    return number << 16 | number


def _sub(word: Word, number: int) -> Word:
    return ptx("sub.bf16x2 $0, $1, $2;", word, constant(_both(number)))


def _times(word: Word, number: int) -> Word:
    return ptx("mul.bf16x2 $0, $1, $2;", word, constant(_both(number)))


def _nibbles(word: Word, magic: int, flip: int) -> list[Word]:
    """0x4300 is 128 in bfloat16, whose last four bits then count from it in ones."""
    found = []
    for i in range(4):
        # One instruction, where the assembler makes two of an `and` and an `xor`.
        masks = constant(_both(0xF)), constant(_both(0x4300 | flip))
        code = ptx("lop3.b32 $0, $1, $2, $3, 0x6a;", _shifted(word, 4 * i), *masks)
        found.append(_sub(code, magic))
    return found


def _e2m1(word: Word) -> list[Word]:
    """Sign, exponent and mantissa put in their places; then the exponent's bias is mended."""
    found = []
    for i in range(4):
        rest = arith.andi(_shifted(word, 4 * i - 6), constant(_both(0x01C0)))
        sign = arith.andi(_shifted(word, 4 * i - 12), constant(_both(0x8000)))
        found.append(_times(arith.ori(rest, sign), 0x7E80))  # 2^126
    return found


def _looked_up(word: Word, table: tuple[float, ...]) -> list[Word]:
    """By bytes: a permutation picks four of eight bytes, so four of them and a choice make 16."""
    bits = np.asarray(jnp.asarray(table, jnp.bfloat16)).view(np.uint16)

    def words(of: np.ndarray) -> list[Word]:
        return [constant(int(x)) for x in of.astype(np.uint8).view(np.uint32)]

    low, high = words(bits & 0xFF), words(bits >> 8)
    place = arith.andi(word, constant(0x77777777))
    upper = arith.shrui(arith.andi(word, constant(0x88888888)), constant(1))
    upper = arith.ori(upper, constant(0x32103210))
    permute = functools.partial(ptx, "prmt.b32 $0, $1, $2, $3;")
    found = []
    for half in range(2):
        at, choice = _shifted(place, 16 * half), _shifted(upper, 16 * half)

        def four(parts: list[Word], at=at, choice=choice) -> Word:
            below, above = permute(parts[0], parts[1], at), permute(parts[2], parts[3], at)
            return permute(below, above, choice)

        bottom, top = four(low), four(high)
        found += [permute(bottom, top, constant(x)) for x in (0x5140, 0x7362)]
    return found


def _e4m3(words: list[Word]) -> list[Word]:
    found = []
    for word in words:
        for i in range(2):
            rest = arith.andi(_shifted(word, 8 * i - 4), constant(_both(0x07F0)))
            sign = arith.andi(_shifted(word, 8 * i - 8), constant(_both(0x8000)))
            found.append(_times(arith.ori(rest, sign), 0x7B80))  # 2^120
    return found


def _bytes(words: list[Word]) -> list[Word]:
    """16 (128 + h) - 2304 + (128 + l) for a byte's halves, with its first bit turned."""
    found = []
    for word in words:
        for i in range(2):
            low = arith.andi(_shifted(word, 8 * i), constant(_both(0xF)))
            high = arith.andi(_shifted(word, 8 * i + 4), constant(_both(0xF)))
            low = arith.ori(low, constant(_both(0x4300)))
            high = arith.xori(high, constant(_both(0x4308)))
            text = "{.reg .b32 t; fma.rn.bf16x2 t, $1, $3, $4; add.bf16x2 $0, t, $2;}"
            sixteen, less = constant(_both(0x4180)), constant(_both(0xC510))
            found.append(ptx(text, high, low, sixteen, less))
    return found


_FOUR: dict[str, Callable[[Word], list[Word]]] = {
    "int4": lambda word: _nibbles(word, 0x4308, 0x8),
    "uint4": lambda word: _nibbles(word, 0x4300, 0),
    "e2m1": _e2m1,
}
_EIGHT = {"int8": _bytes, "e4m3": _e4m3}
KINDS = (*_FOUR, "table", *_EIGHT)


def widen(w: jax.Array, kind: str, table: tuple[float, ...] = ()) -> jax.Array:
    """Codes [64, K] in the layout WGMMA_UPCAST_4X as bfloat16 for the tensor cores.

    Args:
      w: int4 or int8 registers.
      kind: one of `KINDS`; `table` looks up `table`, 16 numbers.
      table: in its order.
    """
    shape = w.shape
    result = plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, layout=plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA_UPCAST_4X,), return_type=result)
    def call(_, codes):
        layout = mgpu.WGMMA_LAYOUT
        registers = np.empty(layout.registers_shape(shape), dtype=object)
        word, pair = ir.IntegerType.get_signless(32), ir.VectorType.get((2,), ir.BF16Type.get())
        for at, register in np.ndenumerate(codes.registers):
            if kind in _EIGHT:
                two = vector.bitcast(ir.VectorType.get((2,), word), register)
                parts = [
                    vector.extract(two, dynamic_position=[], static_position=[i]) for i in range(2)
                ]
                pairs = _EIGHT[kind](parts)
            elif kind == "table":
                pairs = _looked_up(mgpu.utils.bitcast(register, word), table)
            else:
                pairs = _FOUR[kind](mgpu.utils.bitcast(register, word))
            for i, one in enumerate(pairs):
                registers[(at[0], 4 * at[1] + i, *at[2:])] = mgpu.utils.bitcast(one, pair)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return call(w)
