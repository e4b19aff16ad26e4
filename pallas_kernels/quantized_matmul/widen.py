# Types of jax's Mosaic GPU objects are not public.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportArgumentType=false, reportOptionalMemberAccess=false, reportReturnType=false
"""Codes of four and eight bits as bfloat16 in registers, a pair an instruction.

A thread reads eight codes of a row that lie together and makes four pairs of them, in the order of
`order.py`: none moves between threads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, vector

from pallas_kernels.warpgroups import ROW

__all__ = [
    "KINDS",
    "Word",
    "constant",
    "of_scale",
    "of_shared",
    "pairs_of",
    "ptx",
    "scaled",
    "widen",
]


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


def ptx(text: str, *words: Word, fixed: bool = False) -> Word:
    """What an instruction of PTX gives in $0, of words in $1 and so on.

    fixed: it stays where it stands among others that are.
    """
    kind, names = ir.IntegerType.get_signless(32), ",".join(["=r", *"r" * len(words)])
    return llvm.inline_asm(kind, list(words), text, names, has_side_effects=fixed)


def _twice(number: Word, fine: bool) -> list[Word]:
    """A float32 (a vector of one) rounded to bfloat16, in both halves of a word; and the rest."""
    number = mgpu.utils.bitcast(number, ir.IntegerType.get_signless(32))
    found = [ptx("{.reg .f32 t; mov.b32 t, $1; cvt.rn.bf16x2.f32 $0, t, t;}", number)]
    if fine:
        text = "{.reg .f32 a, b, t; mov.b32 a, $1; shl.b32 $0, $2, 16; mov.b32 b, $0; "
        text += "sub.f32 t, a, b; cvt.rn.bf16x2.f32 $0, t, t;}"
        found.append(ptx(text, number, found[0]))
    return found


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


def pairs_of(table: tuple[float, ...]) -> np.ndarray:
    """int32 [256, 32]: two numbers in bfloat16 for each byte of two codes, a copy for each lane.

    A lane reads its own bank of shared memory then, whatever the codes are.
    """
    bits = np.asarray(table).astype(jnp.bfloat16).view(np.uint16).astype(np.uint32)
    byte = np.arange(256)
    pairs = bits[byte >> 4] << 16 | bits[byte & 15]
    return np.repeat(pairs.view(np.int32)[:, None], LANES, axis=1)


def _read(word: Word, first: Word, lane: Word, load: Callable[[Word], Word]) -> list[Word]:
    """As `_looked_up`, from the pairs of `pairs_of`, which begin at `first`; lane: 4 bytes each."""
    line = (4 * LANES).bit_length() - 1
    found = []
    for i in range(4):
        shifted = _shifted(word, 8 * i - line)
        place = ptx("lop3.b32 $0, $1, $2, $3, 0xea;", shifted, constant(0xFF << line), lane)
        found.append(load(arith.addi(place, first)))
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
    """A byte's last seven bits count from 128; without its first bit, which counts -128, from 128,
    with it from 256."""
    found = []
    for word in words:
        for i in range(2):
            shifted, one = _shifted(word, 8 * i), constant(_both(0x4300))
            text = "lop3.b32 $0, $1, $2, $3, 0xea;"
            rest = ptx(text, shifted, constant(_both(0x7F)), one)
            first = ptx(text, shifted, constant(_both(0x80)), one)
            found.append(ptx("sub.bf16x2 $0, $1, $2;", rest, first))
    return found


_FOUR: dict[str, Callable[[Word], list[Word]]] = {
    "int4": lambda word: _nibbles(word, 0x4308, 0x8),
    "uint4": lambda word: _nibbles(word, 0x4300, 0),
    "uint4_centred": lambda word: _nibbles(word, 0x4308, 0),  # and 8 less
    "e2m1": _e2m1,
}
_EIGHT = {"int8": _bytes, "e4m3": _e4m3}
KINDS = (*_FOUR, "table", *_EIGHT)
LANES = 32


def of_scale(column, *, interpret: bool) -> jax.Array:
    """float32 [64] of scales in the device's memory, a number a row of an accumulator."""
    found = plgpu.load(column, layout=None if interpret else ROW, optimized=False)
    if found.dtype == jnp.float8_e8m0fnu and not interpret:
        bits = lax.bitcast_convert_type(found, jnp.uint8).astype(jnp.int32)
        return lax.bitcast_convert_type(bits << 23, jnp.float32)
    return found.astype(jnp.float32)


def of_shared(scales, first: jax.Array, group: jax.Array) -> jax.Array:
    """float32 [64] of a column of scales [O, n] in shared memory, for outputs from `first` on."""
    kind, splat = plgpu.ShapeDtypeStruct((64,), jnp.float32, layout=ROW), plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), splat, splat), return_type=kind)
    def call(_, ref, first, group):
        layout, shape, index = mgpu.WGMMA_ROW_LAYOUT, (64,), ir.IndexType.get()
        first, group = (arith.index_cast(index, x.registers.item()) for x in (first, group))
        found = np.empty(layout.registers_shape(shape), dtype=object)
        single = layout.registers_element_type(ir.F32Type.get())
        for place, (row,) in zip(np.ndindex(found.shape), layout.thread_idxs(shape), strict=True):
            scale = memref.load(ref, [arith.addi(first, row), group])
            if scale.type != ir.F32Type.get():
                scale = arith.extf(ir.F32Type.get(), scale)
            found[place] = vector.broadcast(single, scale)
        return mgpu.FragmentedArray(_registers=found, _layout=layout, _is_signed=None)

    return call(scales, first, group)


def widen(w: jax.Array, kind: str, table: tuple[float, ...] = (), pairs: Any = None) -> jax.Array:
    """Codes [64, K] in the layout WGMMA_UPCAST_4X as bfloat16 for the tensor cores.

    Args:
      w: int4 or int8 registers.
      kind: one of `KINDS`; `table` looks up `table`, 16 numbers.
      table: in its order.
      pairs: shared memory with `pairs_of(table)`, which a table is read from; None: it is computed
        with, by twice as many instructions.
    """
    shape, given = w.shape, [] if pairs is None else [pairs]
    result = plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, layout=plgpu.Layout.WGMMA)
    kinds = (plgpu.Layout.WGMMA_UPCAST_4X, *[plgpu.RefType()] * len(given))

    @plgpu.inline_mgpu(arg_types=kinds, return_type=result)
    def call(_, codes, *held):
        layout = mgpu.WGMMA_LAYOUT
        load = functools.partial(ptx, "ld.shared.b32 $0, [$1];")
        own = _lane(*held) if held else None
        registers = np.empty(layout.registers_shape(shape), dtype=object)
        word, pair = ir.IntegerType.get_signless(32), ir.VectorType.get((2,), ir.BF16Type.get())
        for at, register in np.ndenumerate(codes.registers):
            if kind in _EIGHT:
                two = vector.bitcast(ir.VectorType.get((2,), word), register)
                parts = [
                    vector.extract(two, dynamic_position=[], static_position=[i]) for i in range(2)
                ]
                pairs = _EIGHT[kind](parts)
            elif own is not None:
                pairs = _read(mgpu.utils.bitcast(register, word), *own, load)
            elif kind == "table":
                pairs = _looked_up(mgpu.utils.bitcast(register, word), table)
            else:
                pairs = _FOUR[kind](mgpu.utils.bitcast(register, word))
            for i, one in enumerate(pairs):
                registers[(at[0], 4 * at[1] + i, *at[2:])] = mgpu.utils.bitcast(one, pair)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return call(w, *given)


def _lane(held: Any) -> tuple[Word, Word]:
    """Where in shared memory [n, LANES] begins, and how far from there this lane's numbers do."""
    kind = ir.IntegerType.get_signless(32)
    first = llvm.ptrtoint(kind, mgpu.utils.memref_ptr(held))
    lane = arith.andi(mgpu.utils.thread_idx(), constant(LANES - 1))
    return first, arith.shli(lane, constant(2))


def scaled(
    w: jax.Array,
    scales: Sequence[jax.Array],
    offsets: Sequence[jax.Array] = (),
    *,
    fine: bool = False,
) -> jax.Array:
    """bfloat16 [64, K] for the tensor cores times its rows' scales, and offsets added, in bfloat16.

    Nothing of it is done before products that were waited for in the program's order: a register
    that a product reads must not be written while any is on its way, or the assembler has them wait
    for each other. What can be done before is what `widen` does.

    Args:
      w: in the layout WGMMA.
      scales: float32 [64], each for an equal part of K; they are rounded to bfloat16.
      offsets: as many, rounded likewise, or none.
      fine: what that rounding took from a scale is a second one, so that only products are rounded
        (and offsets).
    """
    shape, square, count = w.shape, plgpu.Layout.WGMMA, len(scales)
    result = plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, layout=square)
    times, add = "mul.bf16x2 $0, $1, $2;", "fma.rn.bf16x2 $0, $1, $2, $3;"

    def words(column, fine):
        return {at[2]: _twice(one, fine) for at, one in np.ndenumerate(column.registers)}

    @plgpu.inline_mgpu(arg_types=(square, *[ROW] * (count + len(offsets))), return_type=result)
    def call(_, w, *columns):
        word, pair = ir.IntegerType.get_signless(32), ir.VectorType.get((2,), ir.BF16Type.get())
        factors = [words(scale, fine) for scale in columns[:count]]
        shifts = [words(offset, False) for offset in columns[count:]]
        registers = np.empty(w.registers.shape, dtype=object)
        for at, register in np.ndenumerate(w.registers):
            part = at[1] * 8 * count // shape[1]
            factor = factors[part][at[4]]
            rest = shifts[part][at[4]] if shifts else []
            one = mgpu.utils.bitcast(register, word)
            for number in reversed(factor):
                rest = [ptx(add if rest else times, one, number, *rest, fixed=True)]
            registers[at] = mgpu.utils.bitcast(rest[0], pair)
        return mgpu.FragmentedArray(_registers=registers, _layout=w.layout, _is_signed=None)

    return call(w, *scales, *offsets)
