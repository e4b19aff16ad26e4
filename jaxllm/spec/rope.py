"""Rotary position embedding as data: base, rotated fraction, layout and scaling of frequencies."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from jaxllm.core.config import require

__all__ = ["LinearScaling", "Llama3Scaling", "Rope", "RopeScaling"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Position interpolation: all frequencies divided by `factor`. Source: arXiv 2306.15595."""

    kind: ClassVar[str] = "linear"
    factor: float

    def __post_init__(self) -> None:
        require(self.factor >= 1, f"rope scaling: factor is ≥ 1, found {self.factor}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Low frequencies over `factor`, high ones kept, a ramp between. Source: arXiv 2407.21783."""

    kind: ClassVar[str] = "llama3"
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int

    def __post_init__(self) -> None:
        require(self.factor >= 1, f"rope scaling: factor is ≥ 1, found {self.factor}")
        require(
            0 < self.low_freq_factor < self.high_freq_factor,
            "rope scaling: 0 < low_freq_factor < high_freq_factor",
        )
        require(self.original_context > 0, "rope scaling: original_context is positive")


RopeScaling = LinearScaling | Llama3Scaling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotation of pairs of a head's dims by position x frequency.

    `layout` says which dims make a pair: `half` pairs i with i + H/2, `interleaved` 2i with 2i + 1.
    """

    theta: float = 10_000.0
    fraction: float = 1.0
    layout: Literal["half", "interleaved"] = "half"
    scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        require(self.theta > 0, f"rope: theta is positive, found {self.theta}")
        require(0 < self.fraction <= 1, f"rope: fraction is in (0, 1], found {self.fraction}")
