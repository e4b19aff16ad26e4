# Types of jax's Mosaic GPU objects are not public.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false, reportArgumentType=false, reportOptionalMemberAccess=false, reportCallIssue=false
"""Weights of four bits under scales, and what a decoding step's kernel does with them in registers.

Rows of the instruction are 8 pieces x 8 outputs, as for plain weights; the codes are its register
operand. So a group's sums of a row are scaled by the scale of that row's output and piece.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, vector

from pallas_kernels.quantized_matmul.order import BLOCK, stored
from pallas_kernels.quantized_matmul.reference import reference
from pallas_kernels.quantized_matmul.widen import Word, constant, ptx
from pallas_kernels.warpgroups import ROW

__all__ = ["FOLD", "Packed", "Packing", "arrange", "rounds_of", "scales_of"]

FOLD = 8
KINDS = ("int4", "uint4")
GROUPS = (64, 128)
SCALES = ("bfloat16", "float32")
_CHUNK = 16  # bytes that are swapped with each other where eight rows lie side by side
_LINE = 64  # inputs of x that lie side by side in shared memory
_THREADS = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packing:
    """The static part of packed weights.

    Attributes:
      kind: of their codes, `int4` or `uint4`.
      group: inputs of a scale.
      scale: dtype of scales.
      arranged: codes are in the order of `quantized_matmul.order.stored`.
    """

    kind: str = "int4"
    group: int = 128
    scale: str = "bfloat16"
    arranged: bool = False

    @property
    def unfit(self) -> str | None:
        """Why the kernel does not take them, or None."""
        if self.kind not in KINDS:
            return f"it takes codes in {' and '.join(KINDS)}, not {self.kind}"
        if self.group not in GROUPS:
            return f"it takes groups of 64 and 128 inputs, not {self.group}"
        if self.scale not in SCALES:
            return f"it takes scales in {' and '.join(SCALES)}, not {self.scale}"
        return None


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["values", "scale"], meta_fields=["arranged"]
)
@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
    """A matrix of codes, W[o, k] = values[o, k] scale[o, k / group].

    Attributes:
      values: int4 or uint4 [*halves, O, K].
      scale: bfloat16 or float32 [*halves, O, K / group].
      arranged: inputs of `values` are in the order of `quantized_matmul.order.stored`.
    """

    values: Any
    scale: Any
    arranged: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def ndim(self) -> int:
        return self.values.ndim

    @property
    def packing(self) -> Packing:
        """Its static part."""
        return Packing(
            kind=str(self.values.dtype),
            group=self.shape[-1] // max(self.scale.shape[-1], 1),
            scale=str(self.scale.dtype),
            arranged=self.arranged,
        )

    @property
    def whole(self) -> bool:
        """Whether scales are of groups of equal size, for each output."""
        groups = self.scale.shape[-1] if self.scale.ndim == self.ndim else 0
        rows = self.scale.shape[:-1] == self.shape[:-1]
        return groups > 0 and rows and self.shape[-1] % groups == 0

    def times(self, x: jax.Array) -> jax.Array:
        """x [M, K] times its transpose, in plain jnp: float32 [M, rows of all halves]."""
        x = stored(x, str(self.values.dtype)) if self.arranged else x
        values, scale = (a.reshape(-1, a.shape[-1]) for a in (self.values, self.scale))
        return reference(x, values, scale, None)


def scales_of(ref, count: int, *, interpret: bool) -> list[jax.Array]:
    """float32 [64] scales of the rows piece x 8 + output, for each group of a step's piece.

    Args:
      ref: shared memory [8 outputs, 8 pieces x count].
      count: groups of a piece.
      interpret: on a CPU.
    """
    if interpret:
        scales = ref[...].astype(jnp.float32).reshape(8, FOLD, count)
        return [scales[:, :, g].T.reshape(-1) for g in range(count)]
    kind = plgpu.ShapeDtypeStruct((8 * FOLD,), jnp.float32, layout=ROW)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=(kind,) * count)
    def call(_, ref):
        layout, shape = mgpu.WGMMA_ROW_LAYOUT, (8 * FOLD,)
        wide, index = ir.F32Type.get(), ir.IndexType.get()
        number = functools.partial(arith.constant, index)
        found = [np.empty(layout.registers_shape(shape), dtype=object) for _ in range(count)]
        single = layout.registers_element_type(wide)
        places = np.ndindex(found[0].shape)
        for place, (row,) in zip(places, layout.thread_idxs(shape), strict=True):
            output = arith.remui(row, number(8))
            first = arith.muli(arith.divui(row, number(8)), number(count))
            for g in range(count):
                scale = memref.load(ref, [output, arith.addi(first, number(g))])
                if scale.type != wide:
                    scale = arith.extf(wide, scale)
                found[g][place] = vector.broadcast(single, scale)
        return tuple(
            mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)
            for registers in found
        )

    return list(call(ref))


def arrange(x, i: jax.Array, transforms: tuple) -> None:
    """Brings blocks of 32 inputs of x into the order in which codes stand in registers.

    A thread takes a block: 64 bytes, of which it pairs inputs that are four apart.

    Args:
      x: shared memory [rows, inputs] in bfloat16, in lines of 128 bytes that are swizzled.
      i: which 128 blocks.
      transforms: of x.
    """
    blocks, wide = x.shape[0] * x.shape[1] // BLOCK, x.shape[1]
    splat = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(transforms), splat))
    def call(_, x, i):
        word, byte = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(8)
        four = ir.VectorType.get((4,), word)
        thread = arith.remui(utils.thread_idx(), constant(_THREADS))
        block = arith.addi(arith.muli(i.registers.item(), constant(_THREADS)), thread)
        with utils.when(arith.cmpi(arith.CmpIPredicate.ult, block, constant(blocks))):
            base = utils.memref_ptr(x)
            places = [utils.getelementptr(base, [at], byte) for at in chunks_of(block, wide)]
            read = [llvm.load(four, place) for place in places]
            words = [[llvm.extractelement(chunk, constant(j)) for j in range(4)] for chunk in read]
            for place, found in zip(places, paired(words), strict=True):
                chunk = llvm.mlir_undef(four)
                for j, one in enumerate(found):
                    chunk = llvm.insertelement(chunk, one, constant(j))
                llvm.store(chunk, place)

    call(x, i)


def chunks_of(block: Word, wide: int) -> list[Word]:
    """Where in shared memory, in bytes, the four chunks of 16 bytes of a block of x begin.

    x [rows, wide] is cut into tiles of eight rows and 64 inputs; in a row of a tile the first of
    eight chunks stands where the row's number says, the second beside it, by exclusive or.
    """
    row, rest = _split(block, wide // BLOCK)
    line, half = _split(rest, _LINE // BLOCK)
    tile, row = _split(row, 8)
    place = arith.addi(arith.muli(tile, constant(wide // _LINE)), line)
    place = arith.addi(arith.muli(place, constant(8)), row)
    begin, first = arith.muli(place, constant(2 * _LINE)), arith.muli(half, constant(4))
    chunks = [arith.xori(arith.addi(first, constant(i)), row) for i in range(4)]
    return [arith.addi(begin, arith.muli(chunk, constant(_CHUNK))) for chunk in chunks]


def _split(value: Word, by: int) -> tuple[Word, Word]:
    return arith.divui(value, constant(by)), arith.remui(value, constant(by))


def paired(words: list[list[Word]]) -> list[list[Word]]:
    """Of four times four words of two inputs each: those of inputs that are four apart.

    A thread of the four that share a row has eight codes in a word, and widens the first and the
    fifth together, the second and the sixth, and so on.
    """
    found = []
    for pair in range(4):
        which = constant(0x7632 if pair % 2 else 0x5410)
        own = [(chunk[pair // 2], chunk[2 + pair // 2]) for chunk in words]
        found.append([ptx("prmt.b32 $0, $1, $2, $3;", *both, which) for both in own])
    return found


def rounds_of(shape: tuple[int, ...]) -> int:
    """How many times `arrange` is called for x of a shape."""
    return math.ceil(math.prod(shape) / BLOCK / _THREADS)
