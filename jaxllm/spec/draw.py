"""The pairs that a `Random` mask draws: the plan of the public BigBird code, drawn as it draws."""

from __future__ import annotations

import functools

import numpy as np

from jaxllm.core.config import require

__all__ = ["drawn_units"]


@functools.lru_cache(maxsize=64)
def drawn_units(count: int, seed: int, heads: int, units: int) -> np.ndarray:
    """Which units each unit sees by the draw, head by head.

    Units 1 to units - 2 draw `count` others from the first 2 count + 5, without the first and the
    last of these and their own neighbours; the first and the last unit draw none. Row after row,
    and head after head within a row, a permutation is drawn and its first fitting units are taken.

    Args:
      count: units drawn for each.
      seed: of the draws.
      heads: N.
      units: in the row; up to 2 count + 5 are all seen.

    Returns:
      Booleans [N, units, units]. Source: arXiv 2007.14062, appendix D.
    """
    pool = 2 * count + 5
    if units <= pool:
        return np.ones((heads, units, units), bool)
    out = np.zeros((heads, units, units), bool)
    stream = np.random.RandomState(seed)  # the public code's generator, draw for draw
    for row in range(1, units):  # the last row draws too, and is not used
        barred = {0, pool - 1, row - 1, row, row + 1}
        if row == 1:
            barred.add(pool - 2)
        if row == pool - 2:
            barred.add(1)
        for head in range(heads):
            fitting = [unit for unit in stream.permutation(pool) if unit not in barred]
            require(len(fitting) >= count, f"random: no {count} units are left to draw in {units}")
            if row < units - 1:
                out[head, row, fitting[:count]] = True
    return out
