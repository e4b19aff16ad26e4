"""python -m pallas_kernels.ssd.bench [part of a case's name …]: times every case.

One JSON line a case, pass and implementation, with tokens a second and the ratio to the limit of
the forward's bytes or products. The peer is the plain chunked form of `jaxllm.ops` in the same run;
the error of both against the loop over tokens is taken on one short sequence of the case.
"""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.ssd import ssd
from pallas_kernels.ssd.shapes import CASES, Shaped
from pallas_kernels.timing import errors_of, time_scans

__all__ = ["main"]


def _draw(case: Shaped, seed: int) -> tuple:
    """x, dt, a, b, c and the gradient of y."""

    @jax.jit
    def arrays(key):
        keys = jax.random.split(key, 6)
        tokens = (case.batch, case.length)
        normal = functools.partial(jax.random.normal, dtype=jnp.bfloat16)
        x, dy = (normal(k, (*tokens, case.heads, case.width)) for k in keys[:2])
        b, c = (normal(k, (*tokens, case.groups, case.state)) for k in keys[2:4])
        dt = jax.nn.softplus(jax.random.normal(keys[4], (*tokens, case.heads)) - 3.0)
        a = -jnp.exp(jax.random.normal(keys[5], (case.heads,)))
        return x, dt, a, b * jnp.asarray(case.state**-0.5, b.dtype), c, dy

    return arrays(jax.random.key(seed))


def plain(x, dt, a, b, c):
    """The chunked form in plain jnp."""
    found: Any = importlib.import_module("jaxllm.ops.ssd")
    start = jnp.zeros((x.shape[0], *x.shape[2:], b.shape[3]), jnp.float32)
    y, _ = found.dual_chunked(found.Dual(x, dt, b, c, a, None), start, None)
    return y.astype(x.dtype)


def kernel(x, dt, a, b, c):
    """Ours for Hopper."""
    return ssd(x, dt, a, b, c, implementation="mosaic_gpu")[0]


def _exact(x, dt, a, b, c):
    wide = (z.astype(jnp.float32) for z in (x, dt, a, b, c))
    return ssd(*wide, implementation="reference")[0]


FORMS = {"mosaic_gpu": kernel, "chunked, jnp": plain}


def _error(function, arguments: tuple) -> list[float]:
    """Relative errors of y and of each gradient, on a short sequence."""
    short = [z[:1, :512] if z.ndim > 1 else z for z in arguments]
    return errors_of(function, _exact, tuple(short))


def main(words: list[str]) -> None:
    """Times the cases whose name holds one of `words`, all without any."""
    time_scans(CASES, FORMS, _draw, _error, words=words, rounds=8)


if __name__ == "__main__":
    main(sys.argv[1:])
