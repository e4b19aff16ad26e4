"""The cases that linear attention is timed on."""

from __future__ import annotations

import dataclasses

__all__ = ["CASES", "Shaped"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shaped:
    """One call: sequences of a length, heads with values and keys of a width, and its gates."""

    batch: int
    length: int
    heads: int
    key_heads: int
    width: int = 128
    state: int = 128
    delta: bool = True
    channels: bool = False

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def bytes(self) -> float:
        """Least traffic of the forward pass: q, k, v and out in 16 bits, gates in 32."""
        wide = 4 * self.heads * self.width + 4 * self.key_heads * self.state
        gates = self.delta + (self.state if self.channels else 1)
        return float(self.tokens * (wide + 4 * self.heads * gates))

    @property
    def flops(self) -> float:
        """Of the forward pass in chunks of 64: the matrix read and written, tokens of a chunk read
        of each other, and by the delta rule the triangular system as 64^3 / 3 products."""
        chunk = 64
        head = 2 * self.state * self.width + chunk * (self.state + self.width)
        if self.delta:
            head += self.state * self.width + chunk * (2 * self.state + self.width)
            head += chunk * chunk / 3
        return 2.0 * self.tokens * self.heads * head


def _of(batch: int, length: int, heads: tuple[int, int], **more) -> Shaped:
    return Shaped(batch=batch, length=length, heads=heads[0], key_heads=heads[1], **more)


CASES = {
    "gated delta rule, 32 heads, 8 x 2048 (Qwen3-Next)": _of(8, 2048, (32, 16)),
    "gated delta rule, 96 heads, 1 x 8192": _of(1, 8192, (96, 96)),
    "gated delta rule, 30 heads of 192, keys of 96, 4 x 2048": _of(
        4, 2048, (30, 30), width=192, state=96
    ),
    "delta rule by channel, 32 heads, 4 x 4096 (KDA)": _of(4, 4096, (32, 32), channels=True),
    "by channel, 16 heads, 4 x 4096 (GLA)": _of(4, 4096, (16, 16), delta=False, channels=True),
}
