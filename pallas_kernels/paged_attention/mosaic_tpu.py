"""Attention over pages on TPU: a program for each block of queries, which fetches its own pages.

Pages stay in the large memory; a program copies those of its sequence, all heads of a page at once,
into two places in turn, so that a step's copies run while the last one's keys are multiplied. How
many steps there are is what the sequence holds, not the table's width. Heads of keys are taken one
after the other, each with the rows of all its queries. Statistics are float32.

Pages of 8 bits are widened as a head is taken; scales of keys go into the scores, those of values
into the weights.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.once import lowered_once
from pallas_kernels.paged_attention.problem import Problem
from pallas_kernels.paged_attention.rows import rows_of

__all__ = ["attend_tpu"]

LANES = 128
KEYS = 128  # of a step, where pages are smaller
SLOTS = 2
ROWS = 16  # a multiple of which a head's rows are: of what 16 bits fill a register with
ROOM = 4 << 20  # bytes of the pages in flight
_NT, _NN = (((1,), (1,)), ((), ())), (((1,), (0,)), ((), ()))


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One compiled kernel: rows R of every head of keys."""

    problem: Problem
    group: int
    pool: tuple[int, ...]  # pages, tokens a page, heads, width
    value_width: int
    table_width: int
    dtype: jnp.dtype
    coded: bool

    @property
    def pages(self) -> int:
        """Of a step."""
        size, heads, width = self.pool[1:]
        held = size * max(heads, 8) * (width + self.value_width) * SLOTS
        held *= 1 if self.coded else self.dtype.itemsize
        return max(1, min(KEYS // size, ROOM // held))

    @property
    def keys(self) -> int:
        """Of a step."""
        return self.pages * self.pool[1]

    def bounds(self, refs, start, end, first):
        """(first column, steps) of a block's pages."""
        size, low = self.pool[1], jnp.int32(0)
        if self.problem.window is not None:
            low = lax.div(jnp.maximum(start - self.problem.window, 0), jnp.int32(size)) - first
        low = jnp.maximum(low, 0)
        columns = jnp.maximum(lax.div(end + (size - 1), jnp.int32(size)) - first - low, 0)
        return low, lax.div(columns + (self.pages - 1), jnp.int32(self.pages))

    def copies(self, refs, owner, column, slot):
        """The copies of a step's pages, to be started or waited for."""
        size = self.pool[1]
        for i in range(self.pages):
            at = jnp.minimum(column + i, self.table_width - 1)
            page = jnp.clip(refs["table"][owner, at], 0, self.pool[0] - 1)
            for number, name in enumerate(("k", "v")):
                held = refs[f"{name}_held"].at[slot, pl.ds(i * size, size)]
                arrived = refs["arrived"].at[slot, number]
                yield pltpu.make_async_copy(refs[name].at[page], held, arrived)
            if self.coded:
                held, arrived = refs["scales_held"].at[slot, i], refs["arrived"].at[slot, 2]
                yield pltpu.make_async_copy(refs["scales"].at[page], held, arrived)

    def head(self, held, slot, head):
        """A step's keys or values [keys, width] of one head."""
        found = held[slot] if self.pool[2] == 1 else held[slot, :, head, :]
        return found.astype(jnp.float32).astype(self.dtype) if self.coded else found

    def scales(self, refs, slot, head, side):
        """Of a step's keys or values: [1, keys]."""
        held = refs["scales_held"]
        rows = [held[slot, i, head, side : side + 1] for i in range(self.pages)]
        return rows[0] if len(rows) == 1 else jnp.concatenate(rows, axis=1)

    def body(self, refs):
        block = pl.program_id(0)
        start, count, owner = (refs[name][block] for name in ("starts", "counts", "rows"))
        end, first = jnp.where(count > 0, start + count, 0), refs["firsts"][owner]
        column, steps = self.bounds(refs, start, end, first)
        refs["peak"][...] = jnp.full(refs["peak"].shape, -jnp.inf, jnp.float32)
        refs["total"][...] = jnp.zeros(refs["total"].shape, jnp.float32)
        refs["acc"][...] = jnp.zeros(refs["acc"].shape, jnp.float32)

        @pl.when(steps > 0)
        def _():
            for copy in self.copies(refs, owner, column, 0):
                copy.start()

        def step(i, _):
            slot, begins = lax.rem(i, jnp.int32(SLOTS)), column + i * self.pages

            @pl.when(i + 1 < steps)
            def _():
                for copy in self.copies(refs, owner, begins + self.pages, 1 - slot):
                    copy.start()

            for copy in self.copies(refs, owner, begins, slot):
                copy.wait()
            begin = (first + begins) * self.pool[1]
            if jnp.issubdtype(refs["v_held"].dtype, jnp.floating):
                self.clear(refs["v_held"], slot, end - begin)
            shape = (refs["q"].shape[2], self.keys)
            query = lax.div(lax.broadcasted_iota(jnp.int32, shape, 0), jnp.int32(self.group))
            place = jnp.where(query < count, query + start, -1)
            key = lax.broadcasted_iota(jnp.int32, shape, 1) + begin
            seen = key <= place
            if self.problem.window is not None:
                seen = seen & (key >= place - self.problem.window)
            for head in range(self.pool[2]):
                self.fold(refs, slot, head, (seen, key < end))
            return 0

        lax.fori_loop(0, steps, step, 0)
        for head in range(self.pool[2]):
            total = refs["total"][head]
            some = total > 0.0
            whole = jnp.where(some, total, 1.0)
            refs["out"][0, head] = refs["acc"][head] / whole[:, :1]
            lse = jnp.where(some, refs["peak"][head] + jnp.log(whole), -jnp.inf)
            refs["lse"][0, head] = lse.T[:1]

    def clear(self, held, slot, left):
        """Zeros for the values behind the first `left`, which were never written."""

        @pl.when(left < self.keys)
        def _():
            values = held[slot]
            there = lax.broadcasted_iota(jnp.int32, values.shape, 0) < left
            if self.coded:  # selected as they are widened
                values = values.astype(jnp.float32)
            held[slot] = jnp.where(there, values, jnp.zeros_like(values)).astype(held.dtype)

    def product(self, a, b, dims):
        exact = lax.Precision.HIGHEST if self.dtype == jnp.float32 else None
        return lax.dot_general(a, b, dims, precision=exact, preferred_element_type=jnp.float32)

    def fold(self, refs, slot, head, pairs):
        """One head's statistics and sums with one more step's keys.

        Args:
          pairs: which keys a row sees, and which there are.
        """
        problem, (seen, there) = self.problem, pairs
        k, v = (self.head(refs[f"{name}_held"], slot, head) for name in ("k", "v"))
        scores = self.product(refs["q"][0, head], k, _NT) * problem.scale
        if self.coded:
            scores = scores * self.scales(refs, slot, head, 0)
        if problem.softcap is not None:
            scores = problem.softcap * jnp.tanh(scores * (1.0 / problem.softcap))
        scores = jnp.where(seen, scores, -jnp.inf)
        before = refs["peak"][head]
        now = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
        level = jnp.where(now == -jnp.inf, 0.0, now)
        weights, decay = jnp.exp(scores - level[:, :1]), jnp.exp(before - level)
        sums = jnp.sum(weights, axis=1, keepdims=True)
        refs["total"][head] = refs["total"][head] * decay + sums
        if self.coded:
            weights = weights * jnp.where(there, self.scales(refs, slot, head, 1), 0.0)
        found = self.product(weights.astype(v.dtype), v, _NN)
        refs["acc"][head] = refs["acc"][head] * decay[:, :1] + found
        refs["peak"][head] = now


@lowered_once("problem", "interpret")
def attend_tpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    table: jax.Array,
    firsts: jax.Array,
    blocks: tuple[jax.Array, jax.Array, jax.Array],
    *,
    scales: jax.Array | None = None,
    problem: Problem,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Out float32 [M, K, R, V] and lse float32 [M, K, R].

    R is queries by heads of a key head, query by query, rounded up to a multiple of 16.

    Args:
      q, k, v, table, firsts, blocks, scales: of `paged_attention`.
    """
    group, heads = q.shape[2] // k.shape[2], k.shape[2]
    kernel = Kernel(
        problem=problem,
        group=group,
        pool=k.shape,
        value_width=v.shape[3],
        table_width=table.shape[1],
        dtype=jnp.dtype(q.dtype),
        coded=scales is not None,
    )
    q = rows_of(q, heads, unit=ROWS)
    if heads == 1:  # what XLA makes of a dim of one would be laid out anew
        k, v = k[:, :, 0], v[:, :, 0]
    count, rows = q.shape[0], q.shape[2]
    each = lambda *shape: pl.BlockSpec((1, *shape), lambda m, *_: (m, *[0] * len(shape)))  # noqa: E731
    whole: Any = pl.BlockSpec(memory_space=pl.ANY)
    pools = {"k": k, "v": v} | ({} if scales is None else {"scales": scales})
    names = ("table", "firsts", "rows", "starts", "counts", "q", *pools, "out", "lse")
    statistic = pltpu.VMEM((heads, rows, LANES), jnp.float32)
    scratch = {
        "k_held": pltpu.VMEM((SLOTS, kernel.keys, *k.shape[2:]), k.dtype),
        "v_held": pltpu.VMEM((SLOTS, kernel.keys, *v.shape[2:]), v.dtype),
        "arrived": pltpu.SemaphoreType.DMA((SLOTS, 3)),
        "peak": statistic,
        "total": statistic,
        "acc": pltpu.VMEM((heads, rows, v.shape[-1]), jnp.float32),
    }

    if scales is not None:
        held = (SLOTS, kernel.pages, *scales.shape[1:])
        scratch["scales_held"] = pltpu.VMEM(held, jnp.float32)

    def run(*refs):
        kernel.body(dict(zip((*names, *scratch), refs, strict=True)))

    out, lse = pl.pallas_call(
        run,
        out_shape=[
            jax.ShapeDtypeStruct((count, heads, rows, v.shape[-1]), jnp.float32),
            jax.ShapeDtypeStruct((count, heads, 1, rows), jnp.float32),
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(count,),
            in_specs=[each(heads, rows, q.shape[3]), *[whole] * len(pools)],
            out_specs=[each(heads, rows, v.shape[-1]), each(heads, 1, rows)],
            scratch_shapes=list(scratch.values()),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        name="paged_attention",
        interpret=interpret,
    )(table, firsts, *blocks, q, *pools.values())
    return out, lse[:, :, 0]
