"""python -m pallas_kernels.paged_attention.bench [part of a case's name …]: times every case.

One JSON line a case and implementation, with the bytes of keys and values read a second. In the
same process: the gather of whole tables in plain jnp, and cuDNN on a dense cache of the same keys,
which needs no table.
"""

from __future__ import annotations

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.errors import UnsupportedError
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.paged_attention.shapes import CASES, Shaped
from pallas_kernels.timing import seconds

_COPY = 2.8e12  # bytes a second that an H100 copies
_PRODUCT = 800e12
_ROTATED = 200e6


def _draw(case: Shaped, copies: int) -> list[tuple]:
    width = -(-case.length // case.page)
    pages = case.sequences * width

    @jax.jit
    def pools(key):
        keys = jax.random.split(key, 3)
        pool = (pages, case.page, case.kv_heads, case.width)
        q = (case.sequences, case.queries, case.heads, case.width)
        draw = functools.partial(jax.random.normal, dtype=jnp.bfloat16)
        return draw(keys[0], q), draw(keys[1], pool), draw(keys[2], pool)

    random = np.random.default_rng(0)
    lengths = np.asarray(case.lengths)
    out = []
    for i in range(copies):
        table = random.permutation(pages).reshape(case.sequences, width).astype(np.int32)
        rows = np.arange(case.sequences, dtype=np.int32)
        counts = np.minimum(lengths, case.queries).astype(np.int32)
        blocks = (rows, (lengths - counts).astype(np.int32), counts)
        given = jax.device_put((table, np.zeros_like(rows), blocks))
        out.append((*pools(jax.random.key(i)), *given))
    return out


def _gathered(q, k, v, table, firsts, blocks):
    """Whole tables in the dtype of the pages, by jax's own attention."""
    del firsts
    rows, starts, counts = blocks
    k, v = (jnp.take(x, table[rows], axis=0).reshape(q.shape[0], -1, *x.shape[2:]) for x in (k, v))
    return _dense("xla", q, k, v, starts + counts)


def _dense(implementation, q, k, v, lengths):
    return jax.nn.dot_product_attention(
        q, k, v, key_value_seq_lengths=lengths, implementation=implementation
    )


def _line(name: str, case: Shaped, implementation: str, time: float, **more) -> None:
    bound = max(case.nbytes / _COPY, case.flops / _PRODUCT)
    line = {"case": name, "implementation": implementation, "us": round(1e6 * time, 2)}
    line |= {"TB/s": round(case.nbytes / time / 1e12, 3), "of_limit": round(bound / time, 3)}
    print(json.dumps(line | more | {"device": jax.devices()[0].device_kind}), flush=True)


def main(names: list[str]) -> None:
    """Time the cases whose names contain one of `names`, or all."""
    for name, case in CASES.items():
        if names and not any(part in name for part in names):
            continue
        copies = max(1, int(-(-_ROTATED // case.nbytes)))
        arguments = _draw(case, min(copies, 32))
        try:
            call = functools.partial(paged_attention, implementation="mosaic_gpu")
            found, exact = (
                jax.jit(functools.partial(paged_attention, implementation=which))(*arguments[0])[0]
                for which in ("mosaic_gpu", "reference")
            )
            error = jnp.max(jnp.abs(found.astype(jnp.float32) - exact.astype(jnp.float32)))
            error = float(error / jnp.max(jnp.abs(exact.astype(jnp.float32))))
            time, spread = seconds(call, arguments, calls=16)
            _line(name, case, "mosaic_gpu", time, spread_us=round(1e6 * spread, 2), error=error)
        except UnsupportedError as reason:
            print(json.dumps({"case": name, "skipped": str(reason)}), flush=True)
        if case.queries > 1:  # who sees whom is no plain length there
            continue
        time, _ = seconds(_gathered, arguments[:4], calls=4)
        _line(name, case, "gather, jnp", time)
        dense = []
        for q, k, v, _, _, (_, starts, counts) in arguments:
            shape = (case.sequences, -1, *k.shape[2:])
            dense.append((q, k.reshape(shape), v.reshape(shape), starts + counts))
        try:
            time, _ = seconds(functools.partial(_dense, "cudnn"), dense, calls=16)
            _line(name, case, "cuDNN, dense cache", time)
        except (RuntimeError, ValueError, NotImplementedError) as reason:
            print(json.dumps({"case": name, "cuDNN": str(reason)[:200]}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
