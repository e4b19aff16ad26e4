"""Sampling options of a request, checked on the host."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import numpy as np

from jaxllm.core.config import require

__all__ = ["Mode", "Sampling"]

Mode = Literal["greedy", "sample", "penalize"]
"""What a program must be able to do: argmax, draw, or draw after penalties."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is taken.

    Attributes:
      temperature: >= 0; 0 takes the most likely token.
      top_k: >= 0; 0 keeps all.
      top_p: in (0, 1].
      min_p: in [0, 1).
      typical_p: in (0, 1]; keep the tokens whose surprise is nearest to the expected one, of this
        total probability.
      repetition_penalty: > 0; 1 is none.
      presence_penalty: in [-2, 2].
      frequency_penalty: in [-2, 2].
      seed: in [0, 2^32).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        def check(name: str, fine: bool, allowed: str) -> None:
            value = getattr(self, name)
            require(fine, f"{name} is {allowed}, found {value!r}")

        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            whole = field.name in ("top_k", "seed")
            kinds = (int, np.integer) if whole else (int, float, np.integer, np.floating)
            kind = "an integer" if whole else "a finite number"
            good = isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
            check(field.name, good, kind)
        check("temperature", 0 <= self.temperature <= 100, "in [0, 100]")
        check("top_k", 0 <= self.top_k < 2**31, "in [0, 2^31)")
        check("top_p", 0 < self.top_p <= 1, "in (0, 1]")
        check("min_p", 0 <= self.min_p < 1, "in [0, 1)")
        check("typical_p", 0 < self.typical_p <= 1, "in (0, 1]")
        check("repetition_penalty", 0 < self.repetition_penalty <= 100, "in (0, 100]")
        check("presence_penalty", -2 <= self.presence_penalty <= 2, "in [-2, 2]")
        check("frequency_penalty", -2 <= self.frequency_penalty <= 2, "in [-2, 2]")
        check("seed", 0 <= self.seed < 2**32, "in [0, 2^32)")

    @property
    def mode(self) -> Mode:
        """The least program that serves these options."""
        if (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0):
            return "penalize"
        return "sample" if self.temperature > 0 else "greedy"

    def rows(self, batch: int) -> Any:
        """`SamplingRows` of host arrays, the same options in every row, seeds counted up."""
        from jaxllm.ops.sampling import SamplingRows

        full = lambda value, dtype: np.full((batch,), value, dtype)  # noqa: E731
        seeds = (self.seed + np.arange(batch, dtype=np.uint64)) % 2**32
        return SamplingRows(
            full(self.temperature, np.float32),
            full(self.top_k, np.int32),
            full(self.top_p, np.float32),
            full(self.min_p, np.float32),
            full(self.typical_p, np.float32),
            full(self.repetition_penalty, np.float32),
            full(self.presence_penalty, np.float32),
            full(self.frequency_penalty, np.float32),
            seeds.astype(np.uint32),
        )
