"""The Mosaic GPU kernels for a call: whether they can serve it, and their products."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul.derivative import run
from pallas_kernels.grouped_matmul.mosaic_gpu import Tiles, outer, product
from pallas_kernels.grouped_matmul.tables import UNIT, group_bounds, row_tiles
from pallas_kernels.grouped_matmul.tiles import group_tiles_for, row_tiles_for
from pallas_kernels.target import interpreting, not_hopper, processors, target

__all__ = ["Hopper", "grouped", "obstacle", "unfit"]


def unfit(*, dtype: str, sides: tuple[int, int], platform: str) -> str | None:
    """Why these kernels cannot serve a kind of call, or None; see `unfit` of the package."""
    if platform not in ("gpu", "interpreter"):
        return f"it needs a CUDA device, this is {platform}"
    if dtype not in ("bfloat16", "float16"):
        return f"it takes bfloat16 and float16, not {dtype}"
    if any(side % 64 for side in sides):
        return f"it takes matrices whose sides are multiples of 64, not {sides}"
    return not_hopper(platform)


def obstacle(lhs, rhs) -> str | None:
    """Why these kernels cannot serve a call, or None."""
    if 0 in (*lhs.shape, *rhs.shape):
        return "it takes no empty arrays"
    return unfit(dtype=str(lhs.dtype), sides=rhs.shape[1:], platform=target())


def _padded(x: jax.Array) -> jax.Array:
    """Rows up to a whole number of units."""
    short = -x.shape[0] % UNIT
    return jnp.pad(x, ((0, short), (0, 0))) if short else x


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hopper:
    """A `derivative.Kernel`.

    Attributes:
      rows: tiles of the product, and of the gradient of its rows.
      matrices: tiles of the gradient of the matrices.
    """

    rows: Tiles
    matrices: Tiles
    processors: int = 132
    interpret: bool = False

    def product(self, x, matrices, sizes, *, transpose: bool) -> jax.Array:
        rows, tiles = x.shape[0], self.rows
        x = _padded(x)
        bounds = group_bounds(sizes, rows)
        tables = row_tiles(bounds, x.shape[0], tile=tiles.span[0], band=tiles.band)
        out = product(x, matrices, tables, transpose=transpose, tiles=tiles, **self._where())
        return out[:rows]

    def outer(self, left, right, sizes) -> jax.Array:
        bounds = group_bounds(sizes, left.shape[0])
        return outer(_padded(left), _padded(right), bounds, tiles=self.matrices, **self._where())

    def _where(self) -> dict:
        return {"processors": self.processors, "interpret": self.interpret}


def grouped(lhs, rhs, sizes, *, transpose_rhs: bool = False) -> jax.Array:
    """As `reference`."""
    kernel = Hopper(
        rows=row_tiles_for(lhs.shape[0], rhs.shape[0]),
        matrices=group_tiles_for(rhs.shape[2]),
        processors=processors(),
        interpret=interpreting(),
    )
    return run(lhs, rhs, sizes, kernel, transpose_rhs)
