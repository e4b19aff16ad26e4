"""The order in which the kernel for Hopper finds inputs in its registers, and ways in and out.

A thread reads eight codes of a row that lie together. The operand of the tensor cores wants four
pairs of inputs of it, eight inputs apart. As a sum over inputs takes them in any order, codes stay
where they are read: either x is brought into the order in which they then stand, or they were
stored so that they stand right (`stored`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["BLOCK", "kind_of", "natural", "order", "stored"]

BLOCK = 32
"""Inputs that are out of order among themselves: what the four threads of a row read at once."""

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1_CODES = (*_E2M1, *(-x for x in _E2M1))


def kind_of(dtype: Any, table: tuple[float, ...] = ()) -> str:
    """How codes of a dtype, or of a table of 16 numbers, are widened."""
    if table:
        return "e2m1" if tuple(table) == _E2M1_CODES else "table"
    return "e4m3" if str(dtype) == "float8_e4m3fn" else str(dtype)


def order(kind: str) -> np.ndarray:
    """For each input of a block as the operand has them, the place that is read for it."""
    found = np.zeros(BLOCK, np.int32)
    for pair in range(4):
        for thread in range(4):
            for one in range(2):
                code = pair + 4 * one
                if kind == "table":
                    code = 2 * pair + one
                elif kind in ("int8", "e4m3"):
                    code = 4 * (pair // 2) + pair % 2 + 2 * one
                found[8 * pair + 2 * thread + one] = 8 * thread + code
    return found


def _taken(array: Any, places: np.ndarray) -> Any:
    blocks = array.reshape(*array.shape[:-1], -1, BLOCK)
    if str(array.dtype) in ("int4", "uint4"):  # of which not every backend of XLA can gather
        return blocks.astype(np.int8)[..., places].astype(array.dtype).reshape(array.shape)
    return blocks[..., places].reshape(array.shape)


def stored(array: Any, kind: str) -> Any:
    """Codes (or x) [..., K] in the order that makes them stand in the operand's."""
    return _taken(array, np.argsort(order(kind)))


def natural(array: Any, kind: str) -> Any:
    """The way back; and x in the order in which codes stand that were not stored so."""
    return _taken(array, order(kind))
