# Types of jax's Mosaic GPU objects are not public.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
"""The Hopper forward: one warpgroup loads, two compute (Pallas, Mosaic GPU backend).

A tile is `consumers * block_q` rows of one query head. The memory warpgroup brings q once and the
key and value blocks in turn into shared memory with TMA; each consumer warpgroup holds its rows'
output in registers and walks over the blocks from the last to the first, so that the blocks which
need a mask come first under a causal mask. Inside of a consumer the scores of the next block are
multiplied while the softmax of this one runs.
"""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention.pieces import (
    CONSUMERS,
    LOG2E,
    ROW,
    Shape,
    Spare,
    along,
    biases,
    capped,
    drain,
    keeper,
    swizzled,
)
from pallas_kernels.flash_attention.problem import Spec
from pallas_kernels.flash_attention.ranges import BOTH, HIGH, Walk
from pallas_kernels.warpgroups import roles

__all__ = ["Forward", "Softmax", "Tiles"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """How the forward is cut and scheduled; any choice gives the same result up to rounding.

    Attributes:
      block_q: rows of one consumer warpgroup, a multiple of 64.
      block_kv: keys of one step, a multiple of 64 (32 and 16 also lower).
      stages: key and value blocks in flight.
      persistent: as many programs as processors, each walking over many tiles.
      share: the output leaves through q's memory, where there is no room for its own; the next
        tile's q then comes later. Needs H = Hv.
      ahead: scores are multiplied a block before their softmax, see `ForwardAhead`; for heads of up
        to 64, with three stages or more, and not with `share`.
      own: each consumer has a list of its own under a block map, in steps of 64 keys.
      joined: a tile's first scores are multiplied at the end of the tile before; for heads of up to
        128, not with `share`.
      by_data: which programs take which tiles of packed documents is found on the device.
    """

    block_q: int = 64
    block_kv: int = 128
    stages: int = 2
    persistent: bool = True
    share: bool = False
    ahead: bool = False
    own: bool = False
    joined: bool = False
    by_data: bool = False

    def __post_init__(self):
        if self.ahead and (self.stages < 3 or self.share):  # fewer stages would wait for ever
            raise ValueError(f"flash_attention: tiles ahead need three stages and no share: {self}")
        if self.ahead + self.own + self.joined + (self.share and (self.own or self.joined)) > 1:
            raise ValueError(
                f"flash_attention: tiles are ahead, own or joined, not with share: {self}"
            )


@dataclasses.dataclass(frozen=True)
class Softmax:
    """The online softmax of one consumer's rows; statistics in units of log2 e.

    Attributes:
      fixed: the soft-cap bounds the scores so well that no peak is needed.
    """

    spec: Spec
    fixed: bool = False

    @classmethod
    def of(cls, spec: Spec, dtype, names: tuple[str, ...]) -> Softmax:
        """The form for a call with the extras of these names."""
        bounded = spec.softcap is not None and spec.softcap <= _BOUNDED
        bounded = bounded and spec.bias is None and not {"sinks", "alibi_slopes"} & set(names)
        return cls(spec, bounded and dtype == jnp.bfloat16)

    def step(self, scores, peak, total, keep, bias=None):
        """(weights, peak, total, factor of what was summed before or None for 1)."""
        powers, peak, decay = self.shifted(scores, peak, keep, bias)
        weights, total = self.summed(powers, total, decay)
        return weights, peak, total, decay

    def shifted(self, scores, peak, keep, bias=None):
        """(exponents of 2, peak, factor of what was summed before or None for 1)."""
        scores, factor = capped(scores, self.spec.scale, self.spec.softcap)
        if bias is not None:
            scores, factor = scores * factor + bias, 1.0
        if self.fixed:
            powers = scores * factor
            return powers if keep is None else jnp.where(keep, powers, -jnp.inf), peak, None
        if keep is not None:
            scores = jnp.where(keep, scores, -jnp.inf)
        new_peak = jnp.maximum(peak, jnp.max(scores, axis=1) * factor)
        base = new_peak
        hidden = keep is not None or self.spec.bias is not None
        if hidden:  # a row may have seen nothing yet
            base = jnp.where(new_peak == -jnp.inf, 0.0, new_peak)
        return scores * factor - along(base, scores.shape, 0), new_peak, jnp.exp2(peak - base)

    def summed(self, powers, total, decay):
        """(weights, total) from what `shifted` gave."""
        weights = jnp.exp2(powers)
        total = total if decay is None else total * decay
        return weights, total + jnp.sum(weights, axis=1)


_BOUNDED = 60.0  # e^60 times a million keys and their values stays far from float32's end


@dataclasses.dataclass(frozen=True)
class Forward:
    """One compiled kernel: static facts of a call and its tiles."""

    shape: Shape
    walk: Walk
    tiles: Tiles
    ctas: int

    # ---- the warpgroup that loads -------------------------------------------------------------

    def load(self, refs, smem, full, free):
        def tile(index, step):
            place, q = self.shape.tile(self.walk, index), (smem["q"], full["q"], free["q"])
            return self.bring(refs, (smem, full, free), place, q, step)

        self.shape.for_tiles(refs, self.walk, self.ctas, tile, jnp.int32(0))
        drain(free)

    def bring(self, refs, memory, place, q, step):
        """Copies the queries of a tile, to `q` with its barriers, and its keys; the step after."""
        (smem, full, free), (batch, row, head) = memory, place
        rows, keys = self.walk.tile, self.walk.block
        kv_head = lax.div(head, self.shape.group)
        place = (batch, row, head)
        low, _, _, high = self.walk.bounds(place, refs)
        q_smem, q_full, q_free = q

        def bring(name, block, slot):
            plgpu.barrier_wait(free[name].at[slot])
            where = refs[name].at[batch, pl.ds(block * keys, keys), kv_head]
            plgpu.copy_gmem_to_smem(where, smem[name].at[slot], full[name].at[slot])

        def one(i, _):
            slot = lax.rem(step + i, self.tiles.stages)
            block = self.walk.block_at(place, high - 1 - i, refs)
            bring("k", block, slot)

            @pl.when(i == 0)
            def _():
                plgpu.barrier_wait(q_free)
                where = refs["q"].at[batch, pl.ds(row * rows, rows), head]
                plgpu.copy_gmem_to_smem(where, q_smem, q_full)

            bring("v", block, slot)

        lax.fori_loop(0, high - low, one, None)
        return step + (high - low)

    # ---- the warpgroups that compute ----------------------------------------------------------

    def start(self, refs, batch, head, *, fixed: bool):
        """Peak and sum of the softmax before any key: nothing, or the head's sink."""
        vector = functools.partial(jnp.full, (self.tiles.block_q,), dtype=jnp.float32)
        peak, total = vector(0.0 if fixed else -jnp.inf), vector(0.0)
        if "sinks" in self.walk.names:
            peak, total = vector(0.0) + refs["sinks"][batch, head] * LOG2E, vector(1.0)
        return plgpu.layout_cast(peak, ROW), plgpu.layout_cast(total, ROW)

    def compute(self, refs, smem, full, free):
        tiles, walk = self.tiles, self.walk
        wg = lax.axis_index("wg")
        q_smem = smem["q"].at[pl.ds(wg * tiles.block_q, tiles.block_q)]
        form = (walk.spec, self.shape.dtype, walk.names)
        softmax, spare = Softmax.of(*form), Spare.of(smem, wg)
        shape = (tiles.block_q, tiles.block_kv)

        for name in ("k", "v"):
            for slot in range(tiles.stages):
                plgpu.barrier_arrive(free[name].at[slot])
        plgpu.barrier_arrive(free["q"])

        def tile(index, step):
            batch, row, head = self.shape.tile(self.walk, index)
            first_row = row * walk.tile + wg * tiles.block_q
            place = (batch, row, head)
            bounds = walk.bounds(place, refs)
            low, high = bounds[0], bounds[-1]
            keep = keeper(walk, refs, batch, (first_row, tiles.block_q))
            bias = biases(walk, refs, batch, (first_row, tiles.block_q))
            slot_of = lambda i: lax.rem(step + i, tiles.stages)  # noqa: E731
            start = self.start(refs, batch, head, fixed=softmax.fixed)

            def seen(i, ends):
                return (lambda: None) if ends is None else keep(place, high - 1 - i, ends)

            def await_keys(i):
                """Waits for the keys of step i, if there is one.

                It stands before the wait for the products: the branch keeps the assembler from
                moving the softmax behind that wait, where nothing would run beside it.
                """

                @pl.when(i < high - low)
                def _():
                    plgpu.barrier_wait(full["k"].at[slot_of(i)])

            def first():
                """The last block, which nothing runs beside."""
                slot = slot_of(0)
                plgpu.barrier_wait(full["q"])
                ends = (HIGH if walk.last_is_high else BOTH) if walk.masked else None
                visible, added = seen(0, ends), bias(place, high - 1)
                await_keys(0)

                def product(scores):
                    plgpu.wgmma(scores, q_smem, smem["k"].at[slot].T)
                    return scores[...]

                scores = pl.run_scoped(product, plgpu.ACC(shape, jnp.float32))
                plgpu.barrier_arrive(free["k"].at[slot])
                weights, peak, total, _ = softmax.step(scores, *start, visible(), added())
                await_keys(1)
                return peak, total, weights.astype(self.shape.dtype)

            def walk_blocks(acc):
                """Sums over the blocks; returns them with peak and total."""

                def other(i, carry, ends):
                    """Block high - 1 - i: its scores, and the product of the block before."""
                    peak, total, weights = carry
                    slot, before = slot_of(i), slot_of(i - 1)
                    visible, added = seen(i, ends), bias(place, high - 1 - i)

                    def products(scores):
                        plgpu.wgmma(scores, q_smem, smem["k"].at[slot].T)
                        plgpu.barrier_wait(full["v"].at[before])
                        spare.add(acc, weights, smem["v"].at[before])
                        return plgpu.wgmma_accumulator_load(scores, wait_n=1)

                    scores = pl.run_scoped(products, plgpu.ACC(shape, jnp.float32))
                    plgpu.barrier_arrive(free["k"].at[slot])
                    weights, *rest = softmax.step(scores, peak, total, visible(), added())
                    weights, peak, total, decay = lax.optimization_barrier((weights, *rest))
                    await_keys(i + 1)
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(free["v"].at[before])
                    if decay is not None:
                        acc[...] = acc[...] * along(decay, acc.shape, 0)
                    return peak, total, weights.astype(self.shape.dtype)

                carry, done = first(), jnp.int32(1)
                for low_block, _, ends in reversed(walk.parts(bounds)):
                    end = jnp.maximum(high - low_block, done)
                    carry = lax.fori_loop(done, end, functools.partial(other, ends=ends), carry)
                    done = end
                peak, total, weights = carry
                if not tiles.share:
                    plgpu.barrier_arrive(free["q"])
                slot = slot_of(high - low - 1)
                plgpu.barrier_wait(full["v"].at[slot])
                spare.add(acc, weights, smem["v"].at[slot])
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(free["v"].at[slot])
                return acc[...], peak, total

            of_sums = (tiles.block_q, self.shape.value_width)
            sums = spare.zeroed(walk_blocks, of_sums)
            o_smem = q_smem if tiles.share else smem["o"].at[wg]
            self.finish(refs, o_smem, smem["lse"].at[wg], (batch, first_row, head), sums)
            if tiles.share:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(free["q"])
            return step + (high - low)

        self.shape.for_tiles(refs, self.walk, self.ctas, tile, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    def finish(self, refs, o_smem, lse_smem, place, sums):
        """Divides by the softmax's sum and stores the tile and its log-sum."""
        batch, first_row, head = place
        out, peak, total = sums
        rows = pl.ds(first_row, self.tiles.block_q)
        some = total > 0.0
        inverse = jnp.where(some, 1.0 / total, 0.0)
        lse = jnp.where(some, peak * (1.0 / LOG2E) + jnp.log(total), -jnp.inf)
        if not self.tiles.share:  # the tile before may still be on its way out
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        o_smem[...] = (out * along(inverse, out.shape, 0)).astype(self.shape.dtype)
        lse_smem[...] = lse
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(o_smem, refs["o"].at[batch, rows, head], commit_group=False)
        plgpu.copy_smem_to_gmem(lse_smem, refs["lse"].at[batch, head, rows], commit_group=False)
        plgpu.commit_smem_to_gmem_group()

    # ---- the kernel ---------------------------------------------------------------------------

    def memory(self):
        """(shared memory, barriers of what came, barriers of what may be overwritten)."""
        tiles = self.tiles
        stages, width, value_width = tiles.stages, self.shape.width, self.shape.value_width
        smem = {
            "q": swizzled((CONSUMERS * tiles.block_q, width), self.shape.dtype),
            "k": swizzled((stages, tiles.block_kv, width), self.shape.dtype),
            "v": swizzled((stages, tiles.block_kv, value_width), self.shape.dtype),
            "lse": plgpu.SMEM((CONSUMERS, tiles.block_q), jnp.float32),
        }
        square = (tiles.block_q, tiles.block_kv)
        sums = (tiles.block_q, value_width)
        smem |= Spare.kinds(self.shape, square, sums)
        if not tiles.share:
            smem["o"] = swizzled((CONSUMERS, tiles.block_q, value_width), self.shape.dtype)
        full = {"q": plgpu.Barrier(), "k": None, "v": None}
        free = {"q": plgpu.Barrier(num_arrivals=CONSUMERS), "k": None, "v": None}
        for name in ("k", "v"):
            full[name] = plgpu.Barrier(num_barriers=stages)
            free[name] = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages)
        return smem, full, free

    def body(self, refs):
        roles(self, refs, *self.memory())
