"""The cases that the gated norm is timed on."""

from __future__ import annotations

import dataclasses

__all__ = ["CASES", "Shaped"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shaped:
    """One call: rows of channels in bfloat16."""

    tokens: int
    channels: int
    groups: int = 1

    @property
    def bytes(self) -> float:
        """Least traffic of the forward pass: three arrays read, one written."""
        return 8.0 * self.tokens * self.channels

    @property
    def flops(self) -> float:
        """None of matrix products."""
        return 0.0


CASES = {
    "4096 channels, 8 x 2048 (Mamba-2 1.3B)": Shaped(tokens=16384, channels=4096),
    "1536 channels, 16 x 1024 (Mamba-2 130M)": Shaped(tokens=16384, channels=1536),
    "8192 channels in 8 groups, 16384": Shaped(tokens=16384, channels=8192, groups=8),
}
