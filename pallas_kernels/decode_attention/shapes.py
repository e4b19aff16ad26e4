"""The cases that attention of one new token a sequence is tested and timed on."""

from __future__ import annotations

import dataclasses

__all__ = ["CASES", "Shaped"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shaped:
    """Sequences whose new token stands at one place, in caches of more slots."""

    sequences: int
    position: int
    slots: int
    heads: int = 32
    kv_heads: int = 8
    width: int = 128

    @property
    def nbytes(self) -> int:
        """Of keys and values in 16 bits up to the new token, which any implementation must read."""
        return self.sequences * (self.position + 1) * self.kv_heads * self.width * 4


CASES = {
    "1B, 1 x 512": Shaped(sequences=1, position=512, slots=704, width=64),
    "1B, 1 x 4,096": Shaped(sequences=1, position=4095, slots=4096, width=64),
    "8B, 1 x 512": Shaped(sequences=1, position=512, slots=1024),
    "8B, 1 x 2,048": Shaped(sequences=1, position=2047, slots=2048),
    "8B, 1 x 32,768": Shaped(sequences=1, position=32767, slots=32768),
    "1B, 8 x 512": Shaped(sequences=8, position=512, slots=704, width=64),
    "8B, 8 x 2,048": Shaped(sequences=8, position=2047, slots=2048),
    "1B, 32 x 512": Shaped(sequences=32, position=512, slots=704, width=64),
    "8B, 32 x 2,048": Shaped(sequences=32, position=2047, slots=2048),
    "MHA, 8 x 1,024": Shaped(sequences=8, position=1023, slots=1024, heads=32, kv_heads=32),
}
