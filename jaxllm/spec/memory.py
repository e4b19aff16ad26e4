"""Product-key memory as data: a large table of values, of which a token reads a few rows."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from jaxllm.core.config import require

__all__ = ["Memory"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Each head reads the best `active` of `keys`^2 values and sums them by softmax of the scores.

    The key of value i n + j is half-key i of one set beside half-key j of another, so that a score
    is a sum of two and the best are found among the best halves, exactly. Source: arXiv 1907.05242;
    gate, projection and a table that layers share: arXiv 2412.09764.

    Attributes:
      heads: N, each with half-keys of its own; all read the same values.
      keys: n, half-keys in each of the two sets.
      active: A, values that a head reads.
      key_dim: H of a query, half of which meets each set.
      value_dim: width of a value, projected to the model's; None: values are updates themselves.
      gated: what was read is multiplied by silu(x W_gate) before the projection.
      query_norm: each half of a query is normed (RMSNorm, one scale for all halves).
      eps: of that norm.
      share: name of a table of values that all ops of this name read; None: a table of its own.
    """

    kind: ClassVar[str] = "memory"
    heads: int
    keys: int
    active: int
    key_dim: int
    value_dim: int | None = None
    gated: bool = False
    query_norm: bool = True
    eps: float = 1e-6
    share: str | None = None

    def __post_init__(self) -> None:
        require(
            min(self.heads, self.keys, self.value_dim or 1) >= 1,
            f"memory: heads, keys and value_dim are positive, found {self}",
        )
        require(
            1 <= self.active <= self.keys**2,
            f"memory: active is 1 to keys^2 = {self.keys**2}, found {self.active}",
        )
        require(
            self.key_dim >= 2 and self.key_dim % 2 == 0,
            f"memory: key_dim is even, found {self.key_dim}",
        )
        require(
            not self.gated or self.value_dim is not None,
            "memory: a gate stands before the projection; give value_dim",
        )
        require(self.eps > 0, f"memory: eps is positive, found {self.eps}")
        require(
            self.share is None or self.share.isidentifier(),
            f"memory: share {self.share!r} is no identifier",
        )

    def lookup_flops(self, width: int) -> int:
        """Multiply-adds x 2 a token of scores and of sums, beside the projections, in width D."""
        wide = self.value_dim or width
        return 2 * self.heads * (self.keys * self.key_dim + self.active * wide)
