# Types of jax's Mosaic GPU objects are not public.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
"""The Hopper backward, one block's products further ahead."""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention.mosaic_gpu_gradients import (
    KeyValueGradients,
    SplitKeyValueGradients,
    exponents,
)
from pallas_kernels.flash_attention.pieces import (
    COLUMN,
    CONSUMERS,
    SQUARE,
    Shape,
    Spare,
    along,
    biases,
    drain,
    keeper,
    swizzled,
)

__all__ = [
    "KeyValueGradientsRunning",
]


@dataclasses.dataclass(frozen=True)
class KeyValueGradientsRunning(KeyValueGradients):
    """The kernel for dk and dv; a program walks over many tiles of keys."""

    ctas: int

    @property
    def by_keys(self) -> Shape:
        return dataclasses.replace(self.shape, heads=self.shape.kv_heads)

    def load(self, refs, smem, full, free):
        walk = self.walk

        def tile(index, carry):
            step, turn = carry
            batch, tile, kv_head = self.by_keys.tile(walk, index)
            keys = pl.ds(tile * walk.tile, walk.tile)
            for name in ("k", "v"):
                plgpu.barrier_wait(free[name].at[turn])
                where = refs[name].at[batch, keys, kv_head]
                plgpu.copy_gmem_to_smem(where, smem[name].at[turn], full[name].at[turn])
            place = (batch, tile, kv_head)
            return self.bring_queries(refs, (smem, full, free), place, step), 1 - turn

        self.by_keys.for_tiles(refs, walk, self.ctas, tile, (jnp.int32(0), jnp.int32(0)))
        drain(free)

    def all_free(self, free):
        """All slots of queries and of keys are free."""
        stages = self.tiles.stages
        for name, count in {"q": stages, "do": stages, "k": 2, "v": 2}.items():
            for slot in range(count):
                plgpu.barrier_arrive(free[name].at[slot])

    def hand_out(self, refs, smem, dk, dv, where):
        """Begins to store a consumer's sums."""
        wg, batch, first_row, kv_head = where
        rows = pl.ds(first_row, 64)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        smem["dk"].at[wg][...] = dk.astype(self.shape.dtype)
        smem["dv"].at[wg][...] = dv.astype(self.shape.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem["dk"].at[wg], refs["dk"].at[batch, rows, kv_head])
        plgpu.copy_smem_to_gmem(smem["dv"].at[wg], refs["dv"].at[batch, rows, kv_head])

    def compute(self, refs, smem, full, free):
        walk = self.walk
        wg = lax.axis_index("wg")
        spare = Spare.of(smem, wg)
        self.all_free(free)

        def tile_of_keys(index, carry):
            step, turn = carry
            batch, tile, kv_head = place = self.by_keys.tile(walk, index)
            first_row = tile * walk.tile + wg * 64
            k_smem, v_smem = (smem[name].at[turn, pl.ds(wg * 64, 64)] for name in ("k", "v"))
            own = walk.of_consumer()
            keep = keeper(own, refs, batch, (first_row, 64))
            bias = biases(own, refs, batch, (first_row, 64))
            for name in ("k", "v"):
                plgpu.barrier_wait(full[name].at[turn])

            def sums(dk, dv):
                memory, keys = (smem, full, free, spare), (k_smem, v_smem, keep, bias)
                end = self.over_queries(refs, memory, place, keys, (dk, dv), step)
                for name in ("k", "v"):
                    plgpu.barrier_arrive(free[name].at[turn])
                return dk[...] * walk.spec.scale, dv[...], end

            widths = (self.shape.width, self.shape.value_width)
            dk, dv, end = spare.zeroed(sums, *((64, x) for x in widths))
            self.hand_out(refs, smem, dk, dv, (wg, batch, first_row, kv_head))
            return end, 1 - turn

        start = (jnp.int32(0), jnp.int32(0))
        self.by_keys.for_tiles(refs, walk, self.ctas, tile_of_keys, start)
        plgpu.wait_smem_to_gmem(0)

    def memory(self):
        smem, full, free = super().memory()
        shape, rows = self.shape, self.walk.tile
        for name, width in (("k", shape.width), ("v", shape.value_width)):
            smem[name] = swizzled((2, rows, width), shape.dtype)
            smem[f"d{name}"] = swizzled((CONSUMERS, 64, width), shape.dtype)
            full[name] = plgpu.Barrier(num_barriers=2)
            free[name] = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=2)
        return smem, full, free


@dataclasses.dataclass(frozen=True)
class KeyValueGradientsAhead(KeyValueGradientsRunning):
    """The kernel for dk and dv, whose scores are a block ahead; for heads of up to 64."""

    def compute(self, refs, smem, full, free):
        walk, tiles, spec = self.walk, self.tiles, self.walk.spec
        dtype, group = self.shape.dtype, self.shape.group
        wg = lax.axis_index("wg")
        mine = pl.ds(wg * 64, 64)
        spare = Spare.of(smem, wg)
        square = plgpu.ACC((64, walk.block), jnp.float32)
        slot_of = lambda step: lax.rem(step, tiles.stages)  # noqa: E731
        self.all_free(free)

        def products(step, turn, scores, rise):
            slot = slot_of(step)
            plgpu.wgmma(scores, smem["k"].at[turn, mine], smem["q"].at[slot].T)
            plgpu.wgmma(rise, smem["v"].at[turn, mine], smem["do"].at[slot].T)

        def await_block(step):
            for name in ("q", "do"):
                plgpu.barrier_wait(full[name].at[slot_of(step)])

        def await_keys(turn):
            for name in ("k", "v"):
                plgpu.barrier_wait(full[name].at[turn])

        def tile_of_keys(index, carry):
            first, turn, after, scores, rise = carry
            batch, tile, kv_head = place = self.by_keys.tile(walk, index)
            first_row = tile * walk.tile + wg * 64
            keep = keeper(walk, refs, batch, (first_row, 64))
            bias = biases(walk, refs, batch, (first_row, 64))
            more = jnp.where(after > 0, 1, 0)
            place_of = lambda member: (batch, tile, kv_head * group + member)  # noqa: E731
            end = self.after(refs, place, first)

            def await_target(step):
                """Waits for what the products of `step`, begun in the step before, read."""

                @pl.when((step <= end) & (step < end + more))
                def _():
                    await_block(step)

                @pl.when((step == end) & (after > 0))
                def _():
                    await_keys(1 - turn)

            await_target(first + 1)

            def sums(dk, dv):
                def one(position, carry, ends, place):
                    step, scores, rise = carry
                    slot = slot_of(step)
                    visible = (lambda: None) if ends is None else keep(place, position, ends)
                    added = bias(place, position)
                    lse = plgpu.load(smem["stats"].at[slot, 0], layout=COLUMN)
                    delta = plgpu.load(smem["stats"].at[slot, 1], layout=COLUMN)
                    powers, slope = exponents(scores, lse, spec, visible(), 1, added())
                    rise = rise - along(delta, rise.shape, 1)
                    powers, rise = lax.optimization_barrier((powers, rise))

                    def run(next_scores, next_rise):
                        following = jnp.where(step + 1 < end, turn, 1 - turn)
                        products(step + 1, following, next_scores, next_rise)

                        @pl.when(step + 1 < end)
                        def _():
                            await_target(step + 2)

                        weights = jnp.exp2(powers)
                        spare.add(dv, weights.astype(dtype), smem["do"].at[slot])
                        dscores = weights * rise
                        if slope is not None:
                            dscores = dscores * slope
                        spare.add(dk, dscores.astype(dtype), smem["q"].at[slot])
                        found = plgpu.wgmma_accumulator_load(next_rise, wait_n=0)
                        return plgpu.wgmma_accumulator_load(next_scores, wait_n=0), found

                    scores, rise = pl.run_scoped(run, square, square)
                    for name in ("q", "do"):
                        plgpu.barrier_arrive(free[name].at[slot])
                    return step + 1, scores, rise

                def head_steps(member, carry):
                    place = place_of(member)
                    for start, stop, ends in walk.parts(walk.bounds(place, refs)):
                        body = functools.partial(one, ends=ends, place=place)
                        carry = lax.fori_loop(start, stop, body, carry)
                    return carry

                carry = (first, scores, rise)
                _, next_scores, next_rise = lax.fori_loop(0, group, head_steps, carry)
                for name in ("k", "v"):
                    plgpu.barrier_arrive(free[name].at[turn])
                return dk[...] * spec.scale, dv[...], next_scores, next_rise

            widths = (self.shape.width, self.shape.value_width)
            dk, dv, *ahead = spare.zeroed(sums, *((64, x) for x in widths))
            self.hand_out(refs, smem, dk, dv, (wg, batch, first_row, kv_head))
            return end, 1 - turn, after - 1, *ahead

        await_keys(0)
        await_block(jnp.int32(0))

        def begin(scores, rise):
            products(jnp.int32(0), 0, scores, rise)
            rise = plgpu.wgmma_accumulator_load(rise, wait_n=0)
            return plgpu.wgmma_accumulator_load(scores, wait_n=0), rise

        ahead = pl.run_scoped(begin, square, square)
        start = (jnp.int32(0), jnp.int32(0), self.by_keys.share(refs, walk, self.ctas) - 1, *ahead)
        self.by_keys.for_tiles(refs, walk, self.ctas, tile_of_keys, start)
        plgpu.wait_smem_to_gmem(0)


@dataclasses.dataclass(frozen=True)
class SplitAhead(SplitKeyValueGradients):
    """The kernel for dk and dv of wide heads, both of whose sides multiply a block ahead."""

    def compute(self, refs, smem, full, free):
        batch, tile, kv_head = self.place()
        walk, group = self.walk, self.shape.group
        wg = lax.axis_index("wg")
        spare = Spare.of(smem, wg)
        square = plgpu.ACC((64, walk.block), jnp.float32)
        self.begin(full, free)
        rows = pl.ds(tile * 64, 64)
        place_of = lambda member: (batch, tile, kv_head * group + member)  # noqa: E731
        end = self.after(refs, (batch, tile, kv_head), jnp.int32(0))

        def of(role, operands, out_name, width):
            own, other = operands  # of the product that is ahead
            keep, bias = self.pairs_of(refs, (batch, tile), out_name)

            def multiply(step, acc):
                slot = lax.rem(step, self.tiles.stages)
                plgpu.wgmma(acc, smem[own], smem[other].at[slot].T)

            def begin(acc):
                plgpu.barrier_wait(full[other].at[0])
                multiply(jnp.int32(0), acc)
                return plgpu.wgmma_accumulator_load(acc, wait_n=0)

            def sums(acc):
                def one(position, carry, place, ends):
                    step, found = carry
                    seen = keep and ends and functools.partial(keep, place, position, ends)
                    added = bias and functools.partial(bias, place, position)
                    memory = (smem, full, free, spare)
                    finish, prepared = role(memory, (seen, added), step, found)

                    def run(ahead):
                        @pl.when(step + 1 < end)
                        def _():
                            slot = lax.rem(step + 1, self.tiles.stages)
                            plgpu.barrier_wait(full[other].at[slot])

                        multiply(step + 1, ahead)
                        finish(acc, prepared)
                        return plgpu.wgmma_accumulator_load(ahead, wait_n=0)

                    found = pl.run_scoped(run, square)
                    slot = lax.rem(step, self.tiles.stages)
                    for name in ("q", "do"):
                        plgpu.barrier_arrive(free[name].at[slot])
                    return step + 1, found

                def head_steps(member, carry):
                    place = place_of(member)
                    for start, stop, ends in walk.parts(walk.bounds(place, refs)):
                        body = functools.partial(one, place=place, ends=ends)
                        carry = lax.fori_loop(start, stop, body, carry)
                    return carry

                carry = (jnp.int32(0), pl.run_scoped(begin, square))
                lax.fori_loop(0, group, head_steps, carry)
                return acc[...]

            found = spare.zeroed(sums, (64, width))
            self.leave(refs, smem, full, found, out_name, (batch, rows, kv_head))

        @pl.when(wg == 0)
        def _():
            of(self.values, ("k", "q"), "dv", self.shape.value_width)
            drain({"weights": free["weights"]})

        @pl.when(wg == 1)
        def _():
            for slot in range(2):
                plgpu.barrier_arrive(free["weights"].at[slot])
            of(self.keys, ("v", "do"), "dk", self.shape.width)

    def values(self, memory, pairs, step, scores):
        """What to do beside the next product of the side that holds dv, and with what."""
        smem, full, free, spare = memory
        spec, dtype = self.walk.spec, self.shape.dtype
        slot, way = lax.rem(step, self.tiles.stages), lax.rem(step, 2)
        keep, bias = pairs
        visible, added = (lambda: None) if keep is None else keep(), bias()
        lse = plgpu.load(smem["stats"].at[slot, 0], layout=COLUMN)
        powers, slope = exponents(scores, lse, spec, visible(), 1, added())

        def finish(dv, prepared):
            powers, slope = prepared
            plgpu.barrier_wait(free["weights"].at[way])
            weights = jnp.exp2(powers)
            passed = weights if slope is None else weights * slope
            smem["weights"].at[way][...] = passed.astype(dtype)
            plgpu.commit_smem()
            plgpu.barrier_arrive(full["weights"].at[way])
            plgpu.barrier_wait(full["do"].at[slot])
            spare.add(dv, weights.astype(dtype), smem["do"].at[slot])

        return finish, lax.optimization_barrier((powers, slope))

    def keys(self, memory, pairs, step, rise):
        """What to do beside the next product of the side that holds dk, and with what."""
        del pairs
        smem, full, free, spare = memory
        slot, way = lax.rem(step, self.tiles.stages), lax.rem(step, 2)
        plgpu.barrier_wait(full["q"].at[slot])
        delta = plgpu.load(smem["stats"].at[slot, 1], layout=COLUMN)
        rise = rise - along(delta, rise.shape, 1)

        def finish(dk, rise):
            plgpu.barrier_wait(full["weights"].at[way])
            weights = plgpu.load(smem["weights"].at[way], layout=SQUARE).astype(jnp.float32)
            plgpu.barrier_arrive(free["weights"].at[way])
            spare.add(dk, (weights * rise).astype(self.shape.dtype), smem["q"].at[slot])

        return finish, lax.optimization_barrier(rise)
