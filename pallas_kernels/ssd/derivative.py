"""The scan by a pair of kernels, differentiable."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import sequential_vmap

from pallas_kernels.ssd.chunks import Chunks, chunks, padded

__all__ = ["Plan", "run"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static part of a run: hashable.

    Attributes:
      size: tokens of a chunk.
      forward, backward: kernels, functions at the top of a module; `backward` gives facts from
        which `decay_gradients` makes the gradients of dt and a.
      options: arguments of each by name.
    """

    size: int
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    options: tuple[tuple[tuple[str, Any], ...], tuple[tuple[str, Any], ...]] = ((), ())


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def run(x, dt, a, b, c, initial, number, plan: Plan):
    """(y, final state); differentiable by all but `number`. A vmapped axis becomes a loop.

    Args:
      x, dt, a, b, c: as of `ssd`.
      initial: float32 [B, N, M, H], or None for zeros.
      number: of `numbers`, or None.
    """
    return _forward(x, dt, a, b, c, initial, number, plan)[0]


def _forward(x, dt, a, b, c, initial, number, plan: Plan):
    @sequential_vmap
    def call(x, dt, a, b, c, initial, number):
        about = chunks(dt, a, number, plan.size)
        return plan.forward(x, b, c, about, initial, **dict(plan.options[0]))

    return call(x, dt, a, b, c, initial, number), (x, dt, a, b, c, initial, number)


def decay_gradients(facts: jax.Array, dt: jax.Array, a: jax.Array, about: Chunks):
    """Gradients by dt [B, T, N] and a [N] of what a backward kernel says of each token.

    A decay at t scales what tokens from t on read of tokens before t. Of a chunk that is what its
    tokens from t on read in all, less what they read of each other; and what the state after it
    keeps of the tokens before t and of the state before.
    """
    size = facts.shape[-1] // about.held.shape[-1]
    cut = facts.reshape(*facts.shape[:-1], -1, size)
    read, overlap, given, lasting = (
        cut[:, :, 0, 0],
        cut[:, :, 0, 1],
        cut[:, :, 1, 0],
        cut[:, :, 1, 1],
    )
    steps = padded(dt.astype(jnp.float32), 1, size).transpose(0, 2, 1).reshape(given.shape)
    net = read - steps * given
    from_here = jnp.flip(jnp.cumsum(jnp.flip(net, -1), -1), -1)
    lasted = steps * lasting
    lasted = jnp.cumsum(lasted, -1) - lasted
    kept = (about.held * jnp.sum(overlap, -1))[..., None]
    change = from_here + lasted + kept  # by dt a
    dsteps = given + lasting + change * a.astype(jnp.float32)[None, :, None, None]
    da = jnp.sum(change * steps, axis=(0, 2, 3))
    ddt = dsteps.reshape(*dsteps.shape[:2], -1)[:, :, : dt.shape[1]].transpose(0, 2, 1)
    return ddt.astype(dt.dtype), da.astype(a.dtype)


def _backward(plan: Plan, residuals, gradients):
    @sequential_vmap
    def call(x, dt, a, b, c, initial, number, dy, dfinal):
        about = chunks(dt, a, number, plan.size)
        pull = dy.astype(x.dtype), dfinal.astype(jnp.float32)
        dx, db, dc, facts, dinitial = plan.backward(
            x, b, c, about, initial, pull, **dict(plan.options[1])
        )
        return dx, *decay_gradients(facts, dt, a, about), db, dc, dinitial

    *found, dinitial = call(*residuals, *gradients)
    initial, number = residuals[5:]
    none = None if number is None else np.zeros(number.shape, jax.dtypes.float0)
    return *found, None if initial is None else dinitial.astype(initial.dtype), none


run.defvjp(_forward, _backward)
