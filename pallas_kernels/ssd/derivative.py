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

from pallas_kernels.ssd.chunks import Chunks, chunks

__all__ = ["Plan", "run"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static part of a run: hashable.

    Attributes:
      size: tokens of a chunk.
      forward, backward: kernels, functions at the top of a module; `backward` gives facts from
        which `decay_gradients` makes those of steps and decays.
      options: arguments of each by name.
    """

    size: int
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    options: tuple[tuple[tuple[str, Any], ...], tuple[tuple[str, Any], ...]] = ((), ())


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def run(x, steps, log_decay, b, c, initial, number, plan: Plan) -> Any:
    """(y, final state); differentiable by all but `number`. A vmapped axis becomes a loop.

    Args:
      x: [B, T, N, H].
      steps, log_decay: float32 [B, T, N], see `chunks`; steps may be None.
      b, c: [B, T, K, M].
      initial: float32 [B, N, M, H], or None for zeros.
      number: of `numbers`, or None.
    """
    return _forward(x, steps, log_decay, b, c, initial, number, plan)[0]


def _forward(x, steps, log_decay, b, c, initial, number, plan: Plan):
    @sequential_vmap
    def call(x, steps, log_decay, b, c, initial, number):
        about = chunks(steps, log_decay, number, plan.size)
        return plan.forward(x, b, c, about, initial, **dict(plan.options[0]))

    kept = (x, steps, log_decay, b, c, initial, number)
    return call(*kept), kept


def decay_gradients(facts: jax.Array, about: Chunks, length: int):
    """Gradients by steps and log decays, [B, T, N], of what a backward kernel says of each token.

    A decay at t scales what tokens from t on read of tokens before t. Of a chunk that is what its
    tokens from t on read in all, less what they read of each other; and what the state after it
    keeps of the tokens before t and of the state before.
    """
    size = facts.shape[-1] // about.held.shape[-1]
    cut = facts.reshape(*facts.shape[:-1], -1, size)
    read, overlap, given, lasting = (cut[:, :, i, j] for i in (0, 1) for j in (0, 1))
    steps = about.stats[:, :, 3].reshape(given.shape)
    net = read - steps * given
    from_here = jnp.flip(jnp.cumsum(jnp.flip(net, -1), -1), -1)
    lasted = steps * lasting
    lasted = jnp.cumsum(lasted, -1) - lasted
    kept = (about.held * jnp.sum(overlap, -1))[..., None]

    def out(x):
        return x.reshape(*x.shape[:2], -1)[:, :, :length].transpose(0, 2, 1)

    return out(given + lasting), out(from_here + lasted + kept)


def _backward(plan: Plan, residuals, gradients):
    @sequential_vmap
    def call(x, steps, log_decay, b, c, initial, number, dy, dfinal):
        about = chunks(steps, log_decay, number, plan.size)
        pull = dy.astype(x.dtype), dfinal.astype(jnp.float32)
        dx, db, dc, facts, dinitial = plan.backward(
            x, b, c, about, initial, pull, **dict(plan.options[1])
        )
        return dx, *decay_gradients(facts, about, x.shape[1]), db, dc, dinitial

    dx, dsteps, ddecay, db, dc, dinitial = call(*residuals, *gradients)
    _, steps, _, _, _, initial, number = residuals
    dsteps = None if steps is None else dsteps
    dinitial = None if initial is None else dinitial
    none = None if number is None else np.zeros(number.shape, jax.dtypes.float0)
    return dx, dsteps, ddecay, db, dc, dinitial, none


run.defvjp(_forward, _backward)
