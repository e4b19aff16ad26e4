"""The cases that attention over pages is timed on."""

from __future__ import annotations

import dataclasses

__all__ = ["CASES", "Shaped"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shaped:
    """Sequences of one length (or of lengths spread evenly from 1 to it), with new queries each."""

    sequences: int
    length: int
    heads: int = 32
    kv_heads: int = 8
    width: int = 128
    page: int = 64
    queries: int = 1
    spread: bool = False

    @property
    def lengths(self) -> list[int]:
        """Keys of each sequence."""
        if not self.spread:
            return [self.length] * self.sequences
        return [max(1, self.length * (i + 1) // self.sequences) for i in range(self.sequences)]

    @property
    def nbytes(self) -> int:
        """Of keys and values in 16 bits, which any implementation must read."""
        return sum(self.lengths) * self.kv_heads * self.width * 4

    @property
    def coded_nbytes(self) -> int:
        """The same in 8 bits, with float32 scales."""
        return sum(self.lengths) * self.kv_heads * (self.width + 4) * 2

    @property
    def flops(self) -> float:
        """Of both products."""
        return 4.0 * sum(self.lengths) * self.queries * self.heads * self.width


CASES = {
    "8B, 32 x 2,048": Shaped(sequences=32, length=2048),
    "8B, 128 x 2,048": Shaped(sequences=128, length=2048),
    "8B, 128 spread to 4,096": Shaped(sequences=128, length=4096, spread=True),
    "8B, 1 x 32,768": Shaped(sequences=1, length=32768),
    "8B, 32 x 2,048, pages of 16": Shaped(sequences=32, length=2048, page=16),
    "8B, 32 x 2,048, pages of 128": Shaped(sequences=32, length=2048, page=128),
    "1B, 64 x 2,048": Shaped(sequences=64, length=2048, width=64),
    "1B, 1 x 512": Shaped(sequences=1, length=512, width=64),
    "MHA, 32 x 2,048": Shaped(sequences=32, length=2048, kv_heads=32),
    "8B, 32 x 2,048, 4 verified": Shaped(sequences=32, length=2048, queries=4),
    "8B, 8 parts of 32 at 2,048": Shaped(sequences=8, length=2048, queries=32),
}
