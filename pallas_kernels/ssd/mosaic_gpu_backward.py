# Types of jax's Mosaic GPU objects are not public.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
"""The Hopper backward: two walks over the chunks for their states, then all chunks at once.

The first kernel runs twice: forward over x for the state before each chunk, backward over the
result's gradient for the gradient of the state after it. The second owns a chunk and walks over
heads, so that the gradients of b and c, which heads share, are summed in registers: one consumer
owns the rows of c, the other those of b.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.once import lowered_once
from pallas_kernels.ssd.chunks import Chunks, padded
from pallas_kernels.ssd.mosaic_gpu import (
    LAST,
    SIZE,
    STEPS,
    Sizes,
    decays,
    forgotten,
    given,
    present,
    reach,
    scaled,
)
from pallas_kernels.warpgroups import (
    CONSUMERS,
    ROW,
    SQUARE,
    Spare,
    along,
    drain,
    roles,
    run_kernel,
    swizzled,
)

__all__ = ["backward"]


@dataclasses.dataclass(frozen=True)
class Walk:
    """The kernel for states: S <- held S + (A f) X, chunk by chunk; two heads of a group a program.

    Forward A is b and f what the tokens give; reversed A is c and f what reaches them.
    """

    sizes: Sizes
    names: frozenset[str]
    reverse: bool

    def at(self, i):
        return self.sizes.chunks - 1 - i if self.reverse else i

    def load(self, refs, smem, full, free):
        batch, pair = lax.axis_index("batch"), lax.axis_index("heads")
        group = self.sizes.group(pair)

        def one(i, _):
            slot = lax.rem(i, self.sizes.stages)
            tokens = pl.ds(self.at(i) * SIZE, SIZE)
            plgpu.barrier_wait(free.at[slot])

            def bring(where, target):
                plgpu.copy_gmem_to_smem(where, target, full.at[slot])

            bring(refs["a"].at[batch, tokens, group], smem["a"].at[slot])
            for member in range(CONSUMERS):
                head = pair * CONSUMERS + member
                bring(refs["x"].at[batch, tokens, head], smem["x"].at[slot, member])
                where = refs["stats"].at[batch, head, :, tokens]
                bring(where, smem["stats"].at[slot, member])
            if self.numbered:
                bring(refs["number"].at[batch, tokens], smem["number"].at[slot, 0])

        lax.fori_loop(0, self.sizes.chunks, one, None)
        drain({"ring": free})

    @property
    def numbered(self) -> bool:
        return self.reverse and "number" in self.names

    def compute(self, refs, smem, full, free):
        wg, sizes = lax.axis_index("wg"), self.sizes
        batch, head = lax.axis_index("batch"), lax.axis_index("heads") * CONSUMERS + wg
        spare = Spare.of(smem, wg)
        for slot in range(sizes.stages):
            plgpu.barrier_arrive(free.at[slot])

        def walk(state):
            if "start" in self.names:
                where = refs["start"].at[batch, head]
                state[...] = plgpu.load(where, layout=SQUARE, optimized=False)

            def one(i, _):
                slot, chunk = lax.rem(i, sizes.stages), self.at(i)
                held = refs["held"][batch, head, chunk]
                memory = {name: smem[name].at[slot, wg] for name in ("x", "stats")}
                if self.numbered:
                    memory["number"] = smem["number"].at[slot]
                out = smem["out"].at[wg]
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                out[...] = state[...].astype(sizes.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out, refs["states"].at[batch, head, chunk])
                plgpu.barrier_wait(full.at[slot])
                factors = reach(memory) if self.reverse else given(memory)
                smem["given"].at[wg][...] = scaled(memory["x"], factors, sizes.dtype)
                plgpu.commit_smem()
                state[...] = forgotten(state[...], held, "number" in self.names)
                spare.add_shared(state, smem["a"].at[slot].T, smem["given"].at[wg])
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(free.at[slot])

            lax.fori_loop(0, sizes.chunks, one, None)
            return state[...]

        final = spare.zeroed(walk, (sizes.state, sizes.width))
        refs["final"].at[batch, head][...] = final
        plgpu.wait_smem_to_gmem(0)

    def body(self, refs):
        sizes, stages = self.sizes, self.sizes.stages
        smem = {
            "a": swizzled((stages, SIZE, sizes.state), sizes.dtype),
            "x": swizzled((stages, CONSUMERS, SIZE, sizes.width), sizes.dtype),
            "stats": plgpu.SMEM((stages, CONSUMERS, 4, SIZE), jnp.float32),
            "given": swizzled((CONSUMERS, SIZE, sizes.width), sizes.dtype),
            "out": swizzled((CONSUMERS, sizes.state, sizes.width), sizes.dtype),
        }
        copies = 1 + 2 * CONSUMERS
        if self.numbered:
            smem["number"] = plgpu.SMEM((stages, 1, SIZE), jnp.int32)
            copies += 1
        smem |= Spare.kinds(sizes, (SIZE, SIZE), (sizes.state, sizes.width))
        full = plgpu.Barrier(num_arrivals=copies, num_barriers=stages)
        free = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages)
        roles(self, refs, smem, full, free)


@dataclasses.dataclass(frozen=True)
class Gradients:
    """The kernel that owns a chunk: a program walks over `heads` heads of one group.

    Its results are the gradient of x, the parts of those of b and c that these heads give, and four
    numbers a token and head from which the gradients of steps and decays follow; see `backward`.
    """

    sizes: Sizes
    names: frozenset[str]
    heads: int

    def place(self):
        """(sequence, chunk, first head, group, part)."""
        batch, chunk, part = (lax.axis_index(name) for name in ("batch", "chunk", "part"))
        first = part * self.heads
        group = lax.div(first, self.sizes.heads // self.sizes.groups)
        return batch, chunk, first, group, part

    def load(self, refs, smem, full, free):
        batch, chunk, first, group, _ = self.place()
        tokens = pl.ds(chunk * SIZE, SIZE)
        for name in ("b", "c"):
            where = refs[name].at[batch, tokens, group]
            plgpu.copy_gmem_to_smem(where, smem[name], full["shared"])
        if "number" in self.names:
            for copy in range(2):
                where = refs["number"].at[batch, tokens]
                plgpu.copy_gmem_to_smem(where, smem["number"].at[copy], full["shared"])

        def one(i, _):
            slot, head = lax.rem(i, self.sizes.stages), first + i
            plgpu.barrier_wait(free.at[slot])

            def bring(where, target):
                plgpu.copy_gmem_to_smem(where, smem[target].at[slot], full["ring"].at[slot])

            for name in ("x", "dy"):
                bring(refs[name].at[batch, tokens, head], name)
            for name in ("before", "after"):
                bring(refs[name].at[batch, head, chunk], name)
            for name in ("stats", "across"):
                bring(refs["stats"].at[batch, head, :, tokens], name)

        lax.fori_loop(0, self.heads, one, None)
        drain({"ring": free})

    def compute(self, refs, smem, full, free):
        wg = lax.axis_index("wg")
        for slot in range(self.sizes.stages):
            plgpu.barrier_arrive(free.at[slot])
        plgpu.barrier_wait(full["shared"])

        @pl.when(wg == 0)
        def _():
            self.owner(refs, (smem, full["ring"], free), self.queries, 0)

        @pl.when(wg == 1)
        def _():
            self.owner(refs, (smem, full["ring"], free), self.keys, 1)

        plgpu.wait_smem_to_gmem(0)

    def owner(self, refs, shared, role, wg: int):
        """A consumer's walk over the heads, and its part of the gradient of c (0) or b (1)."""
        smem, full, free = shared
        batch, chunk, first, _, part = self.place()
        sizes, spare = self.sizes, Spare.of(smem, wg)
        tokens = pl.ds(chunk * SIZE, SIZE)
        names = ("c", "b") if wg == 0 else ("b", "c")

        def product(scores):
            plgpu.wgmma(scores, smem[names[0]], smem[names[1]].T)
            plgpu.wgmma_wait(0)
            return scores[...]

        seen = pl.run_scoped(product, plgpu.ACC((SIZE, SIZE), jnp.float32))

        def walk(total, own):
            def one(i, _):
                slot = lax.rem(i, sizes.stages)
                plgpu.barrier_wait(full.at[slot])
                ring = ("x", "dy", "before", "after", "stats", "across")
                memory = {name: smem[name].at[slot] for name in ring}
                memory |= {name: smem[name] for name in ("b", "c")}
                if "number" in self.names:
                    memory["number"] = smem["number"]
                facts = role(memory, seen, (total, own), spare)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(free.at[slot])
                for row, fact in enumerate(facts):
                    smem["facts"].at[wg, row][...] = fact
                if wg == 1:
                    smem["dx"][...] = own[...].astype(sizes.dtype)
                plgpu.commit_smem()
                head = first + i
                if wg == 1:
                    target = refs["dx"].at[batch, tokens, head]
                    plgpu.copy_smem_to_gmem(smem["dx"], target, commit_group=False)
                target = refs["facts"].at[batch, head, wg, :, tokens]
                plgpu.copy_smem_to_gmem(smem["facts"].at[wg], target, commit_group=False)
                plgpu.commit_smem_to_gmem_group()

            lax.fori_loop(0, self.heads, one, None)
            return total[...]

        shapes = ((SIZE, sizes.state), (SIZE, sizes.width))
        total = spare.zeroed(walk, *shapes)
        out = smem["out"].at[wg]
        for i in range(0, sizes.state, SIZE):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out[...] = total[:, i : i + SIZE]
            plgpu.commit_smem()
            target = refs["db" if wg else "dc"].at[batch, part, tokens, pl.ds(i, SIZE)]
            plgpu.copy_smem_to_gmem(out, target)

    def queries(self, memory, seen, sums, spare):
        """Rows are tokens i that read: adds to the gradient of c."""
        dtype, (dc, _) = self.sizes.dtype, sums
        square = plgpu.ACC((SIZE, SIZE), jnp.float32)
        past = plgpu.ACC((SIZE, self.sizes.width), jnp.float32)

        def products(rise, past):
            plgpu.wgmma(rise, memory["dy"], memory["x"].T)
            plgpu.wgmma(past, memory["c"], memory["before"])
            left, reached = decays(memory), reach(memory)
            rise = plgpu.wgmma_accumulator_load(rise, wait_n=1) * left
            spare.add(dc, rise.astype(dtype), memory["b"])
            row = jnp.sum(rise * seen, axis=1)
            dy = plgpu.load(memory["dy"], layout=SQUARE).astype(jnp.float32)
            dy = dy * along(reached, dy.shape, 0)
            past = plgpu.wgmma_accumulator_load(past, wait_n=1)
            product = dy * past
            if "number" in memory:  # the state before may be NaN
                product = jnp.where(along(reached, dy.shape, 0) == 0.0, 0.0, product)
            spare.add(dc, dy.astype(dtype), memory["before"].T)
            return row + jnp.sum(product, axis=1)

        row = pl.run_scoped(products, square, past)
        held = self.overlap(memory)
        plgpu.wgmma_wait(0)
        return row, held

    def overlap(self, memory):
        """float32 [64] whose sum is that of state before times gradient of state after."""
        total = None
        for i in range(0, self.sizes.state, SIZE):
            rows = pl.ds(i, SIZE)
            before, after = (
                plgpu.load(memory[name].at[rows], layout=SQUARE).astype(jnp.float32)
                for name in ("before", "after")
            )
            part = jnp.sum(before * after, axis=1)
            total = part if total is None else total + part
        return total

    def keys(self, memory, seen, sums, spare):
        """Rows are tokens j that are read: adds to the gradient of b, and makes that of x."""
        dtype, (db, dx) = self.sizes.dtype, sums
        square = plgpu.ACC((SIZE, SIZE), jnp.float32)
        wide = plgpu.ACC((SIZE, self.sizes.width), jnp.float32)
        down = memory["stats"]

        def products(rise, later):
            plgpu.wgmma(rise, memory["x"], memory["dy"].T)
            plgpu.wgmma(later, memory["b"], memory["after"])
            left = decays(memory, 1, scaled=False)
            step = plgpu.load(down.at[STEPS], layout=ROW)
            last = plgpu.load(down.at[LAST], layout=ROW)
            rise = plgpu.wgmma_accumulator_load(rise, wait_n=1) * left
            column = jnp.sum(rise * seen, axis=1)
            rise = (rise * along(step, rise.shape, 0)).astype(dtype)
            spare.add(db, rise, memory["c"])
            x = plgpu.load(memory["x"], layout=SQUARE).astype(jnp.float32)
            later = plgpu.wgmma_accumulator_load(later, wait_n=1) * along(last, x.shape, 0)
            dx[...] = later
            spare.add(dx, (left * seen).astype(dtype), memory["dy"])
            ending = (x * along(step * last, x.shape, 0)).astype(dtype)
            spare.add(db, ending, memory["after"].T)
            return column, jnp.sum(x * later, axis=1)

        facts = pl.run_scoped(products, square, wide)
        plgpu.wgmma_wait(0)
        step = plgpu.load(down.at[STEPS], layout=ROW)
        dx[...] = dx[...] * along(step, dx.shape, 0)
        return facts

    def body(self, refs):
        sizes, stages = self.sizes, self.sizes.stages
        state, width = sizes.state, sizes.width
        smem = {name: swizzled((SIZE, state), sizes.dtype) for name in ("b", "c")}
        smem |= {name: swizzled((stages, SIZE, width), sizes.dtype) for name in ("x", "dy")}
        smem |= {
            name: swizzled((stages, state, width), sizes.dtype) for name in ("before", "after")
        }
        smem |= {name: plgpu.SMEM((stages, 4, SIZE), jnp.float32) for name in ("stats", "across")}
        smem |= {
            "facts": plgpu.SMEM((CONSUMERS, 2, SIZE), jnp.float32),
            "dx": swizzled((SIZE, width), sizes.dtype),
            "out": swizzled((CONSUMERS, SIZE, SIZE), jnp.float32),
        }
        copies = 2
        if "number" in self.names:
            smem["number"] = plgpu.SMEM((2, SIZE), jnp.int32)
            copies += 2
        smem |= Spare.kinds(sizes, (SIZE, SIZE), (SIZE, state), (SIZE, width))
        full = {
            "shared": plgpu.Barrier(num_arrivals=copies),
            "ring": plgpu.Barrier(num_arrivals=6, num_barriers=stages),
        }
        free = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages)
        roles(self, refs, smem, full, free)


@lowered_once("heads", "stages", "interpret")
def backward(
    x: jax.Array,
    b: jax.Array,
    c: jax.Array,
    about: Chunks,
    initial: jax.Array | None,
    gradients: tuple[jax.Array, jax.Array],
    *,
    heads: int,
    stages: int = 2,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """Gradients by x, b and c, facts [B, N, 2, 2, C Q] of decays and
    steps, and that by the state before.

    The facts are, in float32, of each token as a reader: the sum over what it read of weight times
    gradient, and a share of what the chunk's first state gives to the state after it; of each token
    as one that is read: the same sum over its readers in the chunk, and over those after it, both
    by its step size.

    Args:
      x, b, c, about, initial: as of `forward`.
      gradients: of y, in x's dtype, and of the final state, float32 [B, N, M, H].
      heads: that a program of the second kernel walks over; a divisor of N / K.
    """
    batch, length, count, width = x.shape
    groups, state = b.shape[2:]
    dy, dfinal = gradients
    sizes = Sizes.of(x, b, stages=stages, interpret=interpret)
    x, b, c, dy = (padded(z, 1, 8) for z in (x, b, c, dy))
    states = jax.ShapeDtypeStruct((batch, count, sizes.chunks, state, width), x.dtype)
    last = jax.ShapeDtypeStruct((batch, count, state, width), jnp.float32)

    def walk(rows, tokens, start, *, reverse: bool):
        inputs = {
            "a": rows,
            "x": tokens,
            "stats": about.stats,
            "held": about.held,
            "number": about.number,
            "start": start,
        }
        inputs = present(inputs)
        kernel = Walk(sizes, frozenset(inputs), reverse)
        grid = {"batch": batch, "heads": sizes.pairs}
        name = "ssd_states_back" if reverse else "ssd_states"
        how = {"name": name, "grid": grid, "interpret": interpret}
        return run_kernel(kernel, inputs, {"states": states, "final": last}, **how)

    before, _ = walk(b, x, initial, reverse=False)
    after, dinitial = walk(c, dy, dfinal, reverse=True)
    inputs = {
        "x": x,
        "b": b,
        "c": c,
        "dy": dy,
        "before": before,
        "after": after,
        "stats": about.stats,
        "number": about.number,
    }
    inputs = present(inputs)
    parts = count // heads
    shared = jax.ShapeDtypeStruct((batch, parts, x.shape[1], state), jnp.float32)
    facts = (batch, count, 2, 2, sizes.chunks * SIZE)
    outputs = {
        "dx": jax.ShapeDtypeStruct(x.shape, x.dtype),
        "db": shared,
        "dc": shared,
        "facts": jax.ShapeDtypeStruct(facts, jnp.float32),
    }
    kernel = Gradients(sizes, frozenset(inputs), heads)
    grid = {"batch": batch, "chunk": sizes.chunks, "part": parts}
    how = {"name": "ssd_gradients", "grid": grid, "interpret": interpret}
    dx, db, dc, facts = run_kernel(kernel, inputs, outputs, **how)

    def summed(parts_of, dtype):
        split = parts_of.reshape(batch, groups, -1, *parts_of.shape[2:])
        return jnp.sum(split, axis=2).transpose(0, 2, 1, 3)[:, :length].astype(dtype)

    return dx[:, :length], summed(db, b.dtype), summed(dc, c.dtype), facts, dinitial
