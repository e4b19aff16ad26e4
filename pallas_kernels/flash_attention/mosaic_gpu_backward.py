"""The Hopper backward: which kernels run, and on what (Pallas, Mosaic GPU backend)."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.flash_attention.mosaic_gpu_gradients import (
    BackwardTiles,
    KeyValueGradients,
    QueryGradients,
    SplitKeyValueGradients,
)
from pallas_kernels.flash_attention.mosaic_gpu_gradients_ahead import (
    KeyValueGradientsAhead,
    KeyValueGradientsRunning,
    SplitAhead,
)
from pallas_kernels.flash_attention.mosaic_gpu_one_pass import AllGradients
from pallas_kernels.flash_attention.padding import pad
from pallas_kernels.flash_attention.pieces import CONSUMERS, LOG2E, Shape, data_of_walk
from pallas_kernels.flash_attention.problem import Extras, Spec
from pallas_kernels.flash_attention.ranges import Walk
from pallas_kernels.once import lowered_once
from pallas_kernels.warpgroups import run_kernel

__all__ = ["BackwardTiles", "Walks", "backward", "launch"]


@dataclasses.dataclass(frozen=True)
class Walks:
    """The walk of the kernel for dq and of that for dk and dv."""

    by_queries: Walk
    by_keys: Walk

    @classmethod
    def of(cls, make, tiles: BackwardTiles) -> Walks:
        """make(tile=, block=, transposed=) for each."""
        of_keys = 64 if tiles.split else CONSUMERS * 64
        return cls(
            make(tile=CONSUMERS * 64, block=tiles.dq_block_kv, transposed=False),
            make(tile=of_keys, block=tiles.block_q, transposed=True),
        )


def _of_keys(shape: Shape, walk: Walk, table, tiles: BackwardTiles, processors: int):
    """The kernel for dk and dv, its grid, and which tiles each program takes."""
    grid = {"batch": shape.batch, "tile": walk.tiles, "head": shape.kv_heads}
    if not tiles.running:
        kind = SplitAhead if tiles.keys_ahead else SplitKeyValueGradients
        return (kind if tiles.split else KeyValueGradients)(shape, walk, tiles), grid, {}
    kind = KeyValueGradientsAhead if tiles.keys_ahead else KeyValueGradientsRunning
    kernel = kind(shape, walk, tiles, min(processors, math.prod(grid.values())))
    return kernel, {"cta": kernel.ctas}, kernel.by_keys.turns(walk, kernel.ctas, table)


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _in_one_pass(shape: Shape, walk: Walk, inputs: dict, tiles: BackwardTiles, interpret: bool):
    """dq, dk and dv from one kernel, dq with rows to the end of the last block."""
    sizes = (shape.batch, walk.blocks * walk.block, shape.heads, shape.width)
    sums = jax.new_ref(jnp.zeros(sizes, jnp.float32))
    dk, dv = run_kernel(
        AllGradients(shape, walk, tiles, sums),
        inputs | {"delta": -inputs["delta"]},  # what the weights' gradients are begun from
        {"dk": _like(inputs["k"]), "dv": _like(inputs["v"])},
        name="flash_attention_dqkv",
        grid={"batch": shape.batch, "tile": walk.tiles, "head": shape.kv_heads},
        interpret=interpret,
    )
    return (jax.freeze(sums) * walk.spec.scale).astype(shape.dtype), dk, dv


def launch(
    walks: Walks, qkv, data, passed, *, tiles: BackwardTiles, processors: int, interpret: bool
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Runs the backward.

    Args:
      data: what each of `walks` reads, by name.
      passed: (results, gradients); see `backward`.
    """
    (q, k, v), ((out, lse), (dout, dlse)) = qkv, passed
    queries, keys, tile = q.shape[1], k.shape[1], CONSUMERS * 64
    shape = Shape.of(q, v, interpret)
    # exp2(x - inf) is 0: rows that see nothing, and rows past the end, count for nothing.
    log_sum = jnp.where(lse == -jnp.inf, jnp.inf, lse * LOG2E)
    inputs = {"q": pad(q, 1, 8), "k": pad(k, 1, 8), "v": pad(v, 1, 8), "do": pad(dout, 1, 8)}
    inputs["lse"] = pad(log_sum, 2, tile, jnp.inf)
    if tiles.delta:
        of_rows = {"o": pad(out, 1, 8), "dlse": pad(dlse, 2, tile)}
    else:
        wide = dout.astype(jnp.float32) * out.astype(jnp.float32)
        # The barrier keeps the sum over H a kernel of its own: fused into what follows it took over
        # four times as long on an H100.
        delta = lax.optimization_barrier(jnp.sum(wide, axis=-1)).transpose(0, 2, 1) - dlse
        inputs["delta"] = pad(delta, 2, tile)
        of_rows = {}
    by_queries, by_keys = walks.by_queries, walks.by_keys
    if tiles.one_pass:
        dq, dk, dv = _in_one_pass(shape, by_keys, inputs | data[1], tiles, interpret)
        return dq[:, :queries], dk[:, :keys], dv[:, :keys], inputs["delta"][:, :, :queries]
    tables = [one.get("table") if tiles.by_data else None for one in data]

    count = shape.batch * by_queries.tiles * shape.heads
    ctas = min(processors, count) if tiles.persistent else count
    outputs = {"dq": _like(inputs["q"])}
    if tiles.delta:
        outputs["delta"] = _like(inputs["lse"])
    dq, *made = run_kernel(
        QueryGradients(shape, by_queries, tiles, ctas),
        inputs | of_rows | data[0] | shape.turns(by_queries, ctas, tables[0]),
        outputs,
        name="flash_attention_dq",
        grid={"cta": ctas},
        interpret=interpret,
    )
    if made:
        (inputs["delta"],) = made
    kernel, grid, turns = _of_keys(shape, by_keys, tables[1], tiles, processors)
    dk, dv = run_kernel(
        kernel,
        inputs | data[1] | turns,
        {"dk": _like(inputs["k"]), "dv": _like(inputs["v"])},
        name="flash_attention_dkv",
        grid=grid,
        interpret=interpret,
    )
    return dq[:, :queries], dk[:, :keys], dv[:, :keys], inputs["delta"][:, :, :queries]


@lowered_once("spec", "tiles", "processors", "interpret")
def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    extras: Extras,
    results: tuple[jax.Array, jax.Array],
    gradients: tuple[jax.Array, jax.Array],
    *,
    spec: Spec,
    tiles: BackwardTiles,
    processors: int = 132,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gradients by q, k, v, and d loss / d (score of a row's sink) as [B, N, T].

    Args:
      results: out and lse of the forward.
      gradients: d loss / d out, d loss / d lse.
    """
    facts = {"spec": spec, "batch": q.shape[0], "queries": q.shape[1], "keys": k.shape[1]}
    walks = Walks.of(functools.partial(Walk, **facts, names=extras.names), tiles)
    rows = CONSUMERS * 64
    of = functools.partial(data_of_walk, extras=extras, rows=rows, columns=rows)
    data = (of(walks.by_queries), of(walks.by_keys))
    options = {"tiles": tiles, "processors": processors, "interpret": interpret}
    return launch(walks, (q, k, v), data, (results, gradients), **options)
