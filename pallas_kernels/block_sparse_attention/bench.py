"""python -m pallas_kernels.block_sparse_attention.bench [part of a case's name …]

One JSON line a case and pass: the time, that of the dense flash kernel on the same arrays, and
time / (dense time x share of visible pairs), which is 1 where sparsity costs nothing.
"""

from __future__ import annotations

import functools
import json
import sys

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_attention import block_sparse_attention
from pallas_kernels.block_sparse_attention.shapes import CASES, Shaped
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.timing import seconds

__all__ = ["main"]


def _draw(case: Shaped, calls: int) -> list[tuple]:
    q = (case.batch, case.length, case.heads, case.width)
    k = (case.batch, case.length, case.kv_heads, case.width)
    normal = jax.jit(jax.random.normal, static_argnums=(1, 2))
    keys = (jax.random.split(jax.random.key(i), 4) for i in range(calls))
    return [
        tuple(normal(key, s, jnp.bfloat16) for key, s in zip(four, (q, k, k, q), strict=True))
        for four in keys
    ]


def _passes(call, backward: bool):
    def run(q, k, v, dout):
        if not backward:
            return call(q, k, v)
        out, pull = jax.vjp(call, q, k, v)
        return out, pull(dout)

    return run


def main(words: list[str]) -> None:
    """Times the cases whose name holds one of `words`, or all."""
    for name, case in CASES.items():
        if words and not any(word in name for word in words):
            continue
        blocks = case.make(case.length, case.heads)
        density = float(blocks.dense().mean())
        drawn = _draw(case, 4)
        calls = {
            "sparse": functools.partial(
                block_sparse_attention, blocks=blocks, implementation="mosaic_gpu"
            ),
            "dense": functools.partial(flash_attention, implementation="mosaic_gpu"),
        }
        for backward in (False, True):
            times = {n: seconds(_passes(c, backward), drawn, calls=8)[0] for n, c in calls.items()}
            line = {"case": name, "pass": "fwd+bwd" if backward else "fwd"}
            line |= {"device": jax.devices()[0].device_kind, "density": round(density, 4)}
            line |= {f"{n}_us": round(1e6 * time, 1) for n, time in times.items()}
            line["ratio"] = round(times["sparse"] / (times["dense"] * density), 3)
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
