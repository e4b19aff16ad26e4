"""The grouped product: rows sorted by group, each times the matrix of its group.

The one place where experts are multiplied, so that a kernel can stand in for it. On a CPU rows are
taken in blocks of one group, which costs what a dense product of as many rows costs (XLA's own
lowering of `ragged_dot` costs E such products there); elsewhere it is `jax.lax.ragged_dot`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.core.precision import at_least_float32

__all__ = ["grouped_product"]

_SMALLEST, _LARGEST = 8, 32  # rows of a block


def grouped_product(
    x: Float[Array, "R I"], w: Float[Array, "E I O"], sizes: Int[Array, "E"], *, precision: Any
) -> Float[Array, "R O"]:
    """y[r] = x[r] w[group of r]; the first sizes[0] rows are of group 0, and so on.

    Args:
      x: rows in the order of their groups.
      w: a matrix a group, in x's dtype.
      sizes: rows of each group; rows past their sum give zeros.
      precision: of the products.
    """
    if jax.default_backend() == "cpu":
        return _blocked(precision, x, w, sizes)
    return jax.lax.ragged_dot(x, w, sizes, precision=precision)


def _blocks(rows: int, sizes: Int[Array, "E"]) -> tuple[Array, Array]:
    """(owner [blocks], row [blocks, block]) of blocks of one group each; `rows` for no row."""
    groups = sizes.shape[0]
    block = _SMALLEST
    while block < _LARGEST and block * groups * 2 < rows:
        block *= 2
    count = -(-rows // block) + groups
    of_group = -(-sizes // block)
    ends, starts = jnp.cumsum(of_group), jnp.cumsum(sizes) - sizes
    places = jnp.arange(count, dtype=sizes.dtype)
    owner = jnp.minimum(jnp.searchsorted(ends, places, side="right"), groups - 1)
    within = (places - (ends - of_group)[owner])[:, None] * block
    within = within + jnp.arange(block, dtype=sizes.dtype)[None]
    real = (within < sizes[owner][:, None]) & (places < ends[-1])[:, None]
    return owner, jnp.where(real, starts[owner][:, None] + within, rows)


def _take(x: Float[Array, "R I"], rows: Int[Array, "n block"]) -> Float[Array, "n block I"]:
    return x.at[rows].get(mode="fill", fill_value=0)


def _product(precision: Any, x: Array, w: Array, sizes: Array, *, transposed: bool) -> Array:
    """x times w, or w transposed, block by block."""
    owner, rows = _blocks(x.shape[0], sizes)
    out_dim = 1 if transposed else 2

    def one(_: None, part: tuple[Array, Array]) -> tuple[None, Array]:
        block, group = part
        matrix = jax.lax.dynamic_index_in_dim(w, group, 0, keepdims=False)
        contract = ((1,), (1 if transposed else 0,))
        return None, jax.lax.dot_general(block, matrix, (contract, ((), ())), precision=precision)

    _, out = jax.lax.scan(one, None, (_take(x, rows), owner))
    y = jnp.zeros((x.shape[0], w.shape[out_dim]), x.dtype)
    return y.at[rows.reshape(-1)].set(out.reshape(-1, y.shape[1]), mode="drop")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocked(precision: Any, x: Array, w: Array, sizes: Array) -> Array:
    return _product(precision, x, w, sizes, transposed=False)


def _forward(precision: Any, x: Array, w: Array, sizes: Array) -> Any:
    return _blocked(precision, x, w, sizes), (x, w, sizes)


def _backward(precision: Any, kept: Any, cotangent: Array) -> Any:
    """Each block adds to its own group's matrix; autodiff would add a whole [E, I, O] a block."""
    x, w, sizes = kept
    d_x = _product(precision, cotangent, w, sizes, transposed=True)
    owner, rows = _blocks(x.shape[0], sizes)
    wide = at_least_float32(x.dtype)

    def one(total: Array, part: tuple[Array, Array, Array]) -> tuple[Array, None]:
        block, ct, group = part
        contract = (((0,), (0,)), ((), ()))
        update = jax.lax.dot_general(
            block, ct, contract, precision=precision, preferred_element_type=wide
        )
        return total.at[group].add(update), None

    start = jnp.zeros(w.shape, wide)
    d_w, _ = jax.lax.scan(one, start, (_take(x, rows), _take(cotangent, rows), owner))
    return d_x, d_w.astype(w.dtype), None


_blocked.defvjp(_forward, _backward)
