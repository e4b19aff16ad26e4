"""The grouped products on a TPU (Pallas, Mosaic TPU backend).

Blocks of rows lie on a grid of their own, so that a block may hold rows of several groups: it is
visited once a group, in turn, and each visit writes the rows of its group. A table made before the
kernel says which group and block a visit is of.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_matmul.derivative import run
from pallas_kernels.grouped_matmul.tables import (
    GROUP,
    ROW,
    START,
    STOP,
    Map,
    group_bounds,
    row_tiles,
)
from pallas_kernels.target import target

__all__ = ["Blocks", "Tpu", "grouped", "obstacle", "unfit"]

LANES = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """Sizes of blocks; inputs and outputs divide the matrices' sides, a multiple of 128 each."""

    rows: int
    inputs: int
    outputs: int


def unfit(*, dtype: str, sides: tuple[int, int], platform: str) -> str | None:
    """Why these kernels cannot serve a kind of call, or None; see `unfit` of the package."""
    if platform != "tpu":
        return f"it needs a TPU, this is {platform}"
    if dtype != "bfloat16":
        return f"it takes bfloat16, not {dtype}"
    if any(side % LANES for side in sides):
        return f"it takes matrices whose sides are multiples of {LANES}, not {sides}"
    return None


def obstacle(lhs, rhs) -> str | None:
    """Why these kernels cannot serve a call, or None."""
    if 0 in (*lhs.shape, *rhs.shape):
        return "it takes no empty arrays"
    return unfit(dtype=str(lhs.dtype), sides=rhs.shape[1:], platform=target())


def _own(table, visit, block: int, shape: tuple[int, int]) -> jax.Array:
    """Which rows of a visit's block are its group's."""
    row = lax.broadcasted_iota(jnp.int32, shape, 0) + table[ROW, visit] // block * block
    return (row >= table[START, visit]) & (row < table[STOP, visit])


def _rows_body(table, lhs, rhs, out, total, *, blocks: Blocks, groups: int, transpose: bool):
    visit, step = pl.program_id(1), pl.program_id(2)
    group = table[GROUP, visit]

    @pl.when(step == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    @pl.when(group < groups)
    def _():
        contract = (((1,), (1 if transpose else 0,)), ((), ()))
        wide = {"preferred_element_type": jnp.float32}
        total[...] += lax.dot_general(lhs[...], rhs[...], contract, **wide)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        before = table[ROW, jnp.maximum(visit - 1, 0)]
        again = (visit > 0) & (before == table[ROW, visit])
        mine = _own(table, visit, blocks.rows, out.shape)
        values = jnp.where(mine, total[...], 0.0)

        @pl.when(again)  # the block's rows of the groups before are in it
        def _():
            kept = jnp.where(mine, 0.0, out[...].astype(jnp.float32))
            out[...] = (values + kept).astype(out.dtype)

        @pl.when(jnp.logical_not(again))
        def _():
            out[...] = values.astype(out.dtype)


def _product(
    lhs, rhs, tables: Map, *, transpose: bool, blocks: Blocks, interpret: bool
) -> jax.Array:
    """out[r] = lhs[r] rhs[group of r], or rhs transposed."""
    groups, outputs = rhs.shape[0], rhs.shape[1 if transpose else 2]
    last = groups - 1  # rows of no group bring some matrix, and do not use it

    def of_lhs(j, visit, k, table):
        return table[ROW, visit] // blocks.rows, k

    def of_rhs(j, visit, k, table):
        where = (j, k) if transpose else (k, j)
        return (jnp.minimum(table[GROUP, visit], last), *where)

    def of_out(j, visit, k, table):
        return table[ROW, visit] // blocks.rows, j

    side = (blocks.outputs, blocks.inputs) if transpose else (blocks.inputs, blocks.outputs)
    grid = (outputs // blocks.outputs, tables.count[0], lhs.shape[1] // blocks.inputs)
    body = functools.partial(_rows_body, blocks=blocks, groups=groups, transpose=transpose)
    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((lhs.shape[0], outputs), lhs.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[
                pl.BlockSpec((blocks.rows, blocks.inputs), of_lhs),
                pl.BlockSpec((None, *side), of_rhs),
            ],
            out_specs=pl.BlockSpec((blocks.rows, blocks.outputs), of_out),
            scratch_shapes=[pltpu.VMEM((blocks.rows, blocks.outputs), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary")
        ),
        name="grouped_matmul",
        interpret=interpret,
    )(tables.table, lhs, rhs)


def _groups_body(table, count, lhs, rhs, out, total, *, blocks: Blocks):
    visit = pl.program_id(2)
    group = table[GROUP, visit]
    before = table[GROUP, jnp.maximum(visit - 1, 0)]
    after = table[GROUP, jnp.minimum(visit + 1, count[0] - 1)]

    @pl.when((visit == 0) | (before != group))
    def _():
        total[...] = jnp.zeros_like(total)

    @pl.when(table[STOP, visit] > table[START, visit])
    def _():
        left, right = (
            jnp.where(_own(table, visit, blocks.rows, x.shape), x[...], jnp.zeros((), x.dtype))
            for x in (lhs, rhs)
        )
        contract = (((0,), (0,)), ((), ()))
        total[...] += lax.dot_general(left, right, contract, preferred_element_type=jnp.float32)

    @pl.when((visit == count[0] - 1) | (after != group))
    def _():
        out[...] = total[...].astype(out.dtype)


def _outer(left, right, tables: Map, *, groups: int, blocks: Blocks, interpret: bool) -> jax.Array:
    """out[g] = left[rows of g]T right[rows of g]; the tables visit each group."""
    inputs, outputs = left.shape[1], right.shape[1]

    def of_rows(side):
        return lambda i, j, visit, table, count: (
            table[ROW, visit] // blocks.rows,
            i if side == "left" else j,
        )

    return pl.pallas_call(
        functools.partial(_groups_body, blocks=blocks),
        out_shape=jax.ShapeDtypeStruct((groups, inputs, outputs), left.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(inputs // blocks.inputs, outputs // blocks.outputs, tables.count[0]),
            in_specs=[
                pl.BlockSpec((blocks.rows, blocks.inputs), of_rows("left")),
                pl.BlockSpec((blocks.rows, blocks.outputs), of_rows("right")),
            ],
            out_specs=pl.BlockSpec(
                (None, blocks.inputs, blocks.outputs),
                lambda i, j, visit, table, count: (table[GROUP, visit], i, j),
            ),
            scratch_shapes=[pltpu.VMEM((blocks.inputs, blocks.outputs), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        name="grouped_matmul_groups",
        interpret=interpret,
    )(tables.table, tables.count, left, right)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tpu:
    """A `derivative.Kernel`; `most` bounds every side of a block."""

    most: int = 512
    interpret: bool = False

    def product(self, x, matrices, sizes, *, transpose: bool) -> jax.Array:
        rows, groups = x.shape[0], matrices.shape[0]
        sides = matrices.shape[1:][::-1] if transpose else matrices.shape[1:]
        blocks = self._blocks(rows, groups, sides)
        bounds = group_bounds(sizes, rows)
        tables = row_tiles(bounds, rows, tile=blocks.rows, unit=blocks.rows)
        how = {"transpose": transpose, "blocks": blocks, "interpret": self.interpret}
        return _product(x, matrices, tables, **how)

    def outer(self, left, right, sizes) -> jax.Array:
        rows, groups = left.shape[0], sizes.shape[0]
        blocks = self._blocks(rows, groups, (left.shape[1], right.shape[1]))
        bounds = group_bounds(sizes, rows)
        tables = row_tiles(bounds, rows, tile=blocks.rows, unit=blocks.rows, every=True)
        how = {"groups": groups, "blocks": blocks, "interpret": self.interpret}
        return _outer(left, right, tables, **how)

    def _blocks(self, rows: int, groups: int, sides: tuple[int, int]) -> Blocks:
        """Rows by an even group's, a multiple of 16; sides by what divides them."""
        height = 16
        while height < min(self.most, rows // groups):
            height *= 2
        inputs, outputs = (
            next(n for n in (1024, 512, 256, 128) if n <= self.most and side % n == 0)
            for side in sides
        )
        return Blocks(rows=height, inputs=inputs, outputs=outputs)


def grouped(lhs, rhs, sizes, *, transpose_rhs: bool = False) -> jax.Array:
    """As `reference`."""
    return run(lhs, rhs, sizes, Tpu(), transpose_rhs)
