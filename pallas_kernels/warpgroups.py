# Types of jax's Mosaic GPU objects are not public.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false
"""What the kernels for Hopper share: their warpgroups, and layouts of memory and registers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

__all__ = [
    "COLUMN",
    "CONSUMERS",
    "LOG2E",
    "PAIR",
    "ROW",
    "SQUARE",
    "Spare",
    "along",
    "capped",
    "clear",
    "drain",
    "iota",
    "multiply",
    "pass_over",
    "roles",
    "run_kernel",
    "slot_of",
    "swizzled",
    "weighed",
]

CONSUMERS = 2  # warpgroups that compute; one more loads
REGISTERS = {2: 240, 3: 160, 4: 112}  # of each of so many; with 24 of the other what a program has
PAIR = "pair"  # axis of the programs of a cluster
SQUARE = plgpu.Layout.WGMMA
ROW = SQUARE.reduce(1)  # one value a row of an accumulator
COLUMN = SQUARE.reduce(0)
LOG2E = math.log2(math.e)
_WIDTH = 64  # columns that are cleared at a time


def swizzled(shape: tuple[int, ...], dtype) -> object:
    """Shared memory in the widest layout that TMA and WGMMA agree on."""
    bits = 8 * jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(shape[-1] * bits)
    transforms = (
        plgpu.TilingTransform((8, 8 * swizzle // bits)),
        plgpu.SwizzleTransform(swizzle),
    )
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def iota(shape: tuple[int, int], dim: int) -> jax.Array:
    """Indices along `dim` in the layout of an accumulator."""
    return plgpu.broadcasted_iota(jnp.int32, shape, dim, layout=SQUARE)


def along(vector: jax.Array, shape: tuple[int, ...], dim: int) -> jax.Array:
    """A vector along `dim` of a matrix, repeated along the other."""
    return lax.broadcast_in_dim(vector, shape, [dim])


def clear(block, low: jax.Array | int, high: jax.Array | int) -> None:
    """Zeros in a block of shared memory outside of rows [low, high); to be committed."""
    zero = jnp.zeros((), block.dtype)
    for i in range(0, block.shape[1], _WIDTH):
        part = block.at[:, pl.ds(i, _WIDTH)]
        shape = (block.shape[0], _WIDTH)
        row = iota(shape, 0)
        part[...] = jnp.where((row >= low) & (row < high), part[...], zero)


def capped(scores: jax.Array, scale: float, softcap: float | None) -> tuple[jax.Array, float]:
    """(products as they are or capped, the factor that makes scores in units of log2 e of them)."""
    if softcap is None:
        return scores, scale * LOG2E
    return jnp.tanh(scores * (scale / softcap)), softcap * LOG2E


def weighed(
    scores: jax.Array, seen: jax.Array, peak: jax.Array, dim: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(weights, factor of what was summed before, peak) of one more step of an online softmax.

    Args:
      scores: in units of log2 e.
      seen: which of them count.
      peak: of all before, -inf where there were none.
      dim: along which keys lie.
    """
    scores = jnp.where(seen, scores, -jnp.inf)
    higher = jnp.maximum(peak, jnp.max(scores, axis=dim))
    level = jnp.where(higher == -jnp.inf, 0.0, higher)
    weights = jnp.exp2(scores - along(level, scores.shape, 1 - dim))
    return weights, jnp.exp2(peak - level), higher


def multiply(acc, left: jax.Array, right, stage=None) -> None:
    """acc += left @ right with `left` in registers, begun and not waited for.

    Args:
      stage: shared memory of left's shape for the interpreter, which knows no operand in registers;
        None on a device.
    """
    if stage is not None:
        stage[...] = left
        plgpu.commit_smem()
        left = stage
    plgpu.wgmma(acc, left, right)


@dataclasses.dataclass(frozen=True)
class Spare:
    """A consumer's memory for what the interpreter cannot do; empty on a device.

    It knows neither a left operand in registers nor a store to an accumulator: there, sums are
    plain memory, and a product is made from nothing and added.
    """

    sums: tuple[Any, ...] = ()
    stage: Any = None

    @staticmethod
    def kinds(shape: Any, stage: tuple[int, int], *sums: tuple[int, int]) -> dict:
        """What to allocate, by name; operands are of `shape.dtype`."""
        if not shape.interpret:
            return {}
        count = getattr(shape, "consumers", CONSUMERS)
        kinds = {f"sum{i}": plgpu.SMEM((count, *x), jnp.float32) for i, x in enumerate(sums)}
        return kinds | {"stage": swizzled((count, *stage), shape.dtype)}

    @classmethod
    def of(cls, smem: dict, wg) -> Spare:
        """A warpgroup's part of what `kinds` named."""
        if "stage" not in smem:
            return cls()
        sums = sorted(name for name in smem if name.startswith("sum"))
        return cls(tuple(smem[name].at[wg] for name in sums), smem["stage"].at[wg])

    def zeroed(self, body, *shapes: tuple[int, int]):
        """body(*accumulators), float32 zeros that `add` adds to."""
        if self.stage is None:
            return pl.run_scoped(body, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))
        for ref in self.sums:
            ref[...] = jnp.zeros(ref.shape, jnp.float32)
        return body(*self.sums[: len(shapes)])

    def kept(self, acc, index: int):
        """An accumulator that is stored to: itself, or in the interpreter the memory of its sum."""
        return acc if self.stage is None else self.sums[index]

    def read(self, acc, wait_n: int):
        """Its sums when at most `wait_n` products are on their way."""
        return (
            acc[...] if self.stage is not None else plgpu.wgmma_accumulator_load(acc, wait_n=wait_n)
        )

    def add_shared(self, acc, left, right) -> None:
        """acc += left @ right, begun and not waited for; both are refs."""
        if self.stage is None:
            plgpu.wgmma(acc, left, right)
            return

        self._added(acc, lambda fresh: plgpu.wgmma(fresh, left, right))

    def add(self, acc, left: jax.Array, right) -> None:
        """acc += left @ right, begun and not waited for; `left` is in registers, `right` a ref."""
        if self.stage is None:
            multiply(acc, left, right)
            return

        stage = self.stage.at[pl.ds(0, left.shape[0])]
        self._added(acc, lambda fresh: multiply(fresh, left, right, stage))

    @staticmethod
    def _added(acc, product) -> None:
        def run(fresh):
            product(fresh)
            return fresh[...]

        acc[...] = acc[...] + pl.run_scoped(run, plgpu.ACC(acc.shape, jnp.float32))


def slot_of(step, stages: int):
    """Where the block of a step lies among so many."""
    return step & (stages - 1) if stages.bit_count() == 1 else lax.rem(step, stages)


def pass_over(full, free, stages: Mapping[str, int], steps: tuple[Any, Any]) -> None:
    """Lets go of blocks that came and that a consumer does not look at.

    Args:
      stages: how many of each name are in flight.
      steps: first and end.
    """

    def one(step, _):
        for name, count in stages.items():
            slot = slot_of(step, count)
            plgpu.barrier_wait(full[name].at[slot])
            plgpu.barrier_arrive(free[name].at[slot])

    lax.fori_loop(*steps, one, None)


def drain(free: dict) -> None:
    """Waits until everything that was loaded was also used, so that no barrier ends half-way."""
    for barrier in free.values():
        if not barrier.shape:
            plgpu.barrier_wait(barrier)
            continue
        for slot in range(barrier.shape[0]):
            plgpu.barrier_wait(barrier.at[slot])


def roles(kernel, refs, smem, full, free):
    """Gives each warpgroup its part: the last one loads, the others compute."""
    consumers = getattr(kernel, "consumers", CONSUMERS)

    def scoped(smem, full, free):
        wg = lax.axis_index("wg")

        @pl.when(wg < consumers)
        def _():
            plgpu.set_max_registers(REGISTERS[consumers], action="increase")
            kernel.compute(refs, smem, full, free)

        @pl.when(wg == consumers)
        def _():
            plgpu.set_max_registers(24, action="decrease")
            kernel.load(refs, smem, full, free)

    pl.run_scoped(scoped, smem, full, free, collective_axes="wg")


def run_kernel(kernel, inputs, outputs, *, name: str, grid: dict[str, int], interpret: bool):
    """Runs a kernel whose warpgroups have `roles`: its outputs, in order.

    Args:
      kernel: its `body` takes all refs by name; `scratch_bytes`, if it has them, are what its
        reductions get of shared memory; `consumers`, if it has them, are those that compute.
      inputs: arrays by name.
      outputs: `jax.ShapeDtypeStruct`s by name.
      name: in profiles.
      grid: programs along each axis, by the axis' name; the two along `pair` are one cluster.
      interpret: on a CPU.

    Raises:
      ValueError: more or fewer than two along `pair`.
    """
    if grid.get(PAIR, 2) != 2:
        raise ValueError(f"kernel {name}: programs along {PAIR!r} are two, not {grid[PAIR]}")

    def run(*refs):
        kernel.body(dict(zip((*inputs, *outputs), refs, strict=True)))

    apart = {name: count for name, count in grid.items() if name != PAIR}
    cluster = {"cluster": (grid[PAIR],), "cluster_names": (PAIR,)} if PAIR in grid else {}
    scratch = getattr(kernel, "scratch_bytes", 2048)  # of reductions; Mosaic's default
    return plgpu.kernel(
        run,
        out_type=tuple(outputs.values()),
        grid=tuple(apart.values()),
        grid_names=tuple(apart),
        num_threads=getattr(kernel, "consumers", CONSUMERS) + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=scratch
        ),
        kernel_name=name,
        interpret=plgpu.InterpretGPUParams() if interpret else False,
        **cluster,
    )(*inputs.values())
