# Types of jax's Mosaic GPU objects are not public.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
"""The Hopper forward: one warpgroup loads, two compute, a head each (Pallas, Mosaic GPU backend).

A program walks over the chunks of one sequence for two heads of a group, so that everything is read
once. The state [M, H] stays in a consumer's registers in float32; its rounded copy in shared memory
is what the chunk's queries read.
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
from pallas_kernels.warpgroups import (
    COLUMN,
    CONSUMERS,
    ROW,
    SQUARE,
    Spare,
    along,
    drain,
    iota,
    roles,
    run_kernel,
    swizzled,
)

__all__ = ["SIZE", "forward"]

SIZE = 64  # tokens of a chunk: the rows of an instruction
SUMS, GIVEN, LAST, STEPS = range(4)  # of a chunk's stats


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a kernel is compiled for."""

    batch: int
    length: int
    heads: int
    groups: int
    width: int
    state: int
    dtype: jnp.dtype
    stages: int
    interpret: bool

    @classmethod
    def of(cls, x: jax.Array, b: jax.Array, *, stages: int, interpret: bool) -> Sizes:
        """Of x [B, T, N, H] and b [B, T, K, M]."""
        batch, length, heads, width = x.shape
        return cls(
            batch=batch,
            length=length,
            heads=heads,
            groups=b.shape[2],
            width=width,
            state=b.shape[3],
            dtype=jnp.dtype(x.dtype),
            stages=stages,
            interpret=interpret,
        )

    @property
    def chunks(self) -> int:
        return pl.cdiv(self.length, SIZE)

    @property
    def pairs(self) -> int:
        """Programs of a sequence."""
        return self.heads // CONSUMERS

    def group(self, pair):
        """Which b and c a program's heads read."""
        return lax.div(pair, self.pairs // self.groups)


def present(arrays: dict) -> dict[str, jax.Array]:
    """Those that are there."""
    return {name: x for name, x in arrays.items() if x is not None}


def decays(memory, down: int = 0, *, scaled: bool = True):
    """float32: what is left of token j when token i reads it, times the step size of j.

    Args:
      memory: stats, numbers, and where `scaled` is not set a second copy `across` of the stats:
        Mosaic makes one load of two from one place, which then has no layout.
      down: the dim along which i is counted.
      scaled: by the step size.
    """
    shape = (SIZE, SIZE)
    across = memory["stats" if scaled else "across"]
    there = GIVEN if scaled else SUMS
    rows, columns = (SUMS, there) if down == 0 else (there, SUMS)
    row = along(plgpu.load(memory["stats"].at[rows], layout=ROW), shape, 0)
    column = along(plgpu.load(across.at[columns], layout=COLUMN), shape, 1)
    keep = iota(shape, down) >= iota(shape, 1 - down)
    if "number" in memory:
        own = along(plgpu.load(memory["number"].at[0], layout=ROW), shape, 0)
        keep &= own == along(plgpu.load(memory["number"].at[1], layout=COLUMN), shape, 1)
    return jnp.where(keep, jnp.exp2(row - column if down == 0 else column - row), 0.0)


def given(memory):
    """float32 [j]: what is in the state at the chunk's end of what token j gave, step included."""
    last, step = (plgpu.load(memory["stats"].at[i], layout=ROW) for i in (LAST, STEPS))
    return last * step


def reach(memory):
    """float32 [i]: what is left of the state before the chunk when token i reads it."""
    left = jnp.exp2(plgpu.load(memory["stats"].at[SUMS], layout=ROW))
    if "number" not in memory:
        return left
    return jnp.where(plgpu.load(memory["number"].at[0], layout=ROW) == 0, left, 0.0)


def scaled(ref, factors, dtype):
    """A matrix of shared memory in registers, its rows times factors, rounded again."""
    x = plgpu.load(ref, layout=SQUARE).astype(jnp.float32)
    return (x * along(factors, x.shape, 0)).astype(dtype)


def forgotten(state, held, segmented: bool):
    """What is left of a state; zeros where that is nothing, be it NaN."""
    left = state * held
    if not segmented:
        return left
    nothing = plgpu.layout_cast(jnp.full(left.shape, held), SQUARE) == 0.0
    return jnp.where(nothing, 0.0, left)


@dataclasses.dataclass(frozen=True)
class Forward:
    """One compiled kernel."""

    sizes: Sizes
    names: frozenset[str]

    def load(self, refs, smem, full, free):
        batch, pair = lax.axis_index("batch"), lax.axis_index("heads")
        group = self.sizes.group(pair)

        def one(i, _):
            slot = lax.rem(i, self.sizes.stages)
            # One step more, whose chunk only stands where a next one is expected.
            tokens = pl.ds(jnp.minimum(i, self.sizes.chunks - 1) * SIZE, SIZE)
            plgpu.barrier_wait(free.at[slot])

            def bring(where, target):
                plgpu.copy_gmem_to_smem(where, target, full.at[slot])

            bring(refs["c"].at[batch, tokens, group], smem["c"].at[slot])
            bring(refs["b"].at[batch, tokens, group], smem["b"].at[slot])
            for member in range(CONSUMERS):
                head = pair * CONSUMERS + member
                bring(refs["x"].at[batch, tokens, head], smem["x"].at[slot, member])
                where = refs["stats"].at[batch, head, :, tokens]
                bring(where, smem["stats"].at[slot, member])
            if "number" in self.names:
                for copy in range(2):
                    bring(refs["number"].at[batch, tokens], smem["number"].at[slot, copy])

        lax.fori_loop(0, self.sizes.chunks + 1, one, None)
        drain({"ring": free})

    def compute(self, refs, smem, full, free):
        wg, sizes = lax.axis_index("wg"), self.sizes
        batch, head = lax.axis_index("batch"), lax.axis_index("heads") * CONSUMERS + wg
        spare = Spare.of(smem, wg)
        for slot in range(sizes.stages):
            plgpu.barrier_arrive(free.at[slot])

        def memory_of(i):
            slot = lax.rem(i, sizes.stages)
            memory = {name: smem[name].at[slot] for name in ("b", "c")}
            memory |= {name: smem[name].at[slot, wg] for name in ("x", "stats")}
            memory |= {name: smem[name].at[wg] for name in ("state", "y", "given")}
            if "number" in self.names:
                memory["number"] = smem["number"].at[slot]
            return memory

        def walk(state):
            if "initial" in self.names:
                where = refs["initial"].at[batch, head]
                state[...] = plgpu.load(where, layout=SQUARE, optimized=False)
            plgpu.barrier_wait(full.at[0])
            inside = self.first(memory_of(0), state)

            def one(i, inside):
                held = refs["held"][batch, head, i]
                coming = full.at[lax.rem(i + 1, sizes.stages)]
                both = memory_of(i), memory_of(i + 1)
                inside, y = self.chunk(both, (state, inside), held, spare, coming)
                plgpu.barrier_arrive(free.at[lax.rem(i, sizes.stages)])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                smem["y"].at[wg][...] = y
                plgpu.commit_smem()
                target = refs["y"].at[batch, pl.ds(i * SIZE, SIZE), head]
                plgpu.copy_smem_to_gmem(smem["y"].at[wg], target)
                return inside

            lax.fori_loop(0, sizes.chunks, one, inside)
            plgpu.barrier_arrive(free.at[sizes.chunks % sizes.stages])
            return state[...]

        final = spare.zeroed(walk, (sizes.state, sizes.width))
        refs["final"].at[batch, head][...] = final
        plgpu.wait_smem_to_gmem(0)

    def first(self, memory, state):
        """What tokens of the first chunk read of each other, rounded; fills the memory that the
        first step reads."""
        dtype = self.sizes.dtype
        memory["given"][...] = scaled(memory["x"], given(memory), dtype)
        memory["state"][...] = state[...].astype(dtype)
        plgpu.commit_smem()

        def product(scores):
            plgpu.wgmma(scores, memory["c"], memory["b"].T)
            return (plgpu.wgmma_accumulator_load(scores, wait_n=0) * decays(memory)).astype(dtype)

        return pl.run_scoped(product, plgpu.ACC((SIZE, SIZE), jnp.float32))

    def chunk(self, both, carry, held, spare, coming):
        """One chunk: adds it to the state; (what tokens of the next read of each other, y).

        The products of this chunk with the state, into it, and of the next chunk's b and c are
        begun together; beside them run the next chunk's decays.
        """
        (memory, coming_memory), (state, inside) = both, carry
        dtype, tile = self.sizes.dtype, (SIZE, self.sizes.width)
        segmented = "number" in memory

        def products(scores, past):
            plgpu.wgmma(past, memory["c"], memory["state"])
            state[...] = forgotten(state[...], held, segmented)
            spare.add_shared(state, memory["b"].T, memory["given"])
            plgpu.barrier_wait(coming)
            plgpu.wgmma(scores, coming_memory["c"], coming_memory["b"].T)
            left = along(reach(memory), tile, 0)
            between = decays(coming_memory)
            y = spare.kept(past, 1)
            past = plgpu.wgmma_accumulator_load(past, wait_n=2)
            if segmented:  # the state before may be NaN
                past = jnp.where(left == 0.0, 0.0, past)
            y[...] = past * left
            spare.add(y, inside, memory["x"])
            scores = plgpu.wgmma_accumulator_load(scores, wait_n=1)
            next_inside = (scores * between).astype(dtype)
            plgpu.commit_smem()  # waits for all warps: the state's product reads what comes next
            memory["given"][...] = scaled(coming_memory["x"], given(coming_memory), dtype)
            memory["state"][...] = spare.read(state, 1).astype(dtype)
            plgpu.commit_smem()
            plgpu.wgmma_wait(0)
            return next_inside, y[...].astype(dtype)

        kinds = plgpu.ACC((SIZE, SIZE), jnp.float32), plgpu.ACC(tile, jnp.float32)
        return pl.run_scoped(products, *kinds)

    def body(self, refs):
        sizes, stages = self.sizes, self.sizes.stages
        smem = {
            "c": swizzled((stages, SIZE, sizes.state), sizes.dtype),
            "b": swizzled((stages, SIZE, sizes.state), sizes.dtype),
            "x": swizzled((stages, CONSUMERS, SIZE, sizes.width), sizes.dtype),
            "stats": plgpu.SMEM((stages, CONSUMERS, 4, SIZE), jnp.float32),
            "state": swizzled((CONSUMERS, sizes.state, sizes.width), sizes.dtype),
            "given": swizzled((CONSUMERS, SIZE, sizes.width), sizes.dtype),
            "y": swizzled((CONSUMERS, SIZE, sizes.width), sizes.dtype),
        }
        copies = 2 + 2 * CONSUMERS
        if "number" in self.names:
            smem["number"] = plgpu.SMEM((stages, 2, SIZE), jnp.int32)
            copies += 2
        sums = ((sizes.state, sizes.width), (SIZE, sizes.width))
        smem |= Spare.kinds(sizes, (SIZE, SIZE), *sums)
        full = plgpu.Barrier(num_arrivals=copies, num_barriers=stages)
        free = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages)
        roles(self, refs, smem, full, free)


@lowered_once("stages", "interpret")
def forward(
    x: jax.Array,
    b: jax.Array,
    c: jax.Array,
    about: Chunks,
    initial: jax.Array | None,
    *,
    stages: int = 3,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """y [B, T, N, H] in x's dtype and the final state, float32 [B, N, M, H].

    Args:
      x: [B, T, N, H].
      b, c: [B, T, K, M]; N / K is even.
      about: of `chunks`, with chunks of SIZE.
      initial: float32 [B, N, M, H], or None for zeros.
    """
    batch, length, heads, width = x.shape
    state = b.shape[3]
    inputs = {
        "x": padded(x, 1, 8),
        "b": padded(b, 1, 8),
        "c": padded(c, 1, 8),
        "stats": about.stats,
        "held": about.held,
        "number": about.number,
        "initial": initial,
    }
    inputs = present(inputs)
    sizes = Sizes.of(x, b, stages=stages, interpret=interpret)
    kernel = Forward(sizes, frozenset(inputs))
    outputs = {
        "y": jax.ShapeDtypeStruct(inputs["x"].shape, x.dtype),
        "final": jax.ShapeDtypeStruct((batch, heads, state, width), jnp.float32),
    }
    grid = {"batch": batch, "heads": sizes.pairs}
    y, final = run_kernel(kernel, inputs, outputs, name="ssd", grid=grid, interpret=interpret)
    return y[:, :length], final
