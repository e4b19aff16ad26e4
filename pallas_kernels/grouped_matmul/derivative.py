"""The grouped product by any kernel, differentiable, for all of jax's transforms."""

from __future__ import annotations

import functools
from typing import Protocol, runtime_checkable

import jax
import numpy as np
from jax.custom_batching import sequential_vmap

__all__ = ["Kernel", "run"]


@runtime_checkable
class Kernel(Protocol):
    """The two products of a call by some kernel; static and hashable."""

    def product(
        self, x: jax.Array, matrices: jax.Array, sizes: jax.Array, *, transpose: bool
    ) -> jax.Array:
        """Each row times the matrix of its group, or the matrix transposed."""
        ...

    def outer(self, left: jax.Array, right: jax.Array, sizes: jax.Array) -> jax.Array:
        """For each group, left's rows transposed times right's."""
        ...


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def run(lhs, rhs, sizes, kernel: Kernel, transpose: bool) -> jax.Array:
    """The product; differentiable. A vmapped axis becomes a loop.

    Args:
      transpose: of the matrices.
    """
    return _forward(lhs, rhs, sizes, kernel, transpose)[0]


def _forward(lhs, rhs, sizes, kernel: Kernel, transpose: bool):
    product = sequential_vmap(functools.partial(kernel.product, transpose=transpose))
    return product(lhs, rhs, sizes), (lhs, rhs, sizes)


def _backward(kernel: Kernel, transpose: bool, residuals, dout):
    lhs, rhs, sizes = residuals
    product = sequential_vmap(functools.partial(kernel.product, transpose=not transpose))
    dlhs = product(dout, rhs, sizes)
    both = (dout, lhs) if transpose else (lhs, dout)
    drhs = sequential_vmap(kernel.outer)(*both, sizes)
    return dlhs, drhs, np.zeros(sizes.shape, jax.dtypes.float0)


run.defvjp(_forward, _backward)
