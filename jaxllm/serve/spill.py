"""Pages on the host: what the prefix cache gives up on the device, kept by what it holds.

Only the account; `transfer` moves the contents. A page that comes back stays here too, so that it
leaves the device again without a copy; the least recently used go when there is no room.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from jaxllm.core.config import require
from jaxllm.errors import CapacityError
from jaxllm.serve.pages import Pages

__all__ = ["HostPages", "Kept", "Move", "accounts"]


@dataclasses.dataclass(eq=False, slots=True)
class Kept:
    """One page's contents.

    Attributes:
      size: bytes.
      data: an array of each layer's pool, on the device until the copy is there, then on the host;
        None before the copy begins.
      wanted: whether anybody can still ask for it.
    """

    size: int
    data: Any = None
    wanted: bool = True


Move = tuple[str, int, Kept]
"""Group, page on the device, and what it holds or is to hold."""


class HostPages:
    """The pages of all groups that are kept on the host.

    Args:
      limit_bytes: of all together.
      page_bytes: of one page of each group.

    Raises:
      ConfigError: the limit holds no page.
    """

    def __init__(self, limit_bytes: int, page_bytes: Mapping[str, int]):
        largest = max(page_bytes.values(), default=0)
        require(
            limit_bytes >= largest,
            f"spill_gib: {limit_bytes} bytes hold no page, which has {largest}; give more, or 0",
        )
        self.limit_bytes, self._page_bytes = limit_bytes, dict(page_bytes)
        self.bytes = 0
        self.spilled = 0
        self.restored = 0
        self._kept: collections.OrderedDict[tuple[str, bytes], Kept] = collections.OrderedDict()
        self._leaving: list[Move] = []
        self._coming: list[Move] = []

    def leave(self, group: str, page: int, key: bytes) -> None:
        """Keep a page that the device is about to lose; its contents are copied by `moves`."""
        name, size = (group, key), self._page_bytes[group]
        if name in self._kept:
            self._kept.move_to_end(name)
            return
        while self.bytes + size > self.limit_bytes:
            _, old = self._kept.popitem(last=False)
            self.bytes, old.wanted = self.bytes - old.size, False
        kept = self._kept[name] = Kept(size)
        self.bytes += size
        self._leaving.append((group, page, kept))

    def find(self, group: str, key: bytes) -> Kept | None:
        """What is kept under this hash, or None."""
        return self._kept.get((group, key))

    def come(self, group: str, key: bytes, page: int, kept: Kept) -> None:
        """Bring what was found back into a page of the device, with the next `moves`.

        Args:
          group: of layers.
          key: its hash.
          page: to write to, held by whoever asks.
          kept: found before the page was taken, which may have cost it its place here.
        """
        if (group, key) in self._kept:
            self._kept.move_to_end((group, key))
        self.restored += 1
        self._coming.append((group, page, kept))

    def moves(self) -> tuple[list[Move], list[Move]]:
        """(pages to copy from the device, pages to write to it after that) since the last call,
        before anything else writes to them."""
        for _, _, kept in self._coming:  # also those that lost their place after they were found
            kept.wanted = True
        leaving = [move for move in self._leaving if move[2].wanted]
        coming, self._leaving, self._coming = self._coming, [], []
        self.spilled += len(leaving)
        return leaving, coming

    def check(self) -> None:
        """The bytes are those of what is kept, and within the limit.

        Raises:
          CapacityError: the account is wrong.
        """
        total = sum(kept.size for kept in self._kept.values())
        if total != self.bytes or total > self.limit_bytes:
            raise CapacityError("the account of pages on the host is wrong")


def accounts(counts: Mapping[str, int], host: HostPages | None) -> dict[str, Pages]:
    """The pages of every group, which leave for the host where there is room for them.

    Args:
      counts: pages of each group.
      host: or None, and what is given up is lost.
    """
    if host is None:
        return {group: Pages(count) for group, count in counts.items()}
    return {g: Pages(n, functools.partial(host.leave, g)) for g, n in counts.items()}
