"""Where groups and their tiles lie, computed on the device before the kernels."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

__all__ = [
    "FIRST",
    "GROUP",
    "HEIGHT",
    "ROW",
    "START",
    "STOP",
    "UNIT",
    "Map",
    "group_bounds",
    "row_tiles",
]

# Rows of `Map.table`.
GROUP, ROW, START, STOP, FIRST, HEIGHT = range(6)
UNIT = 8  # TMA reads and writes whole units of rows in the layout that products need


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Map:
    """Tiles of rows, each of one group, in the groups' order.

    Attributes:
      table: int32 [6, most tiles]: group (E for rows of none); first row, a multiple of `UNIT`;
        first and end of the group's rows; first tile and number of tiles of the tile's band.
      count: int32 [1], tiles that there are.
    """

    table: jax.Array
    count: jax.Array


def _sums(sizes: jax.Array) -> jax.Array:
    """Inclusive sums, as one small matrix: a scan would be several kernels."""
    count = sizes.shape[0]
    upto = jnp.arange(count)[:, None] >= jnp.arange(count)[None, :]
    return jnp.sum(jnp.where(upto, sizes[None, :], 0), axis=1)


def group_bounds(sizes: jax.Array, rows: int) -> jax.Array:
    """int32 [2, E], first row and end of each group.

    A negative size counts as none; rows past the last are left out.
    """
    sizes = jnp.maximum(sizes.astype(jnp.int32), 0)
    ends = _sums(sizes)
    return jnp.minimum(jnp.stack([ends - sizes, ends]), rows)


def row_tiles(
    bounds: jax.Array, rows: int, *, tile: int, band: int = 1, unit: int = UNIT, every: bool = False
) -> Map:
    """Tiles of so many rows that cover all groups, and the rows after them as a group E.

    Args:
      bounds: of `group_bounds`.
      rows: R.
      tile: rows of a tile.
      band: most tiles of a band.
      unit: of rows that a group's first tile begins at; `tile` for tiles on a grid of their own.
      every: a group without rows has a tile too, and the rows after them have none.
    """
    starts, ends = bounds
    if not every:
        starts, ends = jnp.append(starts, ends[-1]), jnp.append(ends, jnp.int32(rows))
    groups = starts.shape[0]
    begins = jnp.minimum(starts, rows - 1) // unit * unit
    of_group = jnp.where(ends > starts, -((begins - ends) // tile), int(every))
    tile_ends = _sums(of_group)
    most = min((rows + groups * (tile + unit - 2)) // tile, rows) + groups * every
    places = jnp.arange(most, dtype=jnp.int32)
    group = jnp.sum((places[:, None] >= tile_ends[None, :]).astype(jnp.int32), axis=1)
    group = jnp.minimum(group, groups - 1)
    first = (tile_ends - of_group)[group]
    within = places - first
    row = begins[group] + within * tile
    begin = first + within // band * band
    height = jnp.minimum(band, tile_ends[group] - begin)
    return Map(jnp.stack([group, row, starts[group], ends[group], begin, height]), tile_ends[-1:])
