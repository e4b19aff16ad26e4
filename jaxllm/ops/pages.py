"""Pages: where a sequence's tokens lie, and how new ones get there."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.ops.flat import Flat
from jaxllm.ops.quantized import rounded
from jaxllm.typing import AnyArray, Slot

__all__ = ["PageTable", "Pool", "write_coded", "write_pages"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PageTable:
    """Which pages hold a sequence.

    Attributes:
      pages: [R, W] int32; column j of a row holds the tokens of page number firsts + j of its
        sequence. Past the pool's end where there is none.
      firsts: [R] int32; above 0 where a window has left pages behind.
      spare: the pool's last page is nobody's, and padding is written there rather than dropped.
    """

    pages: Slot
    firsts: Slot
    spare: bool = dataclasses.field(default=False, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pool:
    """Pages of keys and values.

    Attributes:
      k: [P, Z, K, H].
      v: [P, Z, K, V]; None where values are the first dims of the keys.
      scales: float32 [P, K, 2, Z], what the numbers of a token's keys and of its values in 8 bits
        are multiplied by; None for pages in another dtype.
      width: V where there is no v; static.
    """

    k: Slot
    v: Slot | None
    scales: Slot | None = None
    width: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def value_width(self) -> int:
        """V."""
        return self.width if self.v is None else self.v.shape[-1]


def _places(
    shape: tuple[int, ...], table: PageTable, flat: Flat, length: int
) -> tuple[Array, Array]:
    """(page, place in it) [T] of every new token; past the pool's end, or spare, for padding.

    Args:
      shape: of a pool, whose first dims are P and Z.
    """
    count, size = shape[:2]
    owner = flat.owners(length)
    row = jnp.minimum(owner, flat.counts.shape[0] - 1)
    position = flat.positions(length)
    column = position // size - jnp.take(table.firsts, row)
    inside = (owner < flat.counts.shape[0]) & (column >= 0) & (column < table.pages.shape[1])
    page = table.pages[row, jnp.clip(column, 0, table.pages.shape[1] - 1)]
    if table.spare:
        page = jnp.where(inside & (page < count), page, count - 1)
    else:
        page = jnp.where(inside, page, count)
    # XLA would find the place anew for each number that is written, in every layer.
    return jax.lax.optimization_barrier((page, position % size))


def _put(pool: Array, new: Array, where: tuple[Array, Array], table: PageTable) -> Array:
    """new [T, ...] in its places of a pool [P, Z, ...]."""
    new = new.astype(pool.dtype)
    if table.spare and new.shape[0] == 1:
        # A scatter of one that may be dropped reads what is there first: a kernel of its own.
        start = (where[0][0], where[1][0], *[jnp.int32(0)] * (pool.ndim - 2))
        return jax.lax.dynamic_update_slice(pool, new[None], start)
    return pool.at[where].set(new, mode="drop")


def write_pages(
    pool: Float[AnyArray, "P Z *C"],
    new: Float[Array, "1 T *C"],
    table: PageTable,
    flat: Flat,
) -> Float[Array, "P Z *C"]:
    """Put the new tokens' keys or values into their pages; padding is dropped, or goes to waste."""
    pool = jnp.asarray(pool)
    return _put(pool, new[0], _places(pool.shape, table, flat, new.shape[1]), table)


def write_coded(
    pool: Pool,
    new: tuple[Float[Array, "1 T K H"], Float[Array, "1 T K V"]],
    table: PageTable,
    flat: Flat,
) -> Pool:
    """The same for keys and values in 8 bits: rounded, with scales of each token and head."""
    k, v, scales = jnp.asarray(pool.k), jnp.asarray(pool.v), jnp.asarray(pool.scales)
    page, place = where = _places(k.shape, table, flat, new[0].shape[1])
    (keys, of_keys), (values, of_values) = (
        rounded(x[0], old.dtype) for x, old in zip(new, (k, v), strict=True)
    )
    both = jnp.concatenate([of_keys, of_values], axis=-1)  # [T, K, 2]
    if table.spare and both.shape[0] == 1:
        start = (page[0], jnp.int32(0), jnp.int32(0), place[0])
        scales = jax.lax.dynamic_update_slice(scales, both[..., None], start)
    else:
        scales = scales.at[page, :, :, place].set(both, mode="drop")
    return Pool(_put(k, keys, where, table), _put(v, values, where, table), scales)
