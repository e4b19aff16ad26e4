"""The TPU kernels: forward, dq, and dk with dv (Pallas, Mosaic TPU backend).

A tile of rows stays in fast memory while the blocks that it sees pass by: the innermost axis of the
grid. Which they are comes as a table (`Walk.every`), so that blocks nobody sees are neither read
nor multiplied, and blocks that are seen whole need no mask. Statistics are float32. Arrays are
[B, heads, rows, H] here, statistics [B, N, 1, T].
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash_attention.bias import evaluate
from pallas_kernels.flash_attention.padding import pad
from pallas_kernels.flash_attention.problem import Extras, Spec
from pallas_kernels.flash_attention.ranges import Walk

__all__ = [
    "Kernel",
    "Layout",
    "TpuTiles",
    "backward",
    "forward",
    "launch",
    "launch_backward",
]

LANES, SUBLANES = 128, 8
_NT, _NN = (((1,), (1,)), ((), ())), (((1,), (0,)), ((), ()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuTiles:
    """How the kernels are cut: rows of a tile and of a block, multiples of 128."""

    tile: int = 512
    block: int = 512

    def fitted(self, rows: int, columns: int) -> tuple[int, int]:
        """(tile, block), no longer than rows and columns padded to 128."""
        whole = lambda x: max(LANES, -(-x // LANES) * LANES)  # noqa: E731
        return min(self.tile, whole(rows)), min(self.block, whole(columns))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel: the static facts of a call.

    Attributes:
      walk: tiles over blocks.
      group: query heads of one kv head.
      names: of the kernel's arrays, in the order of its references.
    """

    walk: Walk
    group: int
    names: tuple[str, ...]

    def product(self, a, b, dims) -> jax.Array:
        """a b in float32; `dims` as lax.dot_general's."""
        exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
        return lax.dot_general(a, b, dims, precision=exact, preferred_element_type=jnp.float32)

    def capped(self, scores):
        """(scores under scale and soft-cap, their slope or None)."""
        spec = self.walk.spec
        if spec.softcap is None:
            return scores * spec.scale, None
        bent = jnp.tanh(scores * (spec.scale / spec.softcap))
        return bent * spec.softcap, 1.0 - bent * bent

    def bias(self, refs, place, first):
        """What distances and a function add to a block's scores.

        Args:
          place: sequence, query head.
          first: number of the first row and of the first column.
        """
        walk, shape = self.walk, (self.walk.tile, self.walk.block)
        offset = walk.facts(place[0], refs)[0]
        at = [lax.broadcasted_iota(jnp.int32, shape, dim) + first[dim] for dim in range(2)]
        query, key = at[::-1] if walk.transposed else at
        query, added = query + offset, []
        if "alibi_slopes" in refs:
            away = jnp.abs((query - key).astype(jnp.float32))
            added.append(away * -refs["alibi_slopes"][place[0], place[1]])
        if walk.spec.bias is not None:
            inputs = (lambda: query, lambda: key, lambda: place[1])
            added.append(evaluate(walk.spec.bias, shape, inputs))
        return functools.reduce(operator.add, added)

    def keep(self, refs, batch, first, shape):
        """Which pairs of a block see each other; rows are the walk's tile.

        Args:
          first: number of the first row and of the first column.
        """
        rows = lax.broadcasted_iota(jnp.int32, shape, 0) + first[0]
        columns = lax.broadcasted_iota(jnp.int32, shape, 1) + first[1]
        seen = self.walk.seen(rows, columns, self.walk.facts(batch, refs))
        if self.walk.segmented:
            same = refs["row_ids"][0][:, :1] == refs["column_ids"][0][:1, :]
            seen = same if seen is None else seen & same
        return seen

    def steps(self, refs, place, body):
        """body(mask or None) if the tile visits this step's block.

        Args:
          place: sequence, query head, tile, step.
        """
        batch, _, tile, step = place
        walk = self.walk
        low, full_low, full_high, high = (refs["bounds"][batch, tile * 4 + i] for i in range(4))
        block = low + step
        visits = block < high
        if "alibi_slopes" in refs or walk.spec.bias is not None:
            corner = (tile * walk.tile, block * walk.block)
            added = functools.partial(self.bias, refs, place, corner)
            body = functools.partial(body, bias=added)
        if not walk.masked:
            pl.when(visits)(functools.partial(body, None))
            return
        full = (block >= full_low) & (block < full_high)
        pl.when(visits & full)(functools.partial(body, None))

        @pl.when(visits & ~full)
        def _():
            first = (tile * walk.tile, block * walk.block)
            body(self.keep(refs, batch, first, (walk.tile, walk.block)))


def _forward_body(kernel: Kernel, refs):
    place = [pl.program_id(i) for i in range(4)]
    batch, head, step = place[0], place[1], place[3]
    peak, total, acc = refs["peak"], refs["total"], refs["acc"]

    @pl.when(step == 0)
    def _():
        peak[...] = jnp.full(peak.shape, -jnp.inf, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        if "sinks" in refs:
            peak[...] = jnp.zeros(peak.shape, jnp.float32) + refs["sinks"][batch, head]
            total[...] = jnp.ones(total.shape, jnp.float32)
        acc[...] = jnp.zeros(acc.shape, jnp.float32)

    def block(mask, bias=None):
        q, k, v = (refs[name][0, 0] for name in "qkv")
        scores = kernel.capped(kernel.product(q, k, _NT))[0]
        if bias is not None:
            scores = scores + bias()
        if mask is not None:
            scores = jnp.where(mask, scores, -jnp.inf)
        before = peak[...]
        now = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
        base = jnp.where(now == -jnp.inf, 0.0, now)
        weights = jnp.exp(scores - base[:, :1])
        decay = jnp.exp(before - base)
        total[...] = total[...] * decay + jnp.sum(weights, axis=1, keepdims=True)
        acc[...] = acc[...] * decay[:, :1] + kernel.product(weights.astype(v.dtype), v, _NN)
        peak[...] = now

    kernel.steps(refs, place, block)

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        sums = total[...]
        some = sums > 0.0
        inverse = jnp.where(some, 1.0 / jnp.where(some, sums, 1.0), 0.0)
        refs["o"][0, 0] = (acc[...] * inverse[:, :1]).astype(refs["o"].dtype)
        lse = jnp.where(some, peak[...] + jnp.log(jnp.where(some, sums, 1.0)), -jnp.inf)
        refs["lse"][0, 0] = lse.T[:1]


def _rise(kernel: Kernel, refs, mask, bias, *, by_keys: bool):
    """(weights, d loss / d scores) of a block, rows being keys or queries."""
    q, k, v, do = (refs[name][0, 0] for name in ("q", "k", "v", "do"))
    pairs = ((k, q), (v, do)) if by_keys else ((q, k), (do, v))
    scores, slope = kernel.capped(kernel.product(*pairs[0], _NT))
    if bias is not None:
        scores = scores + bias()
    if by_keys:  # statistics of the queries, along the columns
        lse, delta = refs["log_sum"][0, 0], refs["delta"][0, 0]
    else:
        lse, delta = refs["lse_column"][:, :1], refs["delta_column"][:, :1]
    weights = jnp.exp(scores - lse)
    if mask is not None:
        weights = jnp.where(mask, weights, 0.0)
    rise = weights * (kernel.product(*pairs[1], _NT) - delta)
    return weights, rise if slope is None else rise * slope


def _dq_body(kernel: Kernel, refs):
    place = [pl.program_id(i) for i in range(4)]
    step, acc = place[3], refs["acc"]

    @pl.when(step == 0)
    def _():
        acc[...] = jnp.zeros(acc.shape, jnp.float32)
        for name, column in (("log_sum", "lse_column"), ("delta", "delta_column")):
            row = refs[name][0, 0]
            refs[column][...] = jnp.broadcast_to(row, (LANES, row.shape[1])).T

    def block(mask, bias=None):
        rise = _rise(kernel, refs, mask, bias, by_keys=False)[1]
        k = refs["k"][0, 0]
        acc[...] += kernel.product(rise.astype(k.dtype), k, _NN)

    kernel.steps(refs, place, block)

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        refs["dq"][0, 0] = (acc[...] * kernel.walk.spec.scale).astype(refs["dq"].dtype)


def _dkv_body(kernel: Kernel, refs):
    batch, kv_head, tile, member, step = (pl.program_id(i) for i in range(5))
    place = (batch, kv_head * kernel.group + member, tile, step)
    dk, dv = refs["dk_acc"], refs["dv_acc"]

    @pl.when((member == 0) & (step == 0))
    def _():
        dk[...] = jnp.zeros(dk.shape, jnp.float32)
        dv[...] = jnp.zeros(dv.shape, jnp.float32)

    def block(mask, bias=None):
        weights, rise = _rise(kernel, refs, mask, bias, by_keys=True)
        q, do = refs["q"][0, 0], refs["do"][0, 0]
        dv[...] += kernel.product(weights.astype(do.dtype), do, _NN)
        dk[...] += kernel.product(rise.astype(q.dtype), q, _NN)

    kernel.steps(refs, place, block)

    @pl.when((member == kernel.group - 1) & (step == pl.num_programs(4) - 1))
    def _():
        refs["dk"][0, 0] = (dk[...] * kernel.walk.spec.scale).astype(refs["dk"].dtype)
        refs["dv"][0, 0] = dv[...].astype(refs["dv"].dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Where a program of the grid finds its parts.

    Attributes:
      walk: tiles over blocks.
      group: query heads of one kv head.
      by_keys: the grid is (B, K, tile of keys, member of the group, block of queries), else
        (B, N, tile of queries, block of keys).
    """

    walk: Walk
    group: int
    by_keys: bool

    def _place(self, ids, bounds):
        """(sequence, query head, kv head, tile, block) of a program; past the end, the last."""
        if self.by_keys:
            batch, kv_head, tile, member, step = ids
            head = kv_head * self.group + member
        else:
            batch, head, tile, step = ids
            kv_head = lax.div(head, jnp.int32(self.group))
        return batch, head, kv_head, tile, self.block_at((batch, head, tile, step), bounds)

    def block_at(self, place, bounds):
        """The block of a step; past the end, the last."""
        batch, _, tile, step = place
        return jnp.minimum(bounds[batch, tile * 4] + step, bounds[batch, tile * 4 + 3] - 1)

    def kernel(self, names: tuple[str, ...]) -> Kernel:
        """The kernel over arrays of these names."""
        return Kernel(walk=self.walk, group=self.group, names=names)

    def more(self) -> dict:
        """Arrays beside those of the call, with their blocks."""
        return {}

    def part(self, shape: tuple[int, ...], *, head: str | None, rows: bool, last: bool = False):
        """A block of an array.

        Args:
          shape: of the block, without the dims of sequence and head.
          head: `query`, `kv`, or None for arrays without heads.
          rows: whether it goes with the tile, or with the block.
          last: whether the counted dim is the last one.
        """

        def where(*ids_and_refs):
            ids, bounds = ids_and_refs[:-2], ids_and_refs[-2]
            batch, of_query, of_kv, tile, block = self._place(ids, bounds)
            number = tile if rows else block
            tail = (0, number) if last else (number, 0)
            if head is None:
                return (batch, *tail)
            return (batch, of_query if head == "query" else of_kv, *tail)

        return pl.BlockSpec((1, *shape) if head is None else (1, 1, *shape), where)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """The arrays of one kernel: blocks of inputs and outputs, scratch, and the body."""

    body: Callable[[Kernel, dict[str, Any]], None]
    layout: Layout
    grid: tuple[int, ...]
    inputs: dict
    outputs: dict
    scratch: dict
    interpret: bool

    def __call__(self, extras: Extras) -> tuple[jax.Array, ...]:
        walk = self.layout.walk
        info = walk.info(extras)
        info = jnp.zeros((walk.batch, 4), jnp.int32) if info is None else info
        inputs = self.inputs | self._ids(extras) | self.layout.more()
        if extras.alibi_slopes is not None:
            inputs["alibi_slopes"] = (extras.alibi_slopes, pl.BlockSpec(memory_space=pltpu.SMEM))
        names = ("bounds", "info", *inputs, *self.outputs, *self.scratch)
        kernel = self.layout.kernel(names)

        def body(*refs):
            self.body(kernel, dict(zip(names, refs, strict=True)))

        parallel = len(self.grid) - (2 if self.layout.by_keys else 1)
        kinds: Any = ("parallel",) * parallel + ("arbitrary",) * (len(self.grid) - parallel)
        return pl.pallas_call(
            body,
            out_shape=[shape for shape, _ in self.outputs.values()],
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=self.grid,
                in_specs=[spec for _, spec in inputs.values()],
                out_specs=[spec for _, spec in self.outputs.values()],
                scratch_shapes=list(self.scratch.values()),
            ),
            compiler_params=pltpu.CompilerParams(dimension_semantics=kinds),
            interpret=self.interpret,
        )(walk.every(extras), info, *(array for array, _ in inputs.values()))

    def _ids(self, extras: Extras) -> dict:
        """Segments of rows, along the lanes, and of columns, along the sublanes."""
        walk = self.layout.walk
        if not walk.segmented:
            return {}
        rows, columns = extras.query_segments, extras.key_segments
        if walk.transposed:
            rows, columns = columns, rows
        rows = pad(rows, 1, walk.tile, -1 if not walk.transposed else -2)
        columns = pad(columns, 1, walk.block, -2 if not walk.transposed else -1)
        rows = jnp.broadcast_to(rows[:, :, None], (*rows.shape, LANES))
        columns = jnp.broadcast_to(columns[:, None], (columns.shape[0], SUBLANES, columns.shape[1]))
        part = self.layout.part
        return {
            "row_ids": (rows, part((walk.tile, LANES), head=None, rows=True)),
            "column_ids": (
                columns,
                part((SUBLANES, walk.block), head=None, rows=False, last=True),
            ),
        }


def _laid(x: jax.Array, to: int) -> jax.Array:
    """[B, T, N, H] -> [B, N, padded T, H]."""
    return pad(x, 1, to).transpose(0, 2, 1, 3)


def _back(x: jax.Array, length: int) -> jax.Array:
    return x.transpose(0, 2, 1, 3)[:, :length]


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    extras: Extras,
    *,
    spec: Spec,
    tiles: TpuTiles,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Runs the forward: out [B, T, N, Hv] and lse [B, N, T], as `reference` returns them."""
    tile, block = tiles.fitted(q.shape[1], k.shape[1])
    facts: dict[str, Any] = {"spec": spec, "names": extras.names, "batch": q.shape[0]}
    facts |= {"queries": q.shape[1], "keys": k.shape[1], "tile": tile, "block": block}
    layout = Layout(walk=Walk(**facts), group=q.shape[2] // k.shape[2], by_keys=False)
    return launch(layout, (q, k, v), extras, interpret=interpret)


def launch(layout: Layout, qkv, extras: Extras, *, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """Runs the forward of a layout."""
    (q, k, v), walk = qkv, layout.walk
    batch, queries, heads, width = q.shape
    value_width, tile, block = v.shape[3], walk.tile, walk.block
    part = layout.part
    q, k, v = _laid(q, tile), _laid(k, block), _laid(v, block)
    inputs = {
        "q": (q, part((tile, width), head="query", rows=True)),
        "k": (k, part((block, width), head="kv", rows=False)),
        "v": (v, part((block, value_width), head="kv", rows=False)),
    }
    if extras.sinks is not None:
        inputs["sinks"] = (extras.sinks, pl.BlockSpec(memory_space=pltpu.SMEM))
    rows = walk.tiles * tile
    outputs = {
        "o": (
            jax.ShapeDtypeStruct((batch, heads, rows, value_width), q.dtype),
            part((tile, value_width), head="query", rows=True),
        ),
        "lse": (
            jax.ShapeDtypeStruct((batch, heads, 1, rows), jnp.float32),
            part((1, tile), head="query", rows=True, last=True),
        ),
    }
    column = pltpu.VMEM((tile, LANES), jnp.float32)
    acc = pltpu.VMEM((tile, value_width), jnp.float32)
    out, lse = Call(
        body=_forward_body,
        layout=layout,
        grid=(batch, heads, walk.tiles, walk.most),
        inputs=inputs,
        outputs=outputs,
        scratch={"peak": column, "total": column, "acc": acc},
        interpret=interpret,
    )(extras)
    return _back(out, queries), lse[:, :, 0, :queries]


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    extras: Extras,
    results: tuple[jax.Array, jax.Array],
    gradients: tuple[jax.Array, jax.Array],
    *,
    spec: Spec,
    tiles: TpuTiles,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gradients by q, k, v, and d loss / d (score of a row's sink) as [B, N, T].

    Args:
      results: out and lse of the forward.
      gradients: d loss / d out, d loss / d lse.
    """
    queries, keys = q.shape[1], k.shape[1]
    of_queries, of_keys = tiles.fitted(queries, keys)
    facts: dict[str, Any] = {"spec": spec, "names": extras.names, "batch": q.shape[0]}
    facts |= {"queries": queries, "keys": keys}
    by_queries = Walk(**facts, tile=of_queries, block=of_keys)
    by_keys = Walk(**facts, tile=of_keys, block=of_queries, transposed=True)
    group = q.shape[2] // k.shape[2]
    layouts = (
        Layout(walk=by_queries, group=group, by_keys=False),
        Layout(walk=by_keys, group=group, by_keys=True),
    )
    return launch_backward(layouts, (q, k, v), extras, (results, gradients), interpret=interpret)


def launch_backward(
    layouts: tuple[Layout, Layout], qkv, extras: Extras, passed, *, interpret: bool
):
    """Runs the backward of a layout by queries and one by keys.

    Args:
      passed: (results, gradients); see `backward`.
    """
    (q, k, v), ((out, lse), (dout, dlse)) = qkv, passed
    queries, keys = q.shape[1], k.shape[1]
    of_queries, of_keys = layouts[0].walk.tile, layouts[0].walk.block
    wide = dout.astype(jnp.float32) * out.astype(jnp.float32)
    delta = jnp.sum(wide, axis=-1).transpose(0, 2, 1) - dlse
    # exp(x - inf) is 0: rows that see nothing, and rows past the end, count for nothing.
    log_sum = jnp.where(lse == -jnp.inf, jnp.inf, lse)
    arrays = {
        "q": _laid(q, of_queries),
        "k": _laid(k, of_keys),
        "v": _laid(v, of_keys),
        "do": _laid(dout, of_queries),
        "log_sum": pad(log_sum, 2, of_queries, jnp.inf)[:, :, None],
        "delta": pad(delta, 2, of_queries)[:, :, None],
    }
    dq = _query_gradients(layouts[0], arrays, extras, interpret)
    dk, dv = _key_value_gradients(layouts[1], arrays, extras, interpret)
    return _back(dq, queries), _back(dk, keys), _back(dv, keys), delta


def _parts(layout: Layout, arrays: dict) -> dict:
    """The arrays of a backward kernel with their blocks."""
    by_keys, walk = layout.by_keys, layout.walk
    of_queries, of_keys = (walk.block, walk.tile) if by_keys else (walk.tile, walk.block)
    out = {}
    for name in ("q", "do"):
        shape = (of_queries, arrays[name].shape[-1])
        out[name] = (arrays[name], layout.part(shape, head="query", rows=not by_keys))
    for name in ("k", "v"):
        shape = (of_keys, arrays[name].shape[-1])
        out[name] = (arrays[name], layout.part(shape, head="kv", rows=by_keys))
    for name in ("log_sum", "delta"):
        part = layout.part((1, of_queries), head="query", rows=not by_keys, last=True)
        out[name] = (arrays[name], part)
    return out


def _query_gradients(layout: Layout, arrays: dict, extras: Extras, interpret: bool) -> jax.Array:
    q, walk, heads = arrays["q"], layout.walk, arrays["q"].shape[1]
    column = pltpu.VMEM((walk.tile, LANES), jnp.float32)
    (dq,) = Call(
        body=_dq_body,
        layout=layout,
        grid=(walk.batch, heads, walk.tiles, walk.most),
        inputs=_parts(layout, arrays),
        outputs={
            "dq": (
                jax.ShapeDtypeStruct(q.shape, q.dtype),
                layout.part((walk.tile, q.shape[-1]), head="query", rows=True),
            )
        },
        scratch={
            "acc": pltpu.VMEM((walk.tile, q.shape[-1]), jnp.float32),
            "lse_column": column,
            "delta_column": column,
        },
        interpret=interpret,
    )(extras)
    return dq


def _key_value_gradients(layout: Layout, arrays: dict, extras: Extras, interpret: bool):
    walk, heads, kv_heads = layout.walk, arrays["q"].shape[1], arrays["k"].shape[1]
    outputs, scratch = {}, {}
    for name in ("k", "v"):
        x = arrays[name]
        part = layout.part((walk.tile, x.shape[-1]), head="kv", rows=True)
        outputs[f"d{name}"] = (jax.ShapeDtypeStruct(x.shape, x.dtype), part)
        scratch[f"d{name}_acc"] = pltpu.VMEM((walk.tile, x.shape[-1]), jnp.float32)
    return Call(
        body=_dkv_body,
        layout=layout,
        grid=(walk.batch, kv_heads, walk.tiles, heads // kv_heads, walk.most),
        inputs=_parts(layout, arrays),
        outputs=outputs,
        scratch=scratch,
        interpret=interpret,
    )(extras)
