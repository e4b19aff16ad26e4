# Types of jax's Mosaic GPU objects are not public.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
"""The Hopper backward in one pass: five products instead of seven (Pallas, Mosaic GPU backend).

The kernel for dk and dv has what dq is made of, the gradient of a block's scores; what its tile of
keys gives to dq leaves for device memory, where the copy engine adds it to what other tiles gave.
That order is not fixed: dq's last bits differ between runs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.errors import UnsupportedError
from pallas_kernels.flash_attention.mosaic_gpu_gradients import KeyValueGradients, weighted
from pallas_kernels.flash_attention.pieces import COLUMN, CONSUMERS, along, swizzled

__all__ = ["AllGradients"]

_WIDTH = 128  # of q and k: each consumer makes half of dq's columns, a row of swizzled memory


@dataclasses.dataclass(frozen=True)
class AllGradients(KeyValueGradients):
    """The kernel for dq, dk and dv; a program owns CONSUMERS * 64 keys of one kv head.

    Both consumers put their gradient of the scores into shared memory and meet; each then
    multiplies that of all keys with its half of the keys' columns.
    """

    dq: Any  # ref of zeros in device memory: float32 [B, blocks * block, N, H]

    def __post_init__(self):
        if self.shape.width != _WIDTH or self.shape.value_width > _WIDTH:
            raise UnsupportedError(
                f"flash_attention: a backward in one pass takes heads of {_WIDTH} with values of "
                f"up to {_WIDTH}, not {self.shape.width} and {self.shape.value_width}; take tiles "
                "without one_pass"
            )
        if self.tiles.split or self.tiles.running or self.tiles.delta:
            raise UnsupportedError(
                "flash_attention: tiles with one_pass have no split, running or delta"
            )

    def body(self, refs):
        super().body(refs | {"dq": self.dq})

    def turned(self, i, first, end):
        """The last block first: all keys of a causal row see it, so that programs of one head begin
        with the same queries and find them, and dq, in the L2 cache."""
        return first + end - 1 - i

    def over_queries(self, refs, memory, place, keys, sums, step):
        smem, full, free, spare = memory
        keep, bias = keys[2:]
        (batch, tile, kv_head), (dk, dv) = place, sums
        walk, tiles, spec, dtype = self.walk, self.tiles, self.walk.spec, self.shape.dtype
        wg = lax.axis_index("wg")
        width = _WIDTH // CONSUMERS
        half = pl.ds(wg * width, width)

        def meet():
            """Waits for the other consumer."""
            plgpu.barrier_arrive(full["dscores"])
            plgpu.barrier_wait(full["dscores"])

        def one(position, step, ends, place):
            slot = lax.rem(step, tiles.stages)
            q_smem, do_smem = smem["q"].at[slot], smem["do"].at[slot]
            # Where K and V lie is found anew in each step: no registers for their descriptors.
            mine = pl.ds((wg + lax.optimization_barrier(step - step)) * 64, 64)
            # Two, so that meeting once a step is enough: who writes the second time to one of them
            # has met, in the step between, someone who was done with it.
            of_all = smem["dscores"].at[lax.rem(step, 2)]
            visible = (lambda: None) if ends is None else keep(place, position, ends)
            added = bias(place, position)
            plgpu.barrier_wait(full["q"].at[slot])

            def gradient(scores, dweights):
                plgpu.wgmma(scores, smem["k"].at[mine], q_smem.T)
                fall = plgpu.load(smem["stats"].at[slot, 1], layout=COLUMN)
                fall = along(fall, (64, walk.block), 1)
                if not self.shape.interpret:  # it knows no stores to accumulators
                    dweights[...] = fall
                plgpu.barrier_wait(full["do"].at[slot])
                plgpu.wgmma(dweights, smem["v"].at[mine], do_smem.T)
                lse = plgpu.load(smem["stats"].at[slot, 0], layout=COLUMN)
                scores = plgpu.wgmma_accumulator_load(scores, wait_n=1)
                weights, slope = weighted(scores, lse, spec, visible(), 1, added())
                spare.add(dv, weights.astype(dtype), do_smem)
                rise = plgpu.wgmma_accumulator_load(dweights, wait_n=1)
                dscores = weights * (rise + fall if self.shape.interpret else rise)
                return (dscores if slope is None else dscores * slope).astype(dtype)

            square = plgpu.ACC((64, walk.block), jnp.float32)
            dscores = pl.run_scoped(gradient, square, square)
            of_all.at[pl.ds(wg * 64, 64)][...] = dscores
            plgpu.commit_smem()
            meet()

            def last(part):
                plgpu.wgmma(part, of_all.T, smem["k"].at[:, half])
                spare.add(dk, dscores, q_smem)
                plgpu.wgmma_wait(2)
                plgpu.barrier_arrive(free["do"].at[slot])
                there = smem["dq"].at[wg]
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                there[...] = plgpu.wgmma_accumulator_load(part, wait_n=1)
                queries = pl.ds(walk.block_at(place, position, refs) * walk.block, walk.block)
                self.add(there, refs["dq"].at[batch, queries, place[2], half])
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(free["q"].at[slot])

            pl.run_scoped(last, plgpu.ACC((walk.block, width), jnp.float32))
            return step + 1

        def head_steps(member, step):
            place = (batch, tile, kv_head * self.shape.group + member)
            for start, end, ends in reversed(walk.parts(walk.bounds(place, refs))):

                def body(i, step, start=start, end=end, ends=ends):
                    return one(self.turned(i, start, end), step, ends, place)

                step = lax.fori_loop(start, end, body, step)
            return step

        end = lax.fori_loop(0, self.shape.group, head_steps, step)
        meet()  # K's memory, which both read, is about to be written
        return end

    def add(self, part, total):
        """total += part, begun and not waited for."""
        if self.shape.interpret:  # it knows no sums in copies
            part[...] = part[...] + total[...]
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(part, total)
            return
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(part, total, reduction_op="add")

    def memory(self):
        smem, full, free = super().memory()
        walk, width = self.walk, self.shape.width // CONSUMERS
        smem["dscores"] = swizzled((2, walk.tile, walk.block), self.shape.dtype)
        smem["dq"] = swizzled((CONSUMERS, walk.block, width), jnp.float32)
        full["dscores"] = plgpu.Barrier(num_arrivals=CONSUMERS)
        return smem, full, free
