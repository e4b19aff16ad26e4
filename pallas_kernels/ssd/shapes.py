"""The cases that the scan is timed on."""

from __future__ import annotations

import dataclasses

__all__ = ["CASES", "Shaped"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shaped:
    """One call: sequences of a length, heads of a width in groups, states."""

    batch: int
    length: int
    heads: int
    groups: int = 1
    width: int = 64
    state: int = 128

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def bytes(self) -> float:
        """Least traffic of the forward pass: x, y, b and c in 16 bits, step sizes in 32."""
        each = 4 * self.heads * self.width + 4 * self.groups * self.state + 4 * self.heads
        return float(self.tokens * each)

    @property
    def flops(self) -> float:
        """Of the forward pass in chunks of 64, what heads of a group share counted once."""
        chunk = 64
        head = chunk * self.width + 2 * self.state * self.width
        return 2.0 * self.tokens * (self.heads * head + self.groups * chunk * self.state)


def _of(batch: int, length: int, heads: int, **more: int) -> Shaped:
    return Shaped(batch=batch, length=length, heads=heads, **more)


CASES = {
    "128 heads, 8 x 4096": _of(8, 4096, 128),
    "128 heads, 2 x 16384": _of(2, 16384, 128),
    "64 heads, 8 x 2048 (Mamba-2 1.3B)": _of(8, 2048, 64),
    "80 heads, 8 groups, 4 x 4096": _of(4, 4096, 80, groups=8),
    "24 heads, 16 x 1024 (Mamba-2 130M)": _of(16, 1024, 24),
}
