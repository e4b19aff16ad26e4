# Types of jax's Mosaic GPU objects are not public.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false
"""How a product with packed numbers is cut among the processors of a Hopper GPU."""

from __future__ import annotations

import dataclasses

import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

__all__ = ["CHUNK", "OUTPUTS", "Coding", "Form", "Share", "Tiles", "bits_of", "layouts"]

CHUNK = 128  # inputs that are widened at a time
OUTPUTS = 64  # rows of one product: what a warpgroup's instruction has


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """How a product is cut; any choice gives the same result up to rounding.

    The steps of all tiles of outputs stand one after the other, and a program takes the next so
    many of them: it may end one tile's and begin another's. What several programs found of a tile
    is added afterwards.

    Attributes:
      inputs: of one step; whole groups, or a divisor of one.
      stages: steps in flight.
      steps: of one program.
      warpgroups: that compute in a program, 64 outputs each.
      rows: of x at a time; a multiple of 8.
      one_sum: for each result over all inputs, of codes times scales; or sums of groups are scaled
        (`one_sum.py`, `streamed.py`).
      rounds: for `one_sum`: tiles that each program makes alone, before its steps of what is left.
      slim: rounds, the last ones, of one warpgroup fewer.
      programs: for `rounds`.
    """

    inputs: int = 128
    stages: int = 4
    steps: int = 8
    warpgroups: int = 2
    rows: int = 8
    one_sum: bool = False
    rounds: int = 0
    slim: int = 0
    programs: int = 0

    @property
    def outputs(self) -> int:
        """Of one tile."""
        return OUTPUTS * self.warpgroups

    @property
    def own(self) -> int:
        """Outputs of a program's rounds."""
        return OUTPUTS * (self.rounds * self.warpgroups - self.slim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coding:
    """How codes are widened.

    Attributes:
      kind: one of `widen.KINDS`.
      table: what the codes of `table` and `e2m1` stand for.
      arranged: they are stored as `order.stored` has it.
    """

    kind: str = "int4"
    table: tuple[float, ...] = ()
    arranged: bool = False


def bits_of(dtype) -> int:
    """Of a value."""
    return 4 if str(dtype) in ("int4", "uint4") else 8


def layouts(width: int, bits: int) -> tuple:
    """How a tile of so many columns lies in shared memory, as TMA and WGMMA agree on."""
    swizzle = plgpu.find_swizzle(width * bits)
    tiling = plgpu.TilingTransform((8, 8 * swizzle // bits))
    return tiling, plgpu.SwizzleTransform(swizzle)


@dataclasses.dataclass(frozen=True)
class Share:
    """Which programs make which tiles.

    Attributes:
      tiles: how many.
      steps: of each.
      each: steps of a program.
    """

    tiles: int
    steps: int
    each: int

    @property
    def programs(self) -> int:
        return -(-self.tiles * self.steps // self.each)

    @property
    def whole(self) -> bool:
        """Whether no tile is made by several programs."""
        return self.each % self.steps == 0

    def _first(self, program: int) -> int:
        return program * self.each // self.steps

    @property
    def slots(self) -> int:
        """Tiles that a program works on, at most; past the last tile it works for nothing."""
        last = lambda p: ((p + 1) * self.each - 1) // self.steps  # noqa: E731
        return max(last(p) - self._first(p) + 1 for p in range(self.programs))

    def parts(self) -> tuple[np.ndarray, np.ndarray]:
        """For each tile the places (program x slots + slot) of its parts, and whether there are."""
        found = []
        for tile in range(self.tiles):
            begin, end = tile * self.steps, (tile + 1) * self.steps
            programs = range(begin // self.each, -(-end // self.each))
            found.append([p * self.slots + tile - self._first(p) for p in programs])
        most = max(map(len, found))
        places = [one + [0] * (most - len(one)) for one in found]
        there = [[1.0] * len(one) + [0.0] * (most - len(one)) for one in found]
        return np.asarray(places, np.int32), np.asarray(there, np.float32)


@dataclasses.dataclass(frozen=True)
class Form:
    """What all kernels of a product are told.

    Attributes:
      group: inputs that have a scale together.
      bits: of a code.
      turned: results leave turned round, in 16 bits, from tiles that are whole.
    """

    group: int
    tiles: Tiles
    share: Share
    coding: Coding
    bits: int
    turned: bool
    interpret: bool
