"""Attention that is compiled but never runs: it takes and gives what another device's kernel does.

A program for a GPU that is not here is compiled for a CPU to learn its memory. A kernel keeps
scores out of memory, so neither may what stands in for it: one opaque call each way, with the
kernel's arguments and results.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import jax
import jax.numpy as jnp

__all__ = ["attention", "described", "standing_in"]

_described = jax.make_user_context(None)  # part of jit's cache keys: no trace is used for another


def described() -> str | None:
    """The platform whose kernels are stood in for, or None."""
    return _described.value


@contextmanager
def standing_in(platform: str) -> Iterator[None]:
    """Attention traced inside that a kernel of `platform` would serve is only described."""
    with _described(platform):
        yield


def _never(*_: Any) -> NoReturn:
    raise RuntimeError("a program that stands in for another device's was run; it only describes")


def _call(shapes: Any, *args: jax.Array) -> Any:
    return jax.pure_callback(_never, shapes, *args)


@jax.custom_vjp
def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """An array like `jaxllm.ops.attention.reference`'s, by a call that keeps no scores."""
    return _forward(q, k, v)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
    batch, length, heads, _ = q.shape
    out = jax.ShapeDtypeStruct((batch, length, heads, v.shape[-1]), v.dtype)
    lse = jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)
    made = _call((out, lse), q, k, v)
    return made[0], (q, k, v, *made)


def _backward(kept: Any, dout: jax.Array) -> Any:
    shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in kept[:3])
    return _call(shapes, *kept, dout)


attention.defvjp(_forward, _backward)
