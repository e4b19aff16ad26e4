"""The cases that flash attention is timed on."""

from __future__ import annotations

import dataclasses

__all__ = ["CASES", "Shaped"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shaped:
    """One call: sizes and options; T = S.

    Attributes:
      documents: a row holds so many of equal lengths, packed.
      like: name of the case without the option, whose rate a visible pair is compared with.
    """

    batch: int
    length: int
    heads: int
    kv_heads: int
    width: int
    causal: bool = True
    window: tuple[int | None, int | None] | None = None
    softcap: float | None = None
    documents: int = 1
    like: str | None = None

    @property
    def pairs(self) -> float:
        """Query-key pairs of one head that see each other; a causal square counts as half, so does
        the one in which a causal window's first rows see less than the window."""
        whole = float(self.length) ** 2 / self.documents
        if self.window is not None and self.window[0] is not None and self.causal:
            seen = min(self.window[0] + 1, self.length)
            return seen * (self.length - seen / 2)
        return whole / 2 if self.causal else whole

    @property
    def flops(self) -> float:
        """Of the forward; forward and backward count 3.5 times as much."""
        return 4.0 * self.batch * self.heads * self.pairs * self.width

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of q, k, v and the gradient of the result."""
        q = (self.batch, self.length, self.heads, self.width)
        k = (self.batch, self.length, self.kv_heads, self.width)
        return q, k, k, q


def _of(batch, length, heads, kv_heads, width, **more) -> Shaped:
    sizes = {"batch": batch, "length": length, "heads": heads, "kv_heads": kv_heads, "width": width}
    return Shaped(**sizes, **more)


# The first ones are compiled and timed first.
CASES = {
    "8B, 4k": _of(4, 4096, 32, 8, 128),
    "8B, 4k, full": _of(4, 4096, 32, 8, 128, causal=False),
    "8B, 16k": _of(1, 16384, 32, 8, 128),
    "heads of 64, 4k": _of(4, 4096, 32, 8, 64),
    "124M, 1k": _of(16, 1024, 16, 16, 64),
    "heads of 256, 4k": _of(2, 4096, 16, 8, 256),
    "window 1024": _of(4, 4096, 32, 8, 128, window=(1023, 0), like="8B, 4k"),
    "four documents": _of(4, 4096, 32, 8, 128, documents=4, like="8B, 4k"),
    "soft-cap": _of(4, 4096, 32, 8, 128, softcap=50.0, like="8B, 4k"),
    "70B, 4k": _of(2, 4096, 64, 8, 128),
    "window 1024, heads of 256": _of(
        2, 4096, 16, 8, 256, window=(1023, 0), like="heads of 256, 4k"
    ),
}
