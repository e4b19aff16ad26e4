# Types of jax's Mosaic GPU objects are not public.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
"""Latent attention over pages on Hopper: one shared key head, whose first dims are the values.

A program holds 64 rows (queries x heads) and brings pages once, for keys and values. The sums of
512 columns do not fit one warpgroup's registers: each of two holds half of them, and both find the
same weights.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention.pieces import Spare
from pallas_kernels.once import lowered_once
from pallas_kernels.paged_attention.mosaic_gpu import ROWS, UNIT, Kernel, Tiles, folded
from pallas_kernels.paged_attention.problem import Problem
from pallas_kernels.paged_attention.rows import rows_of
from pallas_kernels.warpgroups import CONSUMERS, LOG2E, ROW, along, clear, swizzled

__all__ = ["attend_latent"]


@dataclasses.dataclass(frozen=True)
class LatentKernel(Kernel):
    """One compiled kernel; `value_width` is how many of the keys' dims are values."""

    @property
    def half(self) -> int:
        """Columns of one warpgroup's sums."""
        return self.value_width // CONSUMERS

    def body(self, refs):
        stages = self.tiles.stages
        smem = {
            "q": swizzled((ROWS, self.pool[3]), self.dtype),
            "k": swizzled((stages, self.keys, self.pool[3]), self.dtype),
            "lse": plgpu.SMEM((ROWS,), jnp.float32),
        }
        smem |= Spare.kinds(self, (ROWS, self.keys), (ROWS, self.half))
        full = {
            "k": plgpu.Barrier(num_arrivals=self.pages, num_barriers=stages),
            "q": plgpu.Barrier(),
            "done": plgpu.Barrier(num_arrivals=CONSUMERS),
        }
        free = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages)

        def scoped(smem, full, free):
            wg = lax.axis_index("wg")
            for side in range(CONSUMERS):

                @pl.when(wg == side)
                def _(side=side):
                    self.side(refs, smem, full, free, side)

        pl.run_scoped(scoped, smem, full, free, collective_axes="wg")

    def bring(self, refs, smem, full, head, pages, slot):
        size = self.pool[1]
        for i, page in enumerate(pages):
            shared = smem["k"].at[slot, pl.ds(i * size, size)]
            plgpu.copy_gmem_to_smem(refs["k"].at[page, :, head], shared, full["k"].at[slot])

    def side(self, refs, smem, full, free, side: int):
        """What one warpgroup does; the first also loads."""
        block, tile, split, head = self.place(lax.axis_index("cta"))
        stages = self.tiles.stages
        _, end, first, owner = self.about(refs, block)
        column, steps = self.bounds(refs, block, split)
        own, whole = pl.ds(tile * ROWS, self.rows_out), pl.ds(0, self.rows_out)
        if side == 0:
            for slot in range(stages):

                @pl.when(slot < steps)
                def _(slot=slot):
                    pages = self.numbers(refs, owner, column + slot * self.pages)
                    self.bring(refs, smem, full, head, pages, slot)

            theirs = refs["q"].at[block, head, own]
            plgpu.copy_gmem_to_smem(theirs, smem["q"].at[whole], full["q"])
        places = self.places(refs, block, tile)
        plgpu.barrier_wait(full["q"])
        spare = Spare.of(smem, jnp.int32(side))
        columns = pl.ds(side * self.half, self.half)

        def sums(acc):
            def step(i, carry):
                slot = lax.rem(i, stages)
                begins = column + i * self.pages
                plgpu.barrier_wait(full["k"].at[slot])
                left = end - (first + begins) * self.pool[1]  # keys of the step that were written
                values = smem["k"].at[slot, :, columns]

                @pl.when(left < self.keys)
                def _():  # what is behind may be NaN
                    clear(values, 0, left)
                    plgpu.commit_smem()

                found = folded(self, smem["q"], smem["k"].at[slot], places, end - left, carry)
                weights, decay, *carry = found
                acc[...] = acc[...] * along(decay, acc.shape, 0)
                spare.add(acc, weights.astype(self.dtype), values)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(free.at[slot])
                if side == 0:
                    plgpu.barrier_wait(free.at[slot])

                    @pl.when(i + stages < steps)
                    def _():
                        pages = self.numbers(refs, owner, begins + stages * self.pages)
                        self.bring(refs, smem, full, head, pages, slot)

                return tuple(carry)

            peak, total = lax.fori_loop(0, steps, step, self.statistics())
            return acc[...], peak, total

        out, peak, total = spare.zeroed(sums, (ROWS, self.half))
        some = total > 0.0
        out = out * along(jnp.where(some, 1.0 / total, 0.0), out.shape, 0)
        # The result leaves through the queries' memory, once both sides have read them.
        self.meet(full)
        smem["q"].at[:, columns][...] = out.astype(self.dtype)
        if side == 0:
            smem["lse"][...] = jnp.where(some, peak * (1.0 / LOG2E) + jnp.log(total), -jnp.inf)
        plgpu.commit_smem()
        self.meet(full)
        if side == 0:
            place = (split, block, head, own)
            plgpu.copy_smem_to_gmem(smem["q"].at[whole], refs["out"].at[place])
            plgpu.copy_smem_to_gmem(smem["lse"].at[whole], refs["lse"].at[place])
            plgpu.wait_smem_to_gmem(0)

    def meet(self, full):
        """Waits for the other side."""
        plgpu.barrier_arrive(full["done"])
        plgpu.barrier_wait(full["done"])

    def statistics(self):
        """Peaks and totals before any key."""
        peak, total = jnp.full((ROWS,), -jnp.inf, jnp.float32), jnp.zeros((ROWS,), jnp.float32)
        return plgpu.layout_cast(peak, ROW), plgpu.layout_cast(total, ROW)


@lowered_once("problem", "tiles", "value_width", "interpret")
def attend_latent(
    q: jax.Array,
    k: jax.Array,
    table: jax.Array,
    firsts: jax.Array,
    blocks: tuple[jax.Array, jax.Array, jax.Array],
    *,
    value_width: int,
    problem: Problem,
    tiles: Tiles,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Out [S, M, 1, R, V] in q's dtype and lse float32 [S, M, 1, R] of S parts of the pages.

    Args:
      q, k, table, firsts, blocks: of `paged_attention`, with one key head.
      value_width: V.
    """
    group = q.shape[2]
    q = rows_of(q, 1, unit=UNIT, most=ROWS)
    kernel = LatentKernel(
        problem=problem,
        rows=q.shape[2],
        group=group,
        pool=k.shape,
        value_width=value_width,
        table_width=table.shape[1],
        dtype=jnp.dtype(q.dtype),
        tiles=tiles,
        interpret=interpret,
    )
    names = dict(zip(("rows", "starts", "counts"), blocks, strict=True))
    inputs = {"q": q, "k": k, "table": table, "firsts": firsts} | names
    lead = (tiles.splits, *q.shape[:3])
    outputs = {
        "out": jax.ShapeDtypeStruct((*lead, q.shape[3]), q.dtype),  # whole rows leave
        "lse": jax.ShapeDtypeStruct(lead, jnp.float32),
    }

    def run(*refs):
        kernel.body(dict(zip((*inputs, *outputs), refs, strict=True)))

    out, lse = plgpu.kernel(
        run,
        out_type=tuple(outputs.values()),
        grid=(q.shape[0] * kernel.row_tiles * tiles.splits,),
        grid_names=("cta",),
        num_threads=CONSUMERS,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        kernel_name="latent_paged_attention",
        interpret=plgpu.InterpretGPUParams() if interpret else False,
    )(*inputs.values())
    return out[..., :value_width], lse
