# Types of jax's Mosaic GPU objects are not public.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
"""The Hopper forward whose tiles overlap: for heads that have no room for scores ahead.

A tile's first scores are multiplied while the tile before ends, so that no product is waited for
between two tiles; two tiles of q are in shared memory.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention.mosaic_gpu_ahead import ForwardAhead
from pallas_kernels.flash_attention.mosaic_gpu_forward import Softmax
from pallas_kernels.flash_attention.pieces import Spare, along, biases, keeper
from pallas_kernels.flash_attention.ranges import BOTH, HIGH

__all__ = ["ForwardJoined"]


@dataclasses.dataclass(frozen=True)
class ForwardJoined(ForwardAhead):
    """One compiled kernel, whose first scores of a tile are ahead."""

    scratch_bytes: ClassVar[int] = 1024  # sums along a row pass between the lanes of a warp

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
            batch, row, head = place = self.shape.tile(walk, index)
            first_row = row * walk.tile + wg * tiles.block_q
            bounds = walk.bounds(place, refs)
            low, high = bounds[0], bounds[-1]
            count = high - low
            keep = keeper(walk, refs, batch, (first_row, tiles.block_q))
            bias = biases(walk, refs, batch, (first_row, tiles.block_q))

            def seen(i, ends):
                return (lambda: None) if ends is None else keep(place, high - 1 - i, ends)

            def await_keys(i):
                """Waits for the keys of step i, if there is one; see `Forward`."""

                @pl.when(i < count)
                def _():
                    plgpu.barrier_wait(full["k"].at[slot_of(step + i)])

            def leave_queries(i):
                @pl.when(i + 1 == count)
                def _():
                    plgpu.barrier_arrive(free["q"].at[turn])

            def first():
                leave_queries(0)
                ends = (HIGH if walk.last_is_high else BOTH) if walk.masked else None
                visible, added = seen(0, ends), bias(place, high - 1)
                start = self.start(refs, batch, head, fixed=softmax.fixed)
                weights, peak, total, _ = softmax.step(scores, *start, visible(), added())
                await_keys(1)
                return peak, total, weights.astype(self.shape.dtype)

            def walk_blocks(acc):
                def other(i, carry, ends):
                    """Block high - 1 - i: its scores, and the product of the block before."""
                    peak, total, weights = carry
                    slot, before = slot_of(step + i), slot_of(step + i - 1)
                    visible, added = seen(i, ends), bias(place, high - 1 - i)

                    def products(scores):
                        multiply(scores, turn, step + i)
                        plgpu.barrier_wait(full["v"].at[before])
                        spare.add(acc, weights, smem["v"].at[before])
                        return plgpu.wgmma_accumulator_load(scores, wait_n=1)

                    scores = pl.run_scoped(products, square)
                    plgpu.barrier_arrive(free["k"].at[slot])
                    leave_queries(i)
                    weights, *rest = softmax.step(scores, peak, total, visible(), added())
                    weights, peak, total, decay = lax.optimization_barrier((weights, *rest))
                    await_keys(i + 1)
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(free["v"].at[before])
                    if decay is not None:
                        acc[...] = acc[...] * along(decay, acc.shape, 0)
                    return peak, total, weights.astype(self.shape.dtype)

                carry, done = first(), jnp.int32(1)
                for begin, _end, ends in reversed(walk.parts(bounds)):
                    stop = jnp.maximum(high - begin, done)
                    carry = lax.fori_loop(done, stop, functools.partial(other, ends=ends), carry)
                    done = stop
                peak, total, weights = carry
                slot, following = slot_of(step + count - 1), slot_of(step + count)

                def join(scores):
                    plgpu.barrier_wait(full["v"].at[slot])
                    spare.add(acc, weights, smem["v"].at[slot])

                    @pl.when(after > 0)
                    def _():
                        plgpu.barrier_wait(full["q"].at[1 - turn])
                        plgpu.barrier_wait(full["k"].at[following])

                    multiply(scores, 1 - turn, step + count)
                    sums = spare.read(acc, 1), peak, total
                    plgpu.barrier_arrive(free["v"].at[slot])
                    where = (batch, first_row, head)
                    self.finish(refs, smem["o"].at[wg], smem["lse"].at[wg], where, sums)
                    return plgpu.wgmma_accumulator_load(scores, wait_n=0)

                ahead = pl.run_scoped(join, square)

                @pl.when(after > 0)
                def _():
                    plgpu.barrier_arrive(free["k"].at[following])

                return ahead

            scores = spare.zeroed(walk_blocks, (tiles.block_q, self.shape.value_width))
            return step + count, 1 - turn, after - 1, scores

        scores = self.begin(full, free, functools.partial(multiply, turn=0, step=0), square)
        start = (jnp.int32(0), jnp.int32(0), self.shape.share(refs, walk, self.ctas) - 1, scores)
        self.shape.for_tiles(refs, walk, self.ctas, tile, start)
        plgpu.wait_smem_to_gmem(0)
