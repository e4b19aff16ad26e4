"""What walks over lists of blocks have in common: a map says who sees whom, beside the lengths."""

from __future__ import annotations

import dataclasses

from pallas_kernels.flash_attention.ranges import Walk

__all__ = ["MapWalk"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MapWalk(Walk):
    """A walk that follows a block map."""

    @property
    def masked(self) -> bool:
        """Blocks with a pattern need a mask."""
        return True

    @property
    def trailing(self) -> bool:
        """They are visited after the full ones."""
        return True

    @property
    def leading(self) -> bool:
        """No block needs a mask before the full ones."""
        return False

    @property
    def apart(self) -> bool:
        """A pattern is no end of a band."""
        return False

    @property
    def heavy_last(self) -> bool:
        """No order of tiles is known."""
        return False

    @property
    def uneven(self) -> bool:
        return True

    @property
    def limited(self) -> bool:
        """Whether a sequence's keys may end before its last block does."""
        return "key_lengths" in self.names and not self.transposed
