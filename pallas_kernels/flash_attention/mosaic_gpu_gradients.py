# Types of jax's Mosaic GPU objects are not public.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
"""The Hopper backward: one kernel for dk and dv, one for dq (Pallas, Mosaic GPU backend).

Both recompute the softmax from the forward's log-sum, so nothing of size T x S is ever stored. The
first owns a tile of keys and walks over the queries (of every query head of the kv head, so that
no sum over heads is left); the second owns a tile of queries and walks over the keys. Each output
has one owner and one order of sums: the result is the same bits in every run (of
`mosaic_gpu_one_pass`, which makes all three in one kernel, dq's is not).
"""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention.pieces import (
    COLUMN,
    CONSUMERS,
    ROW,
    SQUARE,
    Shape,
    Spare,
    along,
    biases,
    capped,
    drain,
    keeper,
    pass_over,
    swizzled,
)
from pallas_kernels.flash_attention.problem import Spec
from pallas_kernels.flash_attention.ranges import Walk
from pallas_kernels.warpgroups import roles

__all__ = [
    "BackwardTiles",
    "KeyValueGradients",
    "QueryGradients",
    "SplitKeyValueGradients",
    "exponents",
    "weighted",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackwardTiles:
    """How the kernels are cut: two, or one with `one_pass`.

    Attributes:
      block_q, stages: of the kernel for dk and dv: queries of a step, steps in flight.
      split: dk and dv of one tile of keys belong to one warpgroup each, which pass the softmax's
        weights between them; for heads too wide for the registers of one.
      dq_block_kv, dq_stages, dq_value_stages: of the kernel for dq: keys of a step, blocks of keys
        and of values in flight.
      persistent: dq runs as many programs as processors.
      share: dq leaves through q's memory.
      delta: dq also makes delta, the sum over a row of out times its gradient, for dk and dv; else
        XLA does before both.
      opaque: dq finds where q lies anew in each step, so that wide heads' descriptors need no
        registers.
      running: dk and dv run as many programs as processors; for heads of up to 64.
      keys_ahead: their scores are multiplied a block before their weights are made; with `running`,
        or with `split`.
      by_data: which programs take which tiles of packed documents is found on the device.
      one_pass: the kernel for dk and dv adds up dq too, in the order in which its programs come to
        it, so that dq's last bits differ between runs; for heads of 128, without `delta`, `split`
        and `running`.
    """

    block_q: int = 64
    stages: int = 2
    dq_block_kv: int = 64
    dq_stages: int = 3
    dq_value_stages: int = 3
    persistent: bool = True
    split: bool = False
    share: bool = False
    delta: bool = False
    opaque: bool = False
    running: bool = False
    keys_ahead: bool = False
    by_data: bool = False
    one_pass: bool = False


def exponents(scores, lse, spec: Spec, keep, dim: int, bias=None):
    """(exponents of 2 of a block's softmax weights, d score / d capped score or None)."""
    scores, factor = capped(scores, spec.scale, spec.softcap)
    powers = scores * factor if bias is None else scores * factor + bias
    powers = powers - along(lse, scores.shape, dim)
    if keep is not None:
        powers = jnp.where(keep, powers, -jnp.inf)
    return powers, None if spec.softcap is None else 1.0 - scores * scores


def weighted(scores, lse, spec: Spec, keep, dim: int, bias=None):
    """(softmax weights, d score / d capped score or None) of a block."""
    powers, slope = exponents(scores, lse, spec, keep, dim, bias)
    return jnp.exp2(powers), slope


@dataclasses.dataclass(frozen=True)
class KeyValueGradients:
    """The kernel for dk and dv; a program owns CONSUMERS * 64 keys of one kv head."""

    shape: Shape
    walk: Walk  # transposed
    tiles: BackwardTiles

    def place(self):
        """(sequence, tile of keys, kv head)."""
        return lax.axis_index("batch"), lax.axis_index("tile"), lax.axis_index("head")

    def load(self, refs, smem, full, free):
        batch, tile, kv_head = self.place()
        keys = pl.ds(tile * self.walk.tile, self.walk.tile)
        for name in ("k", "v"):
            plgpu.copy_gmem_to_smem(refs[name].at[batch, keys, kv_head], smem[name], full[name])
        self.bring_queries(refs, (smem, full, free), (batch, tile, kv_head), jnp.int32(0))
        drain({name: free[name] for name in ("q", "do")})

    def bring_queries(self, refs, memory, place, step):
        """Copies the queries of a tile of keys, of all heads of its kv head; the step after."""
        smem, full, free = memory
        batch, tile, kv_head = place
        walk, group = self.walk, self.shape.group

        def head_steps(member, step):
            head = kv_head * group + member
            place = (batch, tile, head)
            low, _, _, high = walk.bounds(place, refs)

            def one(i, _):
                slot = lax.rem(step + i - low, self.tiles.stages)
                block = walk.block_at(place, self.turned(i, low, high), refs)
                queries = pl.ds(block * walk.block, walk.block)
                plgpu.barrier_wait(free["q"].at[slot])
                for i, name in enumerate(("lse", "delta")):
                    where, there = refs[name].at[batch, head, queries], smem["stats"].at[slot, i]
                    plgpu.copy_gmem_to_smem(where, there, full["q"].at[slot])
                for name in ("q", "do"):
                    if name == "do":
                        plgpu.barrier_wait(free["do"].at[slot])
                    where = refs[name].at[batch, queries, head]
                    plgpu.copy_gmem_to_smem(where, smem[name].at[slot], full[name].at[slot])

            lax.fori_loop(low, high, one, None)
            return step + (high - low)

        return lax.fori_loop(0, group, head_steps, step)

    def turned(self, i, first, end):
        """Which of the blocks from `first` to before `end` comes as the one of this index."""
        del first, end
        return i

    def begin(self, full, free):
        """All slots of queries are free; waits for the keys and values."""
        for name in ("q", "do"):
            for slot in range(self.tiles.stages):
                plgpu.barrier_arrive(free[name].at[slot])
        for name in ("k", "v"):
            plgpu.barrier_wait(full[name])

    def after(self, refs, place, step):
        """The step after those of a tile of keys (sequence, tile, kv head)."""
        batch, tile, kv_head = place

        def more(member, step):
            head = kv_head * self.shape.group + member
            bounds = self.walk.bounds((batch, tile, head), refs)
            return step + bounds[-1] - bounds[0]

        return lax.fori_loop(0, self.shape.group, more, step)

    def compute(self, refs, smem, full, free):
        dtype = self.shape.dtype
        batch, tile, kv_head = place = self.place()
        wg = lax.axis_index("wg")
        spare = Spare.of(smem, wg)
        first_row = tile * self.walk.tile + wg * 64
        k_smem, v_smem = (smem[name].at[pl.ds(wg * 64, 64)] for name in ("k", "v"))
        own = self.walk.of_consumer()
        keep = keeper(own, refs, batch, (first_row, 64))
        bias = biases(own, refs, batch, (first_row, 64))
        self.begin(full, free)

        def sums(dk, dv):
            pairs, memory = (keep, bias), (smem, full, free, spare)
            keys = (k_smem, v_smem, *pairs)
            self.over_queries(refs, memory, place, keys, (dk, dv), jnp.int32(0))
            return dk[...] * self.walk.spec.scale, dv[...]

        widths = (self.shape.width, self.shape.value_width)
        dk, dv = spare.zeroed(sums, *((64, x) for x in widths))
        rows = pl.ds(first_row, 64)
        k_smem[...] = dk.astype(dtype)
        v_smem[...] = dv.astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k_smem, refs["dk"].at[batch, rows, kv_head])
        plgpu.copy_smem_to_gmem(v_smem, refs["dv"].at[batch, rows, kv_head])
        plgpu.wait_smem_to_gmem(0)

    def over_queries(self, refs, memory, place, keys, sums, step):
        """Adds to the sums (dk, dv) of 64 keys what all their queries give; the step after.

        keys: their shared memory, their values', who sees them, and what is added to the scores.
        """
        smem, full, free, spare = memory
        k_smem, v_smem, keep, bias = keys
        (batch, tile, kv_head), (dk, dv) = place, sums
        walk, tiles, spec, dtype = self.walk, self.tiles, self.walk.spec, self.shape.dtype
        own = walk.of_consumer()
        skip = functools.partial(pass_over, full, free, dict.fromkeys(("q", "do"), tiles.stages))

        def one(index, step, ends, place, first):
            position = own.entry(place, index, refs)
            if walk.own:
                wanted = first + own.arrival(position)
                skip((step, wanted))
                step = wanted
            slot = lax.rem(step, tiles.stages)
            q_smem, do_smem = smem["q"].at[slot], smem["do"].at[slot]
            visible = (lambda: None) if ends is None else keep(place, position, ends)
            added = bias(place, position)
            plgpu.barrier_wait(full["q"].at[slot])

            def products(scores, dweights):
                plgpu.wgmma(scores, k_smem, q_smem.T)
                plgpu.barrier_wait(full["do"].at[slot])
                plgpu.wgmma(dweights, v_smem, do_smem.T)
                lse = plgpu.load(smem["stats"].at[slot, 0], layout=COLUMN)
                scores = plgpu.wgmma_accumulator_load(scores, wait_n=1)
                weights, slope = weighted(scores, lse, spec, visible(), 1, added())
                spare.add(dv, weights.astype(dtype), do_smem)
                delta = plgpu.load(smem["stats"].at[slot, 1], layout=COLUMN)
                rise = plgpu.wgmma_accumulator_load(dweights, wait_n=1)
                dscores = weights * (rise - along(delta, rise.shape, 1))
                if slope is not None:
                    dscores = dscores * slope
                spare.add(dk, dscores.astype(dtype), q_smem)
                plgpu.wgmma_wait(1)
                plgpu.barrier_arrive(free["do"].at[slot])
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(free["q"].at[slot])

            square = plgpu.ACC((64, walk.block), jnp.float32)
            pl.run_scoped(products, square, square)
            return step + 1

        def head_steps(member, step):
            place = (batch, tile, kv_head * self.shape.group + member)
            first = step
            for start, end, ends in own.parts(own.bounds(place, refs)):
                body = functools.partial(one, ends=ends, place=place, first=first)
                step = lax.fori_loop(start, end, body, step)
            if walk.own:
                end = first + walk.bounds(place, refs)[-1]
                skip((step, end))
                step = end
            return step

        return lax.fori_loop(0, self.shape.group, head_steps, step)

    def memory(self):
        """(shared memory, barriers of what came, barriers of what may be overwritten)."""
        shape, stages, block = self.shape, self.tiles.stages, self.walk.block
        smem = {
            "k": swizzled((self.walk.tile, shape.width), shape.dtype),
            "v": swizzled((self.walk.tile, shape.value_width), shape.dtype),
            "q": swizzled((stages, block, shape.width), shape.dtype),
            "do": swizzled((stages, block, shape.value_width), shape.dtype),
            "stats": plgpu.SMEM((stages, 2, block), jnp.float32),
        }
        sums = ((64, shape.width), (64, shape.value_width))
        smem |= Spare.kinds(shape, (64, block), *sums)
        full = {
            "k": plgpu.Barrier(),
            "v": plgpu.Barrier(),
            "q": plgpu.Barrier(num_arrivals=3, num_barriers=stages),
            "do": plgpu.Barrier(num_barriers=stages),
        }
        ring = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages)
        return smem, full, {"q": ring, "do": ring}

    def body(self, refs):
        roles(self, refs, *self.memory())


@dataclasses.dataclass(frozen=True)
class QueryGradients:
    """The kernel for dq; a tile is CONSUMERS * 64 queries of one head."""

    shape: Shape
    walk: Walk
    tiles: BackwardTiles
    ctas: int

    @property
    def of_rows(self) -> tuple[str, ...]:
        """Arrays of which a tile has its rows."""
        return ("q", "do", "o") if self.tiles.delta else ("q", "do")

    def statistics(self, refs, smem, mine, rows):
        """Log-sums and deltas of a warpgroup's rows; `rows` is where these stand in an array."""
        lse, delta = (plgpu.load(smem["stats"].at[i, mine], layout=ROW) for i in range(2))
        if self.tiles.delta:
            do, out = (
                plgpu.load(smem[name].at[mine], layout=SQUARE).astype(jnp.float32)
                for name in ("do", "o")
            )
            delta = jnp.sum(do * out, axis=1) - delta
            there = smem["stats"].at[1, mine]
            there[...] = delta
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(there, refs["delta"].at[rows])
        return lse, delta

    @property
    def stages(self) -> dict[str, int]:
        return {"k": self.tiles.dq_stages, "v": self.tiles.dq_value_stages}

    def load(self, refs, smem, full, free):
        walk = self.walk

        def tile(index, step):
            batch, row, head = self.shape.tile(walk, index)
            kv_head = lax.div(head, self.shape.group)
            place = (batch, row, head)
            low, _, _, high = walk.bounds(place, refs)

            def bring(name, block, slot):
                slot = lax.rem(slot, self.stages[name])
                plgpu.barrier_wait(free[name].at[slot])
                where = refs[name].at[batch, pl.ds(block * walk.block, walk.block), kv_head]
                plgpu.copy_gmem_to_smem(where, smem[name].at[slot], full[name].at[slot])

            def one(i, _):
                block = walk.block_at(place, i, refs)
                bring("k", block, step + i - low)

                @pl.when(i == low)
                def _():
                    plgpu.barrier_wait(free["q"])
                    queries = pl.ds(row * walk.tile, walk.tile)
                    for name in self.of_rows:
                        where = refs[name].at[batch, queries, head]
                        plgpu.copy_gmem_to_smem(where, smem[name], full["q"])
                    for i, name in enumerate(("lse", "dlse" if self.tiles.delta else "delta")):
                        where = refs[name].at[batch, head, queries]
                        plgpu.copy_gmem_to_smem(where, smem["stats"].at[i], full["q"])

                bring("v", block, step + i - low)

            lax.fori_loop(low, high, one, None)
            return step + (high - low)

        self.shape.for_tiles(refs, walk, self.ctas, tile, jnp.int32(0))
        drain(free)

    def compute(self, refs, smem, full, free):
        walk, tiles, spec = self.walk, self.tiles, self.walk.spec
        dtype, own = self.shape.dtype, walk.of_consumer()
        wg = lax.axis_index("wg")
        spare = Spare.of(smem, wg)
        mine = pl.ds(wg * 64, 64)
        q_smem, do_smem = smem["q"].at[mine], smem["do"].at[mine]

        def q_and_do(i):
            if not tiles.opaque:
                return q_smem, do_smem
            here = pl.ds((wg + lax.optimization_barrier(i - i)) * 64, 64)
            return smem["q"].at[here], smem["do"].at[here]

        for name, stages in self.stages.items():
            for slot in range(stages):
                plgpu.barrier_arrive(free[name].at[slot])
        plgpu.barrier_arrive(free["q"])

        def tile(index, step):
            batch, row, head = self.shape.tile(walk, index)
            first_row = row * walk.tile + wg * 64
            place = (batch, row, head)
            bounds = walk.bounds(place, refs)
            low, high = bounds[0], bounds[-1]
            keep = keeper(own, refs, batch, (first_row, 64))
            bias = biases(own, refs, batch, (first_row, 64))
            plgpu.barrier_wait(full["q"])
            lse, delta = self.statistics(refs, smem, mine, (batch, head, pl.ds(first_row, 64)))

            def sums(dq):
                def one(i, done, ends):
                    i = own.entry(place, i, refs)
                    come = step + own.arrival(i) if walk.own else step + i - low
                    if walk.own:
                        pass_over(full, free, self.stages, (done, come))
                    slot = lax.rem(come, tiles.dq_stages)
                    v_slot = lax.rem(come, tiles.dq_value_stages)
                    k_smem, v_smem = smem["k"].at[slot], smem["v"].at[v_slot]
                    q_smem, do_smem = q_and_do(i)
                    visible = (lambda: None) if ends is None else keep(place, i, ends)
                    added = bias(place, i)
                    plgpu.barrier_wait(full["k"].at[slot])

                    def products(scores, dweights):
                        plgpu.wgmma(scores, q_smem, k_smem.T)
                        plgpu.barrier_wait(full["v"].at[v_slot])
                        plgpu.wgmma(dweights, do_smem, v_smem.T)
                        scores = plgpu.wgmma_accumulator_load(scores, wait_n=1)
                        weights, slope = weighted(scores, lse, spec, visible(), 0, added())
                        rise = plgpu.wgmma_accumulator_load(dweights, wait_n=0)
                        plgpu.barrier_arrive(free["v"].at[v_slot])
                        dscores = weights * (rise - along(delta, rise.shape, 0))
                        if slope is not None:
                            dscores = dscores * slope
                        spare.add(dq, dscores.astype(dtype), k_smem)
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(free["k"].at[slot])

                    square = plgpu.ACC((64, walk.block), jnp.float32)
                    pl.run_scoped(products, square, square)
                    return come + 1 if walk.own else None

                done = step if walk.own else None
                for start, end, ends in own.parts(own.bounds(place, refs) if walk.own else bounds):
                    done = lax.fori_loop(start, end, functools.partial(one, ends=ends), done)
                if walk.own:
                    pass_over(full, free, self.stages, (done, step + high - low))
                if not tiles.share:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of delta
                    plgpu.barrier_arrive(free["q"])
                return dq[...] * spec.scale

            dq = spare.zeroed(sums, (64, self.shape.width))
            dq_smem = q_smem if tiles.share else smem["dq"].at[wg]
            dq_smem[...] = dq.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(dq_smem, refs["dq"].at[batch, pl.ds(first_row, 64), head])
            if tiles.share:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(free["q"])
            return step + (high - low)

        self.shape.for_tiles(refs, walk, self.ctas, tile, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    def body(self, refs):
        shape, stages, walk = self.shape, self.stages, self.walk
        smem = {
            "q": swizzled((walk.tile, shape.width), shape.dtype),
            "do": swizzled((walk.tile, shape.value_width), shape.dtype),
            "stats": plgpu.SMEM((2, walk.tile), jnp.float32),
            "k": swizzled((stages["k"], walk.block, shape.width), shape.dtype),
            "v": swizzled((stages["v"], walk.block, shape.value_width), shape.dtype),
        }
        sums = (64, shape.width)
        smem |= Spare.kinds(shape, (64, walk.block), sums)
        if not self.tiles.share:
            smem["dq"] = swizzled((CONSUMERS, 64, shape.width), shape.dtype)
        if self.tiles.delta:
            smem["o"] = swizzled((walk.tile, shape.value_width), shape.dtype)
        full = {"q": plgpu.Barrier(num_arrivals=len(self.of_rows) + 2)}
        free = {"q": plgpu.Barrier(num_arrivals=CONSUMERS)}
        for name, count in stages.items():
            full[name] = plgpu.Barrier(num_barriers=count)
            free[name] = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=count)
        roles(self, refs, smem, full, free)


@dataclasses.dataclass(frozen=True)
class SplitKeyValueGradients(KeyValueGradients):
    """The kernel for dk and dv of wide heads; a program owns 64 keys of one kv head.

    One warpgroup holds dv and computes the weights; the other holds dk and the weights' gradient.
    The weights (times the soft-cap's slope) pass from the first to the second in shared memory.
    """

    def compute(self, refs, smem, full, free):
        batch, tile, kv_head = self.place()
        wg = lax.axis_index("wg")
        spare = Spare.of(smem, wg)
        self.begin(full, free)
        rows = pl.ds(tile * 64, 64)

        def of(role, out_name, width):
            keep, bias = self.pairs_of(refs, (batch, tile), out_name)

            def sums(acc):
                def head_steps(member, step):
                    place = (batch, tile, kv_head * self.shape.group + member)
                    for start, end, ends in self.walk.parts(self.walk.bounds(place, refs)):
                        seen = keep and ends and functools.partial(keep, place, ends=ends)
                        added = bias and functools.partial(bias, place)
                        memory = (smem, full, free, spare)
                        body = functools.partial(role, acc, memory, (seen, added))
                        step = lax.fori_loop(start, end, body, step)
                    return step

                lax.fori_loop(0, self.shape.group, head_steps, jnp.int32(0))
                return acc[...]

            found = spare.zeroed(sums, (64, width))
            self.leave(refs, smem, full, found, out_name, (batch, rows, kv_head))

        @pl.when(wg == 0)
        def _():
            of(self.values, "dv", self.shape.value_width)
            drain({"weights": free["weights"]})

        @pl.when(wg == 1)
        def _():
            for slot in range(2):
                plgpu.barrier_arrive(free["weights"].at[slot])
            of(self.keys, "dk", self.shape.width)

    def pairs_of(self, refs, place, out_name):
        """Who sees the keys and what is added to the scores; only the side of dv asks, and layout
        inference does not end on what nobody uses."""
        if out_name != "dv":
            return None, None
        batch, tile = place
        return (
            keeper(self.walk, refs, batch, (tile * 64, 64)),
            biases(self.walk, refs, batch, (tile * 64, 64)),
        )

    def leave(self, refs, smem, full, out, out_name, where):
        """Stores a side's sums: dk through K's memory, which the other side reads to its end; dv
        through V's."""
        if out_name == "dk":
            out = out * self.walk.spec.scale
        plgpu.barrier_arrive(full["done"])
        plgpu.barrier_wait(full["done"])
        there = smem[out_name[1:]]
        there[...] = out.astype(self.shape.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(there, refs[out_name].at[where])
        plgpu.wait_smem_to_gmem(0)

    def values(self, dv, memory, pairs, position, step):
        """One step of the side that holds dv; `pairs` say who sees whom, and what is added."""
        smem, full, free, spare = memory
        spec, dtype = self.walk.spec, self.shape.dtype
        slot, way = lax.rem(step, self.tiles.stages), lax.rem(step, 2)
        q_smem, do_smem = smem["q"].at[slot], smem["do"].at[slot]
        shape = (64, self.walk.block)
        keep, bias = pairs
        visible, added = (lambda: None) if keep is None else keep(position), bias(position)
        plgpu.barrier_wait(full["q"].at[slot])

        def product(scores):
            plgpu.wgmma(scores, smem["k"], q_smem.T)
            return scores[...]

        scores = pl.run_scoped(product, plgpu.ACC(shape, jnp.float32))
        lse = plgpu.load(smem["stats"].at[slot, 0], layout=COLUMN)
        weights, slope = weighted(scores, lse, spec, visible(), 1, added())
        plgpu.barrier_arrive(free["q"].at[slot])
        plgpu.barrier_wait(free["weights"].at[way])
        passed = weights if slope is None else weights * slope
        smem["weights"].at[way][...] = passed.astype(dtype)
        plgpu.commit_smem()
        plgpu.barrier_arrive(full["weights"].at[way])
        plgpu.barrier_wait(full["do"].at[slot])
        spare.add(dv, weights.astype(dtype), do_smem)
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(free["do"].at[slot])
        return step + 1

    def keys(self, dk, memory, pairs, position, step):
        """One step of the side that holds dk."""
        del pairs, position
        smem, full, free, spare = memory
        slot, way = lax.rem(step, self.tiles.stages), lax.rem(step, 2)
        q_smem, do_smem = smem["q"].at[slot], smem["do"].at[slot]
        shape = (64, self.walk.block)
        plgpu.barrier_wait(full["do"].at[slot])

        def product(dweights):
            plgpu.wgmma(dweights, smem["v"], do_smem.T)
            return dweights[...]

        rise = pl.run_scoped(product, plgpu.ACC(shape, jnp.float32))
        plgpu.barrier_arrive(free["do"].at[slot])
        plgpu.barrier_wait(full["q"].at[slot])
        delta = plgpu.load(smem["stats"].at[slot, 1], layout=COLUMN)
        plgpu.barrier_wait(full["weights"].at[way])
        weights = plgpu.load(smem["weights"].at[way], layout=SQUARE).astype(jnp.float32)
        plgpu.barrier_arrive(free["weights"].at[way])
        dscores = weights * (rise - along(delta, rise.shape, 1))
        dscores = dscores.astype(self.shape.dtype)
        spare.add(dk, dscores, q_smem)
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(free["q"].at[slot])
        return step + 1

    def memory(self):
        smem, full, free = super().memory()
        shape = self.shape
        smem["weights"] = swizzled((2, 64, self.walk.block), shape.dtype)
        full["weights"] = plgpu.Barrier(num_barriers=2)
        full["done"] = plgpu.Barrier(num_arrivals=CONSUMERS)
        free["weights"] = plgpu.Barrier(num_barriers=2)
        return smem, full, free
