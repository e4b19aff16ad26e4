# Types of jax's Mosaic GPU objects are not public.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
"""Attention over pages on Hopper where one program has all of a sequence's keys.

Queries are read and results written where they lie among all tokens [T, N, H], query by query:
nothing is gathered, padded, turned or merged around the kernel.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.once import lowered_once
from pallas_kernels.paged_attention.mosaic_gpu import ROWS, UNIT, Kernel, Tiles, known_of
from pallas_kernels.paged_attention.problem import Problem
from pallas_kernels.warpgroups import ROW, swizzled

__all__ = ["Blocks", "Whole", "attend_whole", "sums_of"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """What blocks of queries look like, and how they are cut into tiles of up to 64 rows.

    Attributes:
      queries: Q, most of a block.
      group: G, query heads of a key head.
      tokens: T.
      flat: only a block's own queries are written, as others' may follow; else all Q.
    """

    queries: int
    group: int
    tokens: int
    flat: bool

    @property
    def heads(self) -> int:
        """Of a tile."""
        return -(-self.group // self.head_tiles)

    @property
    def head_tiles(self) -> int:
        return -(-self.group // ROWS)

    @property
    def tile(self) -> int:
        """Queries of a tile."""
        return min(self.queries, ROWS // self.heads)

    @property
    def tiles(self) -> int:
        """Of a block and key head."""
        return -(-self.queries // self.tile) * self.head_tiles

    def first(self, tile):
        """(first query, first head of the group) of a tile; two tiles may share some heads."""
        head = jnp.minimum(lax.rem(tile, self.head_tiles) * self.heads, self.group - self.heads)
        return lax.div(tile, self.head_tiles) * self.tile, head

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """(tile, row of it) of each query and head of the group, [Q, G] each."""
        query, head = np.indices((self.queries, self.group))
        across = np.minimum(head // self.heads, self.head_tiles - 1)
        begun = np.minimum(across * self.heads, self.group - self.heads)
        tile = query // self.tile * self.head_tiles + across
        return tile, query % self.tile * self.heads + head - begun


@dataclasses.dataclass(frozen=True)
class Whole(Kernel):
    """One compiled kernel; its result is in the queries' dtype."""

    shape: Blocks = Blocks(queries=1, group=1, tokens=1, flat=False)

    @property
    def row_tiles(self) -> int:
        return self.shape.tiles

    @property
    def units(self) -> bool:
        """Whether a query's heads are whole units of rows, which may lie as products want them."""
        return self.shape.heads % UNIT == 0

    @property
    def asks(self) -> int:
        return self.shape.tile

    def plain(self, width: int):
        """Shared memory of a tile's rows as they come and leave."""
        if self.units:
            return swizzled((ROWS, width), self.dtype)
        return plgpu.SMEM((ROWS, width), self.dtype)

    def held(self):
        smem = super().held() | {"out": self.plain(self.value_width)}
        if not self.units and self.pool[3] != self.value_width:
            smem["asked"] = self.plain(self.pool[3])
        return smem

    def places(self, refs, block, tile):
        first, _ = self.shape.first(tile)
        row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW)
        return self.place_of(refs, block, row, first)

    def place_of(self, refs, block, row, first):
        """Places of the queries of some rows of a tile, -1 for none."""
        heads = self.shape.heads
        query = first + (row if heads == 1 else lax.div(row, jnp.int32(heads)))
        there = (query < refs["counts"][block]) & (row < self.shape.tile * heads)
        return jnp.where(there, query + refs["starts"][block], -1)

    def arriving(self, smem):
        """Where queries come to."""
        return smem["q"] if self.units else smem.get("asked", smem["out"])

    def program(self, refs, smem, full, asked):
        run = functools.partial(Kernel.program, self, refs, smem, full, asked)
        if not self.shape.flat:
            run()
            return
        # Tiles without a query, of which a mixed step has many, end at once.
        block, tile, _, _ = self.place(lax.axis_index("cta"))
        pl.when(self.shape.first(tile)[0] < refs["counts"][block])(run)

    def each(self, refs, at, copy, *, written: bool):
        """copy(rows of the tile, (token, heads)) for every query of a tile, or those to write."""
        block, tile, head = at
        first, begin = self.shape.first(tile)
        heads, many = self.shape.heads, self.shape.tile
        theirs = pl.ds(head * self.shape.group + begin, heads)
        begins = refs["begins"][block] if self.shape.flat else block * self.shape.queries
        token = begins + first
        count = refs["counts"][block] if self.shape.flat else self.shape.queries
        left = jnp.minimum(count - first, many)

        def one(i):
            rows = pl.ds(i * heads, heads)
            if not written:
                copy(rows, (jnp.minimum(token + i, self.shape.tokens - 1), theirs))
                return

            @pl.when(i < left)
            def _():
                copy(rows, (token + i, theirs))

        if self.units or many == 1:
            for i in range(many):
                one(i)
        else:
            lax.fori_loop(0, many, lambda i, _: one(i), None)

    def ask(self, refs, smem, asked, at):
        shared = self.arriving(smem)

        def copy(rows, theirs):
            plgpu.copy_gmem_to_smem(refs["q"].at[theirs], shared.at[rows], asked)

        self.each(refs, at, copy, written=False)

    def arrived(self, smem):
        if self.units:
            return
        layout = None if self.interpret else plgpu.Layout.WGMMA
        smem["q"][...] = plgpu.load(self.arriving(smem), layout=layout, optimized=False)
        plgpu.commit_smem()

    def hand_out(self, refs, smem, found, at):
        block, tile, _, head = at
        out, smem["lse"][...] = self.finished(found)
        smem["out"][...] = out.astype(self.dtype)
        plgpu.commit_smem()
        self.write(refs, smem, (block, tile, head))

    def write(self, refs, smem, at):
        """A tile's result, from shared memory."""
        block, tile, head = at

        def copy(rows, theirs):
            source = smem["out"].at[rows]
            plgpu.copy_smem_to_gmem(source, refs["out"].at[theirs], commit_group=False)

        self.each(refs, at, copy, written=True)
        sums = refs["lse"].at[block, head, tile]
        plgpu.copy_smem_to_gmem(smem["lse"], sums, commit_group=False)
        plgpu.commit_smem_to_gmem_group()
        plgpu.wait_smem_to_gmem(0)


def sums_of(shape: Blocks, lse: jax.Array) -> jax.Array:
    """[M, Q, N] of log-sums [M, K, tiles, rows]."""
    tile, row = shape.places()
    found = lse[:, :, tile, row]  # [M, K, Q, G]
    return found.transpose(0, 2, 1, 3).reshape(lse.shape[0], shape.queries, -1)


@lowered_once("problem", "tiles", "shape", "interpret")
def attend_whole(
    q: jax.Array,
    pools: tuple[jax.Array, jax.Array, jax.Array | None],
    pages: tuple[jax.Array, jax.Array, tuple[jax.Array, ...]],
    *,
    problem: Problem,
    tiles: Tiles,
    shape: Blocks,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Out [T, N, V] in q's dtype and lse float32 [M, Q, N].

    Args:
      q: [T, N, H].
      pools: (k, v, scales) of `paged_attention`.
      pages: its table, firsts, and (rows, starts, counts) of blocks, (…, begins) of flat ones.
      shape: of the blocks.
    """
    (k, v, _), blocks = pools, pages[2]
    facts, inputs = known_of(q, pools, pages)
    kernel = Whole(
        problem=problem,
        rows=shape.queries * shape.group,
        group=shape.group,
        tiles=tiles,
        interpret=interpret,
        shape=shape,
        **facts,
    )
    count, heads = blocks[0].shape[0], k.shape[2]
    outputs = {
        "out": jax.ShapeDtypeStruct((*q.shape[:2], v.shape[3]), q.dtype),
        "lse": jax.ShapeDtypeStruct((count, heads, shape.tiles, ROWS), jnp.float32),
    }
    out, lse = kernel.run(inputs, outputs, count * shape.tiles * heads)
    return out, sums_of(shape, lse)
