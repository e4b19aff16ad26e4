"""What a call of `decode_attention` says beside its arrays."""

from __future__ import annotations

import dataclasses

__all__ = ["Problem"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """The static part of one call.

    Attributes:
      heads: N, of queries.
      scale: factor on the scores.
      window: keys that a query sees before its own, None for all.
      softcap: scores become softcap * tanh(scores / softcap).
    """

    heads: int
    scale: float
    window: int | None = None
    softcap: float | None = None
