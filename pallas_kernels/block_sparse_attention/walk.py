"""What walks over lists of blocks have in common: a map says who sees whom, beside the lengths."""

from __future__ import annotations

import dataclasses

from pallas_kernels.flash_attention.ranges import Walk

__all__ = ["MapWalk"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MapWalk(Walk):
    """A walk that follows a block map."""

    masked = trailing = True
    segmented = packed = leading = apart = last_is_high = heavy_last = False

    @property
    def limited(self) -> bool:
        """Whether a sequence's keys may end before its last block does."""
        return "key_lengths" in self.names and not self.transposed
