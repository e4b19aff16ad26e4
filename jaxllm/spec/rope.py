"""Rotary position embedding as data: base, rotated fraction, layout and scaling of frequencies."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal

from jaxllm.core.config import require

__all__ = [
    "DynamicScaling",
    "LinearScaling",
    "Llama3Scaling",
    "LongRopeScaling",
    "NtkScaling",
    "Rope",
    "RopeScaling",
    "YarnScaling",
    "yarn_magnitude",
]


def _require_stretch(factor: float, original_context: int = 1) -> None:
    require(math.isfinite(factor) and factor >= 1, f"rope scaling: factor is ≥ 1, found {factor}")
    require(
        original_context > 0,
        f"rope scaling: original_context is positive, found {original_context}",
    )


def _require_positive(name: str, value: float | None) -> None:
    allowed = value is None or (math.isfinite(value) and value > 0)
    require(allowed, f"rope scaling: {name} is positive, found {value}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Position interpolation: all frequencies divided by `factor`. Source: arXiv 2306.15595."""

    kind: ClassVar[str] = "linear"
    factor: float

    def __post_init__(self) -> None:
        _require_stretch(self.factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NtkScaling:
    """A larger base at every length: theta' = theta * factor^(d / (d - 2)), d rotated dims.

    The highest frequency stays, the lowest is divided by `factor`. Source: arXiv 2309.00071, 3.1.
    """

    kind: ClassVar[str] = "ntk"
    factor: float

    def __post_init__(self) -> None:
        _require_stretch(self.factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicScaling:
    """NTK scaling that follows the length L of the sequence. Source: arXiv 2309.00071, 3.3.

    theta' = theta * (1 + factor (L - C) / C)^(d / (d - 2)) for L > C = `original_context`, else
    theta. L is the length of the token's own sequence at the end of the step that rotates it, and
    keys in a cache are not rotated again. Up to C one pass, chunks and decode agree. Beyond it they
    do not, in the reference either: there a key keeps the base of the step in which it came.
    """

    kind: ClassVar[str] = "dynamic"
    factor: float
    original_context: int

    def __post_init__(self) -> None:
        _require_stretch(self.factor, self.original_context)


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """High frequencies kept, low ones over `factor`, a ramp between. Source: arXiv 2309.00071.

    Attributes:
      factor: how much longer the context is than the original one.
      original_context: tokens of the context before scaling.
      beta_fast: dims that turn at least so often in the original context are kept.
      beta_slow: dims that turn at most so often are interpolated.
      attention_factor: on cos and sin; None is 0.1 ln(factor) + 1, or the quotient of two such
        where both mscales are given.
      mscale: weight of the logarithm in the numerator of that quotient.
      mscale_all_dim: weight of the logarithm in its denominator.
      truncate: the ramp begins and ends at whole dims.
    """

    kind: ClassVar[str] = "yarn"
    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        _require_stretch(self.factor, self.original_context)
        require(
            math.isfinite(self.beta_fast) and self.beta_fast >= self.beta_slow > 0,
            f"rope scaling: beta_fast ≥ beta_slow > 0, found {self.beta_fast} and {self.beta_slow}",
        )
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            _require_positive(name, getattr(self, name))

    @property
    def magnitude(self) -> float:
        """Factor on cos and sin."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale is None or self.mscale_all_dim is None:
            return yarn_magnitude(self.factor)
        over = yarn_magnitude(self.factor, self.mscale_all_dim)
        return yarn_magnitude(self.factor, self.mscale) / over


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRopeScaling:
    """A divisor for every frequency, from one of two searched lists. Source: arXiv 2402.13753.

    The list is chosen by the length of the token's own sequence at the end of the step that rotates
    it, as the reference does, so that short inputs keep the short list whatever the model's context
    is. Keys in a cache are not rotated again: a sequence that grows past the original context while
    it is decoded keeps short keys for its beginning, and prefill of the longer text differs.

    Attributes:
      short_factor: divisors up to `original_context` tokens, one a rotated pair.
      long_factor: divisors beyond it.
      factor: how much longer the context is than the original one; acts on the magnitude alone.
      original_context: tokens of the context before scaling.
      attention_factor: on cos and sin; None is sqrt(1 + ln(factor) / ln(original_context)).
    """

    kind: ClassVar[str] = "longrope"
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    factor: float
    original_context: int
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        _require_stretch(self.factor, self.original_context)
        require(self.original_context > 1, "rope scaling: original_context is at least 2")
        _require_positive("attention_factor", self.attention_factor)
        for name in ("short_factor", "long_factor"):
            for value in getattr(self, name):
                _require_positive(f"every {name}", value)

    @property
    def magnitude(self) -> float:
        """Factor on cos and sin, of short and long sequences alike."""
        if self.attention_factor is not None:
            return self.attention_factor
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_context))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Low frequencies over `factor`, high ones kept, a ramp between. Source: arXiv 2407.21783."""

    kind: ClassVar[str] = "llama3"
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int

    def __post_init__(self) -> None:
        _require_stretch(self.factor, self.original_context)
        require(
            0 < self.low_freq_factor < self.high_freq_factor,
            "rope scaling: 0 < low_freq_factor < high_freq_factor",
        )


RopeScaling = (
    LinearScaling | NtkScaling | DynamicScaling | YarnScaling | LongRopeScaling | Llama3Scaling
)


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
        require(
            not isinstance(self.scaling, YarnScaling) or self.theta > 1,
            f"rope: theta is over 1 for yarn, found {self.theta}",
        )

    @property
    def magnitude(self) -> float:
        """Factor on cos and sin: 1 but for yarn and longrope."""
        return getattr(self.scaling, "magnitude", 1.0)

    @property
    def follows_length(self) -> bool:
        """Whether the frequencies depend on how long a sequence is."""
        return isinstance(self.scaling, DynamicScaling | LongRopeScaling)

    def check(self, head_dim: int, where: str = "attention") -> None:
        """Raise unless heads of `head_dim` dims can be rotated so.

        Raises:
          ConfigError: an odd number of rotated dims, too few for the scaling, or factors that are
            not one a pair.
        """
        rotated = int(head_dim * self.fraction)  # a part of a dim is left as it is
        require(
            rotated >= 2 and rotated % 2 == 0,
            f"{where}: rope rotates {rotated} of {head_dim} dims; it must be an even number",
        )
        match self.scaling:
            case NtkScaling() | DynamicScaling():
                require(
                    rotated > 2,
                    f"{where}: {self.scaling.kind} rope scaling needs at least 4 rotated dims, "
                    f"found {int(rotated)}",
                )
            case LongRopeScaling() as s:
                for name in ("short_factor", "long_factor"):
                    count = len(getattr(s, name))
                    require(
                        count == rotated // 2,
                        f"{where}: {name} of the rope has {count} numbers; {int(rotated)} rotated "
                        f"dims need {int(rotated) // 2}",
                    )


def yarn_magnitude(factor: float, mscale: float = 1.0) -> float:
    """0.1 mscale ln(factor) + 1: by how much longer contexts sharpen attention in YaRN."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
