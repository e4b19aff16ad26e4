"""The cases that the scan is timed on."""

from __future__ import annotations

import dataclasses

__all__ = ["CASES", "Shaped"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shaped:
    """One call: sequences of a length, channels, states of each."""

    batch: int
    length: int
    channels: int
    state: int = 16

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def bytes(self) -> float:
        """Least traffic of the forward pass: x and y in 16 bits, step sizes, b and c in 32."""
        return float(self.tokens * (8 * self.channels + 8 * self.state))

    @property
    def flops(self) -> float:
        """None of matrix products."""
        return 0.0


def _of(batch: int, length: int, channels: int) -> Shaped:
    return Shaped(batch=batch, length=length, channels=channels)


CASES = {
    "4096 channels, 8 x 2048 (Mamba 1.4B)": _of(8, 2048, 4096),
    "4096 channels, 1 x 16384": _of(1, 16384, 4096),
    "1536 channels, 16 x 1024 (Mamba 130M)": _of(16, 1024, 1536),
}
