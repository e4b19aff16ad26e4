"""python -m pallas_kernels.linear_attention.bench [part of a case's name …]: times every case.

One JSON line a case, pass and implementation, with tokens a second and the ratio to the limit of
the forward's bytes or products. The peer is the plain chunked form of `jaxllm.ops` in the same run;
errors of both against the loop over tokens are taken on one short sequence of the case.
"""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.linear_attention import linear_attention
from pallas_kernels.linear_attention.shapes import CASES, Shaped
from pallas_kernels.timing import errors_of, time_scans

__all__ = ["FORMS", "draw", "main"]


def draw(case: Shaped, seed: int) -> tuple:
    """q, k, v, log decays, beta (or None) and the gradient of the result."""

    @jax.jit
    def arrays(key):
        keys = jax.random.split(key, 6)
        tokens = (case.batch, case.length)
        normal = functools.partial(jax.random.normal, dtype=jnp.float32)
        q, k = (normal(x, (*tokens, case.key_heads, case.state)) for x in keys[:2])
        q, k = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
        v, do = (normal(x, (*tokens, case.heads, case.width)) for x in keys[2:4])
        shape = (*tokens, case.heads, *([case.state] if case.channels else []))
        decay = -jax.nn.softplus(normal(keys[4], shape) - 3.0)
        beta = jax.nn.sigmoid(normal(keys[5], (*tokens, case.heads))) if case.delta else None
        return *(x.astype(jnp.bfloat16) for x in (q, k, v)), decay, beta, do.astype(jnp.bfloat16)

    return arrays(jax.random.key(seed))


def _op(how: str, q, k, v, decay, beta):
    found: Any = importlib.import_module("jaxllm.ops.linear_attention")
    return found.linear_attention((q, k, v), gates=found.Gates(decay, beta), implementation=how)[0]


def _exact(q, k, v, decay, beta):
    how = {"log_decay": decay, "beta": beta, "implementation": "reference"}
    return linear_attention(q, k, v, **how)[0]


FORMS = {
    "mosaic_gpu": functools.partial(_op, "mosaic_gpu"),
    "chunked, jnp": functools.partial(_op, "chunked"),
}


def _error(function, arguments: tuple) -> list[float]:
    """Relative errors of the result and of each gradient, on a short sequence."""
    short = [None if z is None else z[:1, :512] for z in arguments]
    return errors_of(function, _exact, tuple(short))


def main(words: list[str]) -> None:
    """Times the cases whose name holds one of `words`, all without any."""
    time_scans(CASES, FORMS, draw, _error, words=words, rounds=6)


if __name__ == "__main__":
    main(sys.argv[1:])
