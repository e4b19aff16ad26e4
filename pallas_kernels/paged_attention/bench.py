"""python -m pallas_kernels.paged_attention.bench [part of a case's name …]: times every case.

One JSON line a case and implementation, with the bytes of keys and values read a second: pages of
bfloat16, of int8 and of fp8 with their scales. In the same process: the gather of whole tables in
plain jnp, and cuDNN on a dense cache of the same keys, which needs no table.
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
from pallas_kernels.paged_attention.fits import CODES
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


def _coded(arguments: list[tuple], dtype: str) -> list[tuple]:
    """The same with pages of 8 bits and their scales."""
    whole, top = jnp.issubdtype(dtype, jnp.integer), CODES[dtype]

    @jax.jit
    def code(pool):
        wide = pool.astype(jnp.float32)
        scale = jnp.max(jnp.abs(wide), axis=-1, keepdims=True) / top
        codes = (jnp.round(wide / scale) if whole else wide / scale).astype(dtype)
        return codes, scale[..., 0].transpose(0, 2, 1)

    out = []
    for q, k, v, *given in arguments:
        (k, of_k), (v, of_v) = code(k), code(v)
        out.append((q, k, v, *given, jnp.stack([of_k, of_v], axis=2)))
    return out


def _paged(q, k, v, table, firsts, blocks, scales=None, *, implementation):
    call = functools.partial(paged_attention, scales=scales, implementation=implementation)
    return call(q, k, v, table, firsts, blocks)


def _ours(name: str, case: Shaped, arguments: list[tuple], kind: str) -> None:
    """Times our kernel, and compares it with the reference on the same pages."""
    nbytes = case.nbytes if kind == "bfloat16" else case.coded_nbytes
    try:
        found, exact = (
            jax.jit(functools.partial(_paged, implementation=which))(*arguments[0])[0]
            for which in ("mosaic_gpu", "reference")
        )
        error = jnp.max(jnp.abs(found.astype(jnp.float32) - exact.astype(jnp.float32)))
        error = float(error / jnp.max(jnp.abs(exact.astype(jnp.float32))))
        call = functools.partial(_paged, implementation="mosaic_gpu")
        time, spread = seconds(call, arguments, calls=16)
    except UnsupportedError as reason:
        print(json.dumps({"case": name, "pages": kind, "skipped": str(reason)}), flush=True)
        return
    more = {"pages": kind, "spread_us": round(1e6 * spread, 2), "error": error}
    _line(name, case, "mosaic_gpu", time, nbytes=nbytes, **more)


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


def _line(name: str, case: Shaped, implementation: str, time: float, *, nbytes=None, **more):
    nbytes = nbytes or case.nbytes
    bound = max(nbytes / _COPY, case.flops / _PRODUCT)
    line = {"case": name, "implementation": implementation, "us": round(1e6 * time, 2)}
    line |= {"TB/s": round(nbytes / time / 1e12, 3), "of_limit": round(bound / time, 3)}
    print(json.dumps(line | more | {"device": jax.devices()[0].device_kind}), flush=True)


def main(names: list[str]) -> None:
    """Time the cases whose names contain one of `names`, or all."""
    for name, case in CASES.items():
        if names and not any(part in name for part in names):
            continue
        copies = max(1, int(-(-_ROTATED // case.nbytes)))
        arguments = _draw(case, min(copies, 32))
        _ours(name, case, arguments, "bfloat16")
        for dtype in CODES:
            _ours(name, case, _coded(arguments, dtype), dtype)
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
