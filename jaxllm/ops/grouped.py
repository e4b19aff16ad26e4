"""The grouped product: rows sorted by group, each times the matrix of its group.

The one place where experts are multiplied. `implementation` is `auto` (chooses, and says once what
and why) or a name; a named choice that cannot be served raises.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.core.choices import took
from jaxllm.core.config import nearest
from jaxllm.core.precision import at_least_float32
from jaxllm.errors import ConfigError, UnsupportedError
from pallas_kernels.choice import Choice
from pallas_kernels.target import target

__all__ = ["IMPLEMENTATIONS", "Choice", "choose", "grouped_product"]

_SMALLEST, _LARGEST = 8, 32  # rows of a block
_KERNELS = ("mosaic_gpu", "mosaic_tpu")


def _unfit(implementation: str, **kind: Any) -> str | None:
    from pallas_kernels.grouped_matmul import unfit  # Pallas takes a third of a second to import

    return unfit(implementation, **kind)


@functools.lru_cache(maxsize=256)
def choose(implementation: str, *, platform: str, dtype: str, sides: tuple[int, int]) -> Choice:
    """The implementation for a kind of call, and why.

    Args:
      implementation: `auto` or a name.
      platform: `cpu`, `gpu`, `tpu`, or `interpreter` for kernels on a CPU.
      dtype: name of the operands' dtype.
      sides: I and O.

    Raises:
      ConfigError: unknown name; UnsupportedError: a named choice that cannot be served.
    """
    if implementation not in ("auto", *IMPLEMENTATIONS):
        raise ConfigError(
            f"grouped product {implementation!r} is unknown; "
            f"{nearest(implementation, ('auto', *IMPLEMENTATIONS))}"
        )
    kind = {"dtype": dtype, "sides": sides, "platform": platform}
    if implementation in _KERNELS and (obstacle := _unfit(implementation, **kind)):
        raise UnsupportedError(
            f"grouped product {implementation!r}: {obstacle}; use 'ragged_dot' or 'auto'"
        )
    if implementation != "auto":
        return Choice(implementation, "named")
    if platform in ("cpu", "interpreter"):
        return Choice("blocked", "XLA's own form does the work of all groups for each row on a CPU")
    if platform == "tpu":
        return Choice("ragged_dot", "XLA's own form; our kernel has not been timed on a TPU")
    obstacle = _unfit("mosaic_gpu", **kind)
    if obstacle is None:
        return Choice("mosaic_gpu", "many times faster than XLA's own form on a Hopper GPU")
    return Choice("ragged_dot", f"mosaic_gpu: {obstacle}")


def grouped_product(
    x: Float[Array, "R I"],
    w: Float[Array, "E I O"],
    sizes: Int[Array, "E"],
    *,
    precision: Any,
    implementation: str = "auto",
) -> Float[Array, "R O"]:
    """y[r] = x[r] w[group of r]; the first sizes[0] rows are of group 0, and so on.

    Args:
      x: rows in the order of their groups.
      w: a matrix a group, in x's dtype.
      sizes: rows of each group; rows past their sum give zeros.
      precision: of the products; the kernel sums products of its narrow operands in float32.
      implementation: `auto`, or a name of `IMPLEMENTATIONS`.

    Raises:
      ConfigError, UnsupportedError: see `choose`.
    """
    sides = (w.shape[1], w.shape[2])
    choice = choose(implementation, platform=target(), dtype=str(x.dtype), sides=sides)
    took("experts", choice.name, choice.why if implementation == "auto" else None)
    return IMPLEMENTATIONS[choice.name](precision, x, w, sizes)


def _ragged_dot(precision: Any, x: Array, w: Array, sizes: Array) -> Array:
    return jax.lax.ragged_dot(x, w, sizes, precision=precision)


def _kernel(name: str, precision: Any, x: Array, w: Array, sizes: Array) -> Array:
    from pallas_kernels.grouped_matmul import grouped_matmul

    del precision
    return grouped_matmul(x, w, sizes, implementation=name)


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


# name -> (precision, x, w, sizes) -> y. `blocked` takes rows in blocks of one group, which costs
# what a dense product of as many rows costs; XLA's lowering of `ragged_dot` for a CPU costs E such.
IMPLEMENTATIONS = {"blocked": _blocked, "ragged_dot": _ragged_dot} | {
    name: functools.partial(_kernel, name) for name in _KERNELS
}
