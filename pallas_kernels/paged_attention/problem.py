"""What a call of `paged_attention` says beside its arrays."""

from __future__ import annotations

import dataclasses

__all__ = ["Problem"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """The static part of one call.

    Attributes:
      scale: factor on the scores.
      window: keys that a query sees before itself, None for all.
      softcap: scores become softcap * tanh(scores / softcap).
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
