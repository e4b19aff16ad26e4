# Types of jax's Mosaic GPU objects are not public.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
"""The Hopper forward, one product further ahead: for heads of up to 64.

While a consumer's softmax of a block runs, both the product of the weights before and the scores of
the block after are multiplied, the next tile's first block being the one after a tile's last: no
scores are waited for, and a tile's end runs beside the next one's beginning. Two blocks of scores
are in registers at once, which wider heads have no room for; two tiles of q are in shared memory.
"""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention.mosaic_gpu_forward import Forward, Softmax
from pallas_kernels.flash_attention.pieces import (
    CONSUMERS,
    Spare,
    along,
    biases,
    drain,
    keeper,
    swizzled,
)
from pallas_kernels.flash_attention.ranges import BOTH, HIGH

__all__ = ["ForwardAhead"]


@dataclasses.dataclass(frozen=True)
class ForwardAhead(Forward):
    """One compiled kernel, whose scores are a block ahead of its softmax."""

    def load(self, refs, smem, full, free):
        def tile(index, carry):
            step, turn = carry
            place, q = self.shape.tile(self.walk, index), (smem["q"], full["q"], free["q"])
            q = tuple(x.at[turn] for x in q)
            return self.bring(refs, (smem, full, free), place, q, step), 1 - turn

        self.shape.for_tiles(refs, self.walk, self.ctas, tile, (jnp.int32(0), jnp.int32(0)))
        drain(free)

    def all_free(self, free):
        """All slots of keys, values and queries are free."""
        for name, count in {"k": self.tiles.stages, "v": self.tiles.stages, "q": 2}.items():
            for slot in range(count):
                plgpu.barrier_arrive(free[name].at[slot])

    def begin(self, full, free, multiply, square):
        """The first scores of all; multiply(scores) begins their product."""
        plgpu.barrier_wait(full["q"].at[0])
        plgpu.barrier_wait(full["k"].at[0])

        def product(scores):
            multiply(scores)
            return plgpu.wgmma_accumulator_load(scores, wait_n=0)

        scores = pl.run_scoped(product, square)
        plgpu.barrier_arrive(free["k"].at[0])
        return scores

    def compute(self, refs, smem, full, free):
        tiles, walk = self.tiles, self.walk
        wg = lax.axis_index("wg")
        form = (walk.spec, self.shape.dtype, walk.names)
        softmax, spare = Softmax.of(*form), Spare.of(smem, wg)
        square = plgpu.ACC((tiles.block_q, tiles.block_kv), jnp.float32)
        mine = pl.ds(wg * tiles.block_q, tiles.block_q)
        slot_of = lambda step: lax.rem(step, tiles.stages)  # noqa: E731

        self.all_free(free)

        def multiply(scores, turn, step):
            plgpu.wgmma(scores, smem["q"].at[turn, mine], smem["k"].at[slot_of(step)].T)

        def tile(index, carry):
            step, turn, after, scores = carry
            batch, row, head = self.shape.tile(self.walk, index)
            first_row = row * walk.tile + wg * tiles.block_q
            place = (batch, row, head)
            bounds = walk.bounds(place, refs)
            low, high = bounds[0], bounds[-1]
            count = high - low
            keep = keeper(walk, refs, batch, (first_row, tiles.block_q))
            bias = biases(walk, refs, batch, (first_row, tiles.block_q))
            start = self.start(refs, batch, head, fixed=softmax.fixed)
            more = jnp.where(after > 0, 1, 0)

            def seen(i, ends):
                return (lambda: None) if ends is None else keep(place, high - 1 - i, ends)

            def await_keys(i):
                """Waits for the keys of the scores that step i begins.

                A branch keeps the assembler from moving the softmax behind the wait for products.
                """

                @pl.when(i + 1 < count + more)
                def _():
                    plgpu.barrier_wait(full["k"].at[slot_of(step + i + 1)])

            def await_queries(i):
                @pl.when((i + 1 == count) & (after > 0))
                def _():
                    plgpu.barrier_wait(full["q"].at[1 - turn])

            def turn_of(i):
                return jnp.where(i < count, turn, 1 - turn)

            def let_go(i):
                """Frees the keys of step i + 1, and the queries after their last product."""

                @pl.when(i + 1 < count + more)
                def _():
                    plgpu.barrier_arrive(free["k"].at[slot_of(step + i + 1)])

                @pl.when(i + 2 == count)
                def _():
                    plgpu.barrier_arrive(free["q"].at[turn])

            def first(scores):
                await_keys(0)
                await_queries(0)
                visible = seen(0, (HIGH if walk.last_is_high else BOTH) if walk.masked else None)
                added = bias(place, high - 1)

                @pl.when(count == 1)
                def _():
                    plgpu.barrier_arrive(free["q"].at[turn])

                _, before = start
                visible = visible()
                powers, peak, decay = softmax.shifted(scores, start[0], visible, added())
                powers, peak, decay = lax.optimization_barrier((powers, peak, decay))

                def products(following):
                    multiply(following, turn_of(1), step + 1)
                    await_keys(1)
                    weights, total = softmax.summed(powers, before, decay)
                    weights, total = lax.optimization_barrier((weights, total))
                    await_queries(1)
                    return plgpu.wgmma_accumulator_load(following, wait_n=0), peak, total, weights

                following, peak, total, weights = pl.run_scoped(products, square)
                let_go(0)
                return peak, total, weights.astype(self.shape.dtype), following

            def walk_blocks(acc):
                def other(i, carry, ends):
                    peak, total, weights, scores = carry
                    before = slot_of(step + i - 1)
                    visible, added = seen(i, ends), bias(place, high - 1 - i)

                    plgpu.barrier_wait(full["v"].at[before])
                    spare.add(acc, weights, smem["v"].at[before])
                    visible = visible()
                    powers, peak, decay = softmax.shifted(scores, peak, visible, added())
                    powers, peak, decay = lax.optimization_barrier((powers, peak, decay))

                    def products(following):
                        multiply(following, turn_of(i + 1), step + i + 1)
                        await_keys(i + 1)
                        now, sums = softmax.summed(powers, total, decay)
                        now, sums = lax.optimization_barrier((now, sums))
                        await_queries(i + 1)
                        return plgpu.wgmma_accumulator_load(following, wait_n=0), now, sums

                    following, now, total = pl.run_scoped(products, square)
                    let_go(i)
                    plgpu.barrier_arrive(free["v"].at[before])
                    if decay is not None:
                        acc[...] = acc[...] * along(decay, acc.shape, 0)
                    return peak, total, now.astype(self.shape.dtype), following

                carry, done = first(scores), jnp.int32(1)
                for low_block, _, ends in reversed(walk.parts(bounds)):
                    end = jnp.maximum(high - low_block, done)
                    carry = lax.fori_loop(done, end, functools.partial(other, ends=ends), carry)
                    done = end
                peak, total, weights, following = carry
                slot = slot_of(step + count - 1)
                plgpu.barrier_wait(full["v"].at[slot])
                spare.add(acc, weights, smem["v"].at[slot])
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(free["v"].at[slot])
                return acc[...], peak, total, following

            of_sums = (tiles.block_q, self.shape.value_width)
            *sums, following = spare.zeroed(walk_blocks, of_sums)
            where = (batch, first_row, head)
            self.finish(refs, smem["o"].at[wg], smem["lse"].at[wg], where, sums)
            return step + count, 1 - turn, after - 1, following

        scores = self.begin(full, free, functools.partial(multiply, turn=0, step=0), square)
        start = (jnp.int32(0), jnp.int32(0), self.shape.share(refs, walk, self.ctas) - 1, scores)
        self.shape.for_tiles(refs, walk, self.ctas, tile, start)
        plgpu.wait_smem_to_gmem(0)

    def memory(self):
        smem, full, free = super().memory()
        rows = CONSUMERS * self.tiles.block_q
        smem["q"] = swizzled((2, rows, self.shape.width), self.shape.dtype)
        full["q"] = plgpu.Barrier(num_barriers=2)
        free["q"] = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=2)
        return smem, full, free
