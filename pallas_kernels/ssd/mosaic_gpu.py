# Types of jax's Mosaic GPU objects are not public.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
"""The Hopper forward: one warpgroup loads, two compute, a head each (Pallas, Mosaic GPU backend).

A program walks over the chunks of one sequence for two heads of a group, so that everything is read
once. The state [M, H] stays in a consumer's registers in float32; its rounded copy in shared memory
is what the chunk's queries read.
"""

from __future__ import annotations

import dataclasses
import functools

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
    swizzled,
)

__all__ = ["SIZE", "forward"]

SIZE = 64  # tokens of a chunk: the rows of an instruction
SUMS, STEPS, LAST = range(3)  # of a chunk's stats


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


def weights(memory, shape):
    """float32 [i, j]: what of token j is in the state when token i reads it, step size included.

    What is read along rows and along columns lies in shared memory twice: Mosaic makes one load of
    two from one place, which then has no layout.
    """
    stats = memory["stats"]
    here = plgpu.load(memory["rows"], layout=ROW)
    there = plgpu.load(stats.at[SUMS], layout=COLUMN)
    step = plgpu.load(stats.at[STEPS], layout=COLUMN)
    keep = iota(shape, 0) >= iota(shape, 1)
    if "number" in memory:
        own = along(plgpu.load(memory["number"].at[0], layout=ROW), shape, 0)
        keep = keep & (own == along(plgpu.load(memory["number"].at[1], layout=COLUMN), shape, 1))
    power = along(here, shape, 0) - along(there, shape, 1)
    return jnp.where(keep, jnp.exp2(power), 0.0) * along(step, shape, 1)


def reach(memory):
    """float32 [i]: what is left of the state before the chunk when token i reads it."""
    left = jnp.exp2(plgpu.load(memory["rows"], layout=ROW))
    if "number" not in memory:
        return left
    return jnp.where(plgpu.load(memory["number"].at[0], layout=ROW) == 0, left, 0.0)


def given(memory):
    """float32 [j]: what is in the state at the chunk's end of what token j gave, step included."""
    step = plgpu.load(memory["stats"].at[STEPS], layout=COLUMN)
    return step * plgpu.load(memory["stats"].at[LAST], layout=COLUMN)


def scaled(ref, factors, dim: int, dtype):
    """A matrix of shared memory in registers, times factors along a dim, rounded again."""
    x = plgpu.load(ref, layout=SQUARE).astype(jnp.float32)
    return (x * along(factors, x.shape, dim)).astype(dtype)


@dataclasses.dataclass(frozen=True)
class Forward:
    """One compiled kernel."""

    sizes: Sizes
    names: frozenset[str]

    def load(self, refs, smem, full, free):
        batch, pair = lax.axis_index("batch"), lax.axis_index("pair")
        group = self.sizes.group(pair)

        def one(i, _):
            slot = lax.rem(i, self.sizes.stages)
            tokens = pl.ds(i * SIZE, SIZE)
            plgpu.barrier_wait(free.at[slot])

            def bring(where, target):
                plgpu.copy_gmem_to_smem(where, target, full.at[slot])

            bring(refs["c"].at[batch, tokens, group], smem["c"].at[slot])
            bring(refs["b"].at[batch, group, :, tokens], smem["b"].at[slot])
            for member in range(CONSUMERS):
                head = pair * CONSUMERS + member
                bring(refs["x"].at[batch, tokens, head], smem["x"].at[slot, member])
                where = refs["stats"].at[batch, head, :, tokens]
                bring(where, smem["stats"].at[slot, member])
                bring(where.at[SUMS], smem["rows"].at[slot, member])
            if "number" in self.names:
                for copy in range(2):
                    bring(refs["number"].at[batch, tokens], smem["number"].at[slot, copy])

        lax.fori_loop(0, self.sizes.chunks, one, None)
        drain({"ring": free})

    def compute(self, refs, smem, full, free):
        wg, sizes = lax.axis_index("wg"), self.sizes
        batch, head = lax.axis_index("batch"), lax.axis_index("pair") * CONSUMERS + wg
        spare = Spare.of(smem, wg)
        for slot in range(sizes.stages):
            plgpu.barrier_arrive(free.at[slot])

        def walk(state, y):
            if "initial" in self.names:
                where = refs["initial"].at[batch, head]
                state[...] = plgpu.load(where, layout=SQUARE, optimized=False)

            def one(i, _):
                slot = lax.rem(i, sizes.stages)
                held = refs["held"][batch, head, i]
                memory = {name: smem[name].at[slot] for name in ("b", "c")}
                memory |= {name: smem[name].at[slot, wg] for name in ("x", "stats", "rows")}
                memory |= {name: smem[name].at[wg] for name in ("state", "y")}
                if "number" in self.names:
                    memory["number"] = smem["number"].at[slot]
                self.chunk(memory, (state, y), held, spare, full.at[slot])
                plgpu.barrier_arrive(free.at[slot])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                memory["y"][...] = y[...].astype(sizes.dtype)
                plgpu.commit_smem()
                target = refs["y"].at[batch, pl.ds(i * SIZE, SIZE), head]
                plgpu.copy_smem_to_gmem(memory["y"], target)

            lax.fori_loop(0, sizes.chunks, one, None)
            return state[...]

        final = spare.zeroed(walk, (sizes.state, sizes.width), (SIZE, sizes.width))
        refs["final"].at[batch, head][...] = final
        plgpu.wait_smem_to_gmem(0)

    def chunk(self, memory, sums, held, spare, full):
        """One chunk: y, and the state after it."""
        state, y = sums
        dtype, square = self.sizes.dtype, (SIZE, SIZE)
        segmented = "number" in memory
        memory["state"][...] = state[...].astype(dtype)
        plgpu.commit_smem()
        plgpu.barrier_wait(full)

        def products(scores, past):
            plgpu.wgmma(scores, memory["c"], memory["b"])
            plgpu.wgmma(past, memory["c"], memory["state"])
            inside = weights(memory, square)
            scores = plgpu.wgmma_accumulator_load(scores, wait_n=1)
            inside = (scores * inside).astype(dtype)
            left = along(reach(memory), (SIZE, self.sizes.width), 0)
            past = plgpu.wgmma_accumulator_load(past, wait_n=0)
            if segmented:  # the state before may be NaN
                past = jnp.where(left == 0.0, 0.0, past)
            return inside, past * left

        kinds = plgpu.ACC(square, jnp.float32), plgpu.ACC(y.shape, jnp.float32)
        inside, past = pl.run_scoped(products, *kinds)
        y[...] = past
        spare.add(y, inside, memory["x"])
        entering = scaled(memory["b"], given(memory), 1, dtype)
        left = state[...] * held
        if segmented:
            left = jnp.where(plgpu.layout_cast(jnp.full(left.shape, held), SQUARE) == 0.0, 0.0, left)
        state[...] = left
        spare.add(state, entering, memory["x"])
        plgpu.wgmma_wait(0)

    def body(self, refs):
        sizes, stages = self.sizes, self.sizes.stages
        smem = {
            "c": swizzled((stages, SIZE, sizes.state), sizes.dtype),
            "b": swizzled((stages, sizes.state, SIZE), sizes.dtype),
            "x": swizzled((stages, CONSUMERS, SIZE, sizes.width), sizes.dtype),
            "stats": plgpu.SMEM((stages, CONSUMERS, 3, SIZE), jnp.float32),
            "rows": plgpu.SMEM((stages, CONSUMERS, SIZE), jnp.float32),
            "state": swizzled((CONSUMERS, sizes.state, sizes.width), sizes.dtype),
            "y": swizzled((CONSUMERS, SIZE, sizes.width), sizes.dtype),
        }
        copies = 2 + 3 * CONSUMERS
        if "number" in self.names:
            smem["number"] = plgpu.SMEM((stages, 2, SIZE), jnp.int32)
            copies += 2
        sums = ((sizes.state, sizes.width), (SIZE, sizes.width))
        smem |= Spare.kinds(sizes, (max(SIZE, sizes.state), SIZE), *sums)
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
    stages: int = 2,
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
    groups, state = b.shape[2:]
    inputs = {
        "x": padded(x, 1, 8),
        "b": padded(b, 1, SIZE).transpose(0, 2, 3, 1),
        "c": padded(c, 1, 8),
        "stats": about.stats,
        "held": about.held,
        "number": about.number,
        "initial": initial,
    }
    inputs = {name: value for name, value in inputs.items() if value is not None}
    sizes = Sizes(
        batch=batch,
        length=length,
        heads=heads,
        groups=groups,
        width=width,
        state=state,
        dtype=jnp.dtype(x.dtype),
        stages=stages,
        interpret=interpret,
    )
    kernel = Forward(sizes, frozenset(inputs))
    outputs = {
        "y": jax.ShapeDtypeStruct(inputs["x"].shape, x.dtype),
        "final": jax.ShapeDtypeStruct((batch, heads, state, width), jnp.float32),
    }
    y, final = call(kernel, inputs, outputs, "ssd", {"batch": batch, "pair": sizes.pairs})
    return y[:, :length], final


def call(kernel, inputs, outputs, name: str, grid: dict[str, int]):
    """Runs a kernel: its outputs, in order."""

    def run(*refs):
        kernel.body(dict(zip((*inputs, *outputs), refs, strict=True)))

    return plgpu.kernel(
        run,
        out_type=tuple(outputs.values()),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=CONSUMERS + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        kernel_name=name,
        interpret=plgpu.InterpretGPUParams() if kernel.sizes.interpret else False,
    )(*inputs.values())
