# Types of jax's Mosaic GPU objects are not public.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
"""Attention over pages on Hopper for a few queries: keys are the rows of the product.

An instruction has 64 rows and 8 columns or more. With keys as rows and queries x heads as columns,
decoding pays for 8 columns where it would for 64 rows: an eighth of the softmax, and sums of a few
registers. The sums are turned as well: 64 dims of values by 8 columns. Codes of 8 bits of keys are
widened in registers and stay there; those of values go through shared memory.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.once import lowered_once
from pallas_kernels.paged_attention.mosaic_gpu import UNIT, Tiles, known_of
from pallas_kernels.paged_attention.mosaic_gpu_whole import Blocks, Whole
from pallas_kernels.paged_attention.problem import Problem
from pallas_kernels.warpgroups import (
    COLUMN,
    LOG2E,
    ROW,
    along,
    capped,
    iota,
    multiply,
    swizzled,
    weighed,
)

__all__ = ["MOST", "Few", "attend_few"]

MOST = 32  # queries x heads of a key head


@dataclasses.dataclass(frozen=True)
class Few(Whole):
    """One compiled kernel; `rows` are the columns of its products, a multiple of 8.

    Of several parts each one's result is float32 [S, M, K, V, rows], else it is in the queries'
    dtype where they lie.
    """

    @property
    def row_tiles(self) -> int:
        return 1

    @property
    def scratch(self) -> int:
        return 1024 if self.rows == UNIT else 2048

    @property
    def parts(self) -> bool:
        return self.tiles.splits > 1

    def held(self):
        smem = {
            "q": swizzled((self.rows, self.pool[3]), self.dtype),
            "weights": swizzled((self.rows, self.keys), self.dtype),
            "out": plgpu.SMEM((self.rows, self.value_width), self.dtype),
            "lse": plgpu.SMEM((self.rows,), jnp.float32),
        }
        if self.parts or self.pool[3] != self.value_width:
            smem["asked"] = plgpu.SMEM((self.rows, self.pool[3]), self.dtype)
        if self.parts:
            smem["out"] = plgpu.SMEM((self.value_width, self.rows), jnp.float32)
        if self.codes is not None:
            smem["wide"] = swizzled((self.keys, self.value_width), self.dtype)
            if self.interpret:
                smem["stage"] = swizzled((self.keys, self.pool[3]), self.dtype)
        return smem

    def places(self, refs, block, tile):
        row = plgpu.broadcasted_iota(jnp.int32, (self.rows,), 0, layout=COLUMN)
        return self.place_of(refs, block, row, 0)

    def arrived(self, smem):
        came = self.arriving(smem)
        if self.interpret:
            smem["q"][...] = came[...]
        else:
            turned = plgpu.load(came.T, layout=plgpu.Layout.WGMMA, optimized=False)
            smem["q"].T[...] = turned
        plgpu.commit_smem()

    def nothing(self):
        """Sums [V, rows] and totals [keys, rows] that are added up at the end, and peaks."""
        out = jnp.zeros((self.value_width, self.rows), jnp.float32)
        total = jnp.zeros((self.keys, self.rows), jnp.float32)
        peak = jnp.full((self.rows,), -jnp.inf, jnp.float32)
        if self.interpret:
            return out, peak, total
        cast, square = plgpu.layout_cast, plgpu.Layout.WGMMA
        return cast(out, square), cast(peak, COLUMN), cast(total, square)

    def scale(self, smem, slot, side):
        """Of a step's keys or values."""
        return plgpu.load(smem["scales"].at[slot, side], layout=ROW)

    def scores(self, smem, slot):
        """[keys, rows], before any factor."""

        def product(acc):
            keys = smem["k"].at[slot]
            if self.codes is None:
                plgpu.wgmma(acc, keys, smem["q"].T)
            else:
                multiply(acc, self.wide_keys(keys), smem["q"].T, smem.get("stage"))
            plgpu.wgmma_wait(0)
            return acc[...]

        return pl.run_scoped(product, plgpu.ACC((self.keys, self.rows), jnp.float32))

    def wide_keys(self, codes):
        """Codes in registers, as the left operand of a product."""
        if self.interpret:
            return codes[...].astype(self.dtype)
        found = plgpu.load(codes, layout=plgpu.Layout.WGMMA_UPCAST_2X)
        if self.codes == jnp.float8_e4m3fn:
            found = found.astype(jnp.float16).astype(jnp.float32)
        return plgpu.layout_cast(found.astype(self.dtype), plgpu.Layout.WGMMA)

    def fold(self, smem, slot, places, ends, carry, walk=None):
        """Sums with one more step's keys; `walk` refills what was read and waits for values."""
        out, peak, total = carry
        (end, left), shape = ends, (self.keys, self.rows)
        problem, scores = self.problem, self.scores(smem, slot)
        if self.codes is not None:
            scores = scores * along(self.scale(smem, slot, 0), shape, 0)
        if walk is not None:
            walk[0]((0,))
        scores, factor = capped(scores, problem.scale, problem.softcap)
        key, query = iota(shape, 0) + (end - left), along(places, shape, 1)
        seen = key <= query
        if problem.window is not None:
            seen = seen & (key >= query - problem.window)
        weights, decay, higher = weighed(scores * factor, seen, peak, 0)
        total = total * along(decay, shape, 1) + weights
        if walk is not None:
            walk[1]()
        v = smem["v"].at[slot]
        if self.codes is not None:
            place = plgpu.broadcasted_iota(jnp.int32, (self.keys,), 0, layout=ROW)
            scale = jnp.where(place < left, self.scale(smem, slot, 1), 0.0)
            weights = weights * along(scale, shape, 0)
            v = self.widened(smem, "v", slot)
            self.keep(v, left)
        smem["weights"].T[...] = weights.astype(self.dtype)
        plgpu.commit_smem()

        def sums(acc):
            plgpu.wgmma(acc, v.T, smem["weights"].T)
            plgpu.wgmma_wait(0)
            return acc[...]

        found = pl.run_scoped(sums, plgpu.ACC(out.shape, jnp.float32))
        if walk is not None:
            walk[0]((1,))
        return out * along(decay, out.shape, 1) + found, higher, total

    def finished(self, found):
        out, peak, total = found
        total = jnp.sum(total, axis=0)
        some = total > 0.0
        out = out * along(jnp.where(some, 1.0 / total, 0.0), out.shape, 1)
        return out, jnp.where(some, peak * (1.0 / LOG2E) + jnp.log(total), -jnp.inf)

    def hand_out(self, refs, smem, found, at):
        block, tile, split, head = at
        out, smem["lse"][...] = self.finished(found)
        if not self.parts:
            smem["out"].T[...] = out.astype(self.dtype)
            plgpu.commit_smem()
            self.write(refs, smem, (block, tile, head))
            return
        smem["out"][...] = out
        plgpu.commit_smem()
        place = (split, block, head)
        plgpu.copy_smem_to_gmem(smem["out"], refs["out"].at[place])
        plgpu.copy_smem_to_gmem(smem["lse"], refs["lse"].at[place])
        plgpu.wait_smem_to_gmem(0)

    @property
    def units(self) -> bool:
        return False


@lowered_once("problem", "tiles", "shape", "interpret")
def attend_few(
    q: jax.Array,
    pools: tuple[jax.Array, jax.Array, jax.Array | None],
    pages: tuple[jax.Array, jax.Array, tuple[jax.Array, ...]],
    *,
    problem: Problem,
    tiles: Tiles,
    shape: Blocks,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Of one part out [T, N, V] in q's dtype and lse float32 [M, K, R]; of S parts out float32
    [S, M, K, R, V] and lse [S, M, K, R]. R is queries by heads of a key head, query by query.

    Args:
      q: [T, N, H].
      pools: (k, v, scales) of `paged_attention`.
      pages: its table, firsts, and (rows, starts, counts) of blocks, (…, begins) of flat ones.
      shape: of the blocks; Q G is at most `MOST`.
    """
    (k, v, _), blocks = pools, pages[2]
    facts, inputs = known_of(q, pools, pages)
    heads, rows = k.shape[2], shape.queries * shape.group
    kernel = Few(
        problem=problem,
        rows=-(-rows // UNIT) * UNIT,
        group=shape.group,
        tiles=tiles,
        interpret=interpret,
        shape=shape,
        **facts,
    )
    count = blocks[0].shape[0]
    if kernel.parts:
        lead = (tiles.splits, count, heads, kernel.rows)
        out = jax.ShapeDtypeStruct((*lead[:3], v.shape[3], kernel.rows), jnp.float32)
    else:
        lead = (count, heads, 1, kernel.rows)
        out = jax.ShapeDtypeStruct((*q.shape[:2], v.shape[3]), q.dtype)
    outputs = {"out": out, "lse": jax.ShapeDtypeStruct(lead, jnp.float32)}
    out, lse = kernel.run(inputs, outputs, count * tiles.splits * heads)
    if kernel.parts:
        return out.swapaxes(3, 4)[:, :, :, :rows], lse[..., :rows]
    return out, lse[:, :, 0, :rows]
