# Types of jax's Mosaic GPU objects are not public.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
"""The Hopper forward where each consumer has a list of its own of the blocks that come for a tile.

A block that only one consumer's rows see costs the other nothing: it lets the block go as soon as
it is there. Keys are waited for while the block before is still used, so that between two of a
consumer's blocks at most half as many stand as are in flight (`Halves`); else nobody would go on.
"""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention.mosaic_gpu_forward import Forward, Softmax
from pallas_kernels.flash_attention.pieces import Spare, along, biases, keeper, pass_over, slot_of
from pallas_kernels.flash_attention.ranges import BOTH

__all__ = ["ForwardOwn"]


@dataclasses.dataclass(frozen=True)
class ForwardOwn(Forward):
    """One compiled kernel, whose consumers skip blocks."""

    def compute(self, refs, smem, full, free):
        tiles, walk, own = self.tiles, self.walk, self.walk.of_consumer()
        wg = lax.axis_index("wg")
        q_smem = smem["q"].at[pl.ds(wg * tiles.block_q, tiles.block_q)]
        form = (walk.spec, self.shape.dtype, walk.names)
        softmax, spare = Softmax.of(*form), Spare.of(smem, wg)
        square = plgpu.ACC((tiles.block_q, tiles.block_kv), jnp.float32)
        stages: dict[str, int] = dict.fromkeys(("k", "v"), tiles.stages)

        for name, count in stages.items():
            for slot in range(count):
                plgpu.barrier_arrive(free[name].at[slot])
        plgpu.barrier_arrive(free["q"])

        def tile(index, step):
            batch, row, head = place = self.shape.tile(walk, index)
            first_row = row * walk.tile + wg * tiles.block_q
            bounds, end = own.bounds(place, refs), step + walk.bounds(place, refs)[-1]
            count = bounds[-1]
            keep = keeper(own, refs, batch, (first_row, tiles.block_q))
            bias = biases(own, refs, batch, (first_row, tiles.block_q))
            entry = lambda i: own.entry(place, jnp.maximum(count - 1 - i, 0), refs)  # noqa: E731
            come = lambda entry: end - 1 - own.arrival(entry)  # noqa: E731
            slot = lambda entry: slot_of(come(entry), tiles.stages)  # noqa: E731

            def seen(entry, ends):
                return (lambda: None) if ends is None else keep(place, entry, ends)

            def await_keys(done, entry):
                """Waits for a block's keys, and lets those go that came before."""
                pass_over(full, free, stages, (done, come(entry)))
                plgpu.barrier_wait(full["k"].at[slot(entry)])

            def leave_queries(i):
                @pl.when(i + 1 == count)
                def _():
                    plgpu.barrier_arrive(free["q"])

            def await_next(i, now, following):
                """The branch keeps the assembler from moving the softmax behind the wait for
                products, where nothing would run beside it."""

                @pl.when(i + 1 < count)
                def _():
                    await_keys(come(now) + 1, following)

            def first():
                now, following = entry(0), entry(1)
                visible, added = seen(now, BOTH), bias(place, now)
                await_keys(step, now)
                plgpu.barrier_wait(full["q"])

                def product(scores):
                    plgpu.wgmma(scores, q_smem, smem["k"].at[slot(now)].T)
                    return scores[...]

                scores = pl.run_scoped(product, square)
                plgpu.barrier_arrive(free["k"].at[slot(now)])
                leave_queries(0)
                start = self.start(refs, batch, head, fixed=softmax.fixed)
                weights, peak, total, _ = softmax.step(scores, *start, visible(), added())
                await_next(0, now, following)
                return peak, total, weights.astype(self.shape.dtype), now, following

            def walk_blocks(acc):
                def other(i, carry, ends):
                    """A block's scores, and the product of the block before."""
                    peak, total, weights, last, now = carry
                    following = entry(i + 1)
                    here, before = slot(now), slot(last)
                    visible, added = seen(now, ends), bias(place, now)

                    def products(scores):
                        plgpu.wgmma(scores, q_smem, smem["k"].at[here].T)
                        plgpu.barrier_wait(full["v"].at[before])
                        spare.add(acc, weights, smem["v"].at[before])
                        return plgpu.wgmma_accumulator_load(scores, wait_n=1)

                    scores = pl.run_scoped(products, square)
                    plgpu.barrier_arrive(free["k"].at[here])
                    leave_queries(i)
                    weights, *rest = softmax.step(scores, peak, total, visible(), added())
                    weights, peak, total, decay = lax.optimization_barrier((weights, *rest))
                    await_next(i, now, following)
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(free["v"].at[before])
                    if decay is not None:
                        acc[...] = acc[...] * along(decay, acc.shape, 0)
                    return peak, total, weights.astype(self.shape.dtype), now, following

                carry, done = first(), jnp.int32(1)
                for low_block, _, ends in reversed(own.parts(bounds)):
                    stop = jnp.maximum(count - low_block, done)
                    carry = lax.fori_loop(done, stop, functools.partial(other, ends=ends), carry)
                    done = stop
                peak, total, weights, last, _ = carry
                before = slot(last)
                plgpu.barrier_wait(full["v"].at[before])
                spare.add(acc, weights, smem["v"].at[before])
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(free["v"].at[before])
                return acc[...], peak, total, last

            of_sums = (tiles.block_q, self.shape.value_width)
            *sums, last = spare.zeroed(walk_blocks, of_sums)
            where = (batch, first_row, head)
            self.finish(refs, smem["o"].at[wg], smem["lse"].at[wg], where, sums)
            pass_over(full, free, stages, (come(last) + 1, end))
            return end

        self.shape.for_tiles(refs, walk, self.ctas, tile, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)
