"""The Hopper forward: which kernel runs, and on what (Pallas, Mosaic GPU backend)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention.mosaic_gpu_ahead import ForwardAhead
from pallas_kernels.flash_attention.mosaic_gpu_forward import Forward, Tiles
from pallas_kernels.flash_attention.mosaic_gpu_joined import ForwardJoined
from pallas_kernels.flash_attention.mosaic_gpu_own import ForwardOwn
from pallas_kernels.flash_attention.padding import pad
from pallas_kernels.flash_attention.pieces import CONSUMERS, Shape, data_of_walk
from pallas_kernels.flash_attention.problem import Extras, Spec
from pallas_kernels.flash_attention.ranges import Walk
from pallas_kernels.once import lowered_once
from pallas_kernels.warpgroups import run_kernel

__all__ = ["Tiles", "forward", "launch"]


def launch(
    walk: Walk, qkv, data: dict, *, tiles: Tiles, processors: int, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """Runs the forward for a walk and what it reads, by name: out [B, T, N, Hv], lse [B, N, T]."""
    q, k, v = qkv
    batch, queries, heads, _ = q.shape
    count = batch * walk.tiles * heads
    ctas = min(processors, count) if tiles.persistent else count
    shape = Shape.of(q, v, interpret)

    kind = ForwardAhead if tiles.ahead else ForwardOwn if walk.own else Forward
    kind = ForwardJoined if tiles.joined else kind
    kernel = kind(shape, walk, tiles, ctas)
    inputs = {"q": pad(q, 1, 8), "k": pad(k, 1, 8), "v": pad(v, 1, 8)} | data
    inputs |= shape.turns(walk, ctas, data.get("table") if tiles.by_data else None)
    outputs = {
        "o": jax.ShapeDtypeStruct((*inputs["q"].shape[:3], v.shape[-1]), q.dtype),
        "lse": jax.ShapeDtypeStruct((batch, heads, walk.tiles * walk.tile), jnp.float32),
    }

    how = {"name": "flash_attention", "grid": {"cta": ctas}, "interpret": interpret}
    out, lse = run_kernel(kernel, inputs, outputs, **how)
    return out[:, :queries], lse[:, :, :queries]


@lowered_once("spec", "tiles", "processors", "interpret")
def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    extras: Extras,
    *,
    spec: Spec,
    tiles: Tiles,
    processors: int = 132,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Runs the forward: out [B, T, N, Hv] and lse [B, N, T], as `reference` returns them."""
    walk = Walk(
        spec=spec,
        batch=q.shape[0],
        queries=q.shape[1],
        keys=k.shape[1],
        tile=CONSUMERS * tiles.block_q,
        block=tiles.block_kv,
        names=extras.names,
    )
    data = data_of_walk(walk, extras, rows=walk.tile, columns=walk.block)
    if extras.sinks is not None:
        data["sinks"] = extras.sinks
    options = {"tiles": tiles, "processors": processors, "interpret": interpret}
    return launch(walk, (q, k, v), data, **options)
