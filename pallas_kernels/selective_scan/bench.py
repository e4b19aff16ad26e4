"""python -m pallas_kernels.selective_scan.bench [part of a case's name …]: times every case.

One JSON line a case, pass and implementation, with tokens a second and the ratio to the limit of
the forward's bytes. The peer is the plain chunked form of `jaxllm.ops` in the same run; errors of
both against the loop over tokens are taken on one short sequence of the case.
"""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.selective_scan import selective_scan
from pallas_kernels.selective_scan.shapes import CASES, Shaped
from pallas_kernels.timing import errors_of, time_scans

__all__ = ["FORMS", "draw", "main"]


def draw(case: Shaped, seed: int) -> tuple:
    """x, step sizes, a, b, c and the gradient of the result."""

    @jax.jit
    def arrays(key):
        keys = jax.random.split(key, 5)
        tokens = (case.batch, case.length)
        normal = functools.partial(jax.random.normal, dtype=jnp.float32)
        x, dy = (normal(k, (*tokens, case.channels)).astype(jnp.bfloat16) for k in keys[:2])
        dt = jax.nn.softplus(normal(keys[2], (*tokens, case.channels)) - 4.0)
        b, c = (normal(k, (*tokens, case.state)) for k in keys[3:])
        a = -jnp.arange(1.0, case.state + 1, dtype=jnp.float32)
        return x, dt, jnp.broadcast_to(a, (case.channels, case.state)), b, c, dy

    return arrays(jax.random.key(seed))


def _op(how: str, x, dt, a, b, c):
    op: Any = importlib.import_module("jaxllm.ops.ssm")
    inputs = op.Selective(x, dt, b, c, a, jnp.zeros(a.shape[0], jnp.float32))
    return op.selective_scan(inputs, implementation=how)[0]


def _exact(x, dt, a, b, c):
    return selective_scan(x, dt, a, b, c, implementation="reference")[0]


FORMS = {
    "mosaic_gpu": functools.partial(_op, "mosaic_gpu"),
    "chunked, jnp": functools.partial(_op, "chunked"),
}


def _error(function, arguments: tuple) -> list[float]:
    """Relative errors of the result and of each gradient, on a short sequence."""
    short = [z if i == 2 else z[:1, :512] for i, z in enumerate(arguments)]
    return errors_of(function, _exact, tuple(short))


def main(words: list[str]) -> None:
    """Times the cases whose name holds one of `words`, all without any."""
    time_scans(CASES, FORMS, draw, _error, words=words, rounds=6)


if __name__ == "__main__":
    main(sys.argv[1:])
