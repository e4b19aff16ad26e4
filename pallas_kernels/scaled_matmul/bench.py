"""python -m pallas_kernels.scaled_matmul.bench [part of a case's name …]: times every case.

One JSON line a case and implementation. In the same process: XLA's product of the same eight-bit
numbers with one scale a row (cuBLASLt), the bfloat16 product, and the rounding of the activations.
"""

from __future__ import annotations

import functools
import json
import sys

import jax
import jax.numpy as jnp

from pallas_kernels.scaled_matmul import BLOCK, rounded, scaled_matmul
from pallas_kernels.scaled_matmul.shapes import CASES, Shaped
from pallas_kernels.timing import seconds

__all__ = ["main"]

_ROTATED = 240e6  # bytes that the calls of one program read together; the L2 cache holds 50
_COPY = 2.8e12  # bytes a second that an H100 copies
_PRODUCT = 1600e12  # eight-bit operations a second that its tensor cores come to


def _draw(case: Shaped, copies: int, dtype) -> list[tuple]:
    keys = jax.random.split(jax.random.key(0), 3 * copies)

    @jax.jit
    def one(a, b, c):
        x = jax.random.normal(a, (case.rows, case.inputs), jnp.bfloat16)
        w = jax.random.normal(b, (case.outputs, case.inputs), jnp.bfloat16)
        if dtype == jnp.bfloat16:
            return x, w
        blocks = case.outputs // BLOCK, case.inputs // BLOCK
        codes, scale = rounded(x)
        return codes, scale, (64 * w).astype(dtype), jax.random.uniform(c, blocks, minval=0.5)

    return [one(*keys[3 * i : 3 * i + 3]) for i in range(copies)]


def _by_xla(x, x_scale, values, scale):
    dims = (((1,), (1,)), ((), ()))
    sums = jax.lax.dot_general(x, values, dims, preferred_element_type=jnp.float32)
    rows = jnp.repeat(scale[:, 0], BLOCK)
    return (sums * x_scale[:, :1] * rows[None]).astype(jnp.bfloat16)


def _line(name: str, case: Shaped, implementation: str, time: float, **more) -> None:
    bound = max(case.nbytes / _COPY, case.flops / _PRODUCT)
    line = {"case": name, "implementation": implementation, "us": round(1e6 * time, 1)}
    line |= {"of_limit": round(bound / time, 3), "tflops": round(case.flops / time / 1e12, 1)}
    print(json.dumps(line | more | {"device": jax.devices()[0].device_kind}), flush=True)


def main(names: list[str]) -> None:
    """Time the cases whose names contain one of `names`, or all."""
    for name, case in CASES.items():
        if names and not any(part in name for part in names):
            continue
        copies = max(2, int(-(-_ROTATED // case.nbytes)))
        arguments = _draw(case, copies, jnp.float8_e4m3fn)
        call = functools.partial(scaled_matmul, implementation="mosaic_gpu")
        part = slice(0, 512), slice(0, 4)
        x, x_scale, values, scale = arguments[0]
        some = x, x_scale, values[part[0]], scale[part[1]]
        exact = scaled_matmul(*some, out_dtype="float32", implementation="reference")
        error = jnp.abs(jax.jit(call)(*arguments[0])[:, part[0]] - exact).max()
        error = float(error / jnp.abs(exact).max())
        time, spread = seconds(call, arguments, calls=8)
        _line(name, case, "mosaic_gpu", time, error=error, spread_us=round(1e6 * spread, 1))
        _line(name, case, "one scale a row, XLA", seconds(_by_xla, arguments, calls=8)[0])
        plain = _draw(case, copies, jnp.bfloat16)
        _line(name, case, "bfloat16, XLA", seconds(lambda x, w: x @ w.T, plain, calls=8)[0])
        _line(name, case, "rounding", seconds(lambda x, w: rounded(x), plain, calls=8)[0])


if __name__ == "__main__":
    main(sys.argv[1:])
