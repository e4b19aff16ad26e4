"""The walk over chunks by a pair of kernels, differentiable; what is within chunks in plain jnp.

With E = erased, R = reads, W = writes, P = seen, h = held of a chunk and S the matrix before it:

    u = given + E S       o = R S + P u       S <- h S + W^T u

Backward, with dS the gradient by the matrix after the chunk and do that by o:

    du = P^T do + W dS    dS <- h dS + R^T do + E^T du

The kernels are the two loops, and on a GPU the inverse within chunks. The backward pass runs the
first loop again for S and u of every chunk; all gradients by what the loops read are products over
all chunks at once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import sequential_vmap

from pallas_kernels.linear_attention.within import SIZE, Inside, reached, within

__all__ = ["Plan", "run"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static part of a run: hashable; kernels are functions at the top of a module.

    Attributes:
      forward: (inside, reach, initial, interpret=) -> (o [B, N, C Q, H], the last S).
      states: the same -> (every S [B, N, C, M, H], every u [B, N, C Q, H]), narrow.
      backward: (inside, do, dS, interpret=) -> (every du, every dS narrow, the dS before all).
      inverse: (below [..., Q, Q], dtype, interpret) -> (I + below)^-1, differentiable.
      columns: H has to be a multiple of it.
    """

    forward: Callable[..., Any]
    states: Callable[..., Any]
    backward: Callable[..., Any]
    inverse: Callable[..., Any]
    columns: int
    interpret: bool = False

    def within(self, q, k, v, log_decay, beta, number) -> Inside:
        """`within` with this inverse."""

        def solve(below, dtype):
            return self.inverse(below, jnp.dtype(dtype), self.interpret)

        return within(q, k, v, log_decay, beta, number, solve=solve)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def run(q, k, v, log_decay, beta, initial, number, plan: Plan) -> Any:
    """(out [B, T, N, H], the last matrices); differentiable by all but `number`. A vmapped axis
    becomes a loop.

    Args:
      q, k, v, log_decay, beta, number: as of `within`.
      initial: float32 [B, N, M, H].
    """
    return _forward(q, k, v, log_decay, beta, initial, number, plan)[0]


def _forward(q, k, v, log_decay, beta, initial, number, plan: Plan):
    @sequential_vmap
    def call(q, k, v, log_decay, beta, initial, number):
        inside = plan.within(q, k, v, log_decay, beta, number)
        o, final = plan.forward(inside, reached(number), initial, interpret=plan.interpret)
        return jnp.moveaxis(o, 1, 2)[:, : v.shape[1]], final

    kept = (q, k, v, log_decay, beta, initial, number)
    return call(*kept), kept


def _backward(plan: Plan, residuals, gradients):
    @sequential_vmap
    def call(q, k, v, log_decay, beta, initial, number, do, dfinal):
        def prepared(q, k, v, log_decay, beta):
            return plan.within(q, k, v, log_decay, beta, number)

        inside, pull = jax.vjp(prepared, q, k, v, log_decay, beta)
        reach = reached(number)
        how = {"interpret": plan.interpret}
        states, u = plan.states(inside, reach, initial, **how)
        do = jnp.pad(do, ((0, 0), (0, -do.shape[1] % SIZE), (0, 0), (0, 0)))
        do = jnp.moveaxis(do, 2, 1).astype(v.dtype)
        du, after, dinitial = plan.backward(inside, do, dfinal.astype(jnp.float32), **how)
        return *pull(_gradients(inside, reach, (states, u), (do, du, after))), dinitial

    number = residuals[-1]
    none = None if number is None else np.zeros(number.shape, jax.dtypes.float0)
    return *call(*residuals, *gradients), none


def _gradients(inside: Inside, reach, found, pulls) -> Inside:
    """Gradients by what the loops read; found is (every S, every u), pulls (do, du, every dS)."""
    (states, u), (do, du, after) = found, pulls
    dtype, forgets = u.dtype, inside.held == 0.0

    def cut(x):
        return x.reshape(*x.shape[:2], -1, SIZE, x.shape[-1])

    def product(a, b):
        found = jnp.matmul(cut(a), b.mT, preferred_element_type=dtype)
        return found.reshape(*found.shape[:2], -1, found.shape[-1])

    def by_state(gradient):
        found = product(gradient, states)
        if reach is None:
            return found
        # Where nothing of it is read, a state may be NaN.
        return jnp.where((reach == 0)[:, None, :, None], found, jnp.zeros_like(found))

    overlap = jnp.sum(states.astype(jnp.float32) * after.astype(jnp.float32), axis=-1)
    return Inside(
        reads=by_state(do),
        writes=product(u, after),
        seen=product(do, cut(u)),
        given=du,
        erased=None if inside.erased is None else by_state(du),
        held=jnp.where(forgets, jnp.zeros_like(overlap), overlap),
    )


run.defvjp(_forward, _backward)
