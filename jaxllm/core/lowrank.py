"""A low-rank update of one matrix, as adapters store it."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

__all__ = ["LowRank"]


@dataclasses.dataclass(frozen=True)
class LowRank:
    """What is added to an unstacked leaf [*inputs, *outputs]: a b, scaled already.

    Attributes:
      a: float32 [inputs, R], the input dims flat.
      b: float32 [R, *outputs].

    Source: arXiv 2106.09685.
    """

    a: np.ndarray
    b: np.ndarray

    @property
    def rank(self) -> int:
        """R."""
        return self.a.shape[1]

    def added(self, weight: np.ndarray) -> np.ndarray:
        """W + a b in float32, in the shape of W."""
        flat = self.b.reshape(self.rank, math.prod(self.b.shape[1:]))
        return weight.astype(np.float32) + (self.a @ flat).reshape(weight.shape)
