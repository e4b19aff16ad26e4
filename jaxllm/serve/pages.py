"""Pages: who holds which, and which hold a prefix that somebody may want again.

A page is free, held (by one or more sequences), or kept: held by nobody, but full of tokens whose
hash is known. Kept pages are taken back, the least recently used first, when no page is free.
"""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from jaxllm.core.config import require
from jaxllm.errors import CapacityError

__all__ = ["Pages", "chain"]


def chain(
    tokens: Sequence[int], size: int, *, salt: str = "", known: Sequence[bytes] = ()
) -> list[bytes]:
    """SHA-256 of every full page of tokens, of all before it and of the salt.

    Args:
      tokens: from the first of the sequence on.
      size: tokens a page.
      salt: tenants with different salts share nothing.
      known: hashes of the first pages, not computed again.
    """
    out = list(known)
    name = hashlib.sha256(salt.encode()).digest()
    last = out[-1] if out else b""
    for start in range(len(out) * size, len(tokens) - size + 1, size):
        part = np.asarray(tokens[start : start + size], np.int32).tobytes()
        last = hashlib.sha256(name + last + part).digest()
        out.append(last)
    return out


class Pages:
    """The pages 0..count-1 of one group of layers.

    Args:
      count: of pages.
      evicted: told the page and the hash of a kept page that is about to be given to another.
    """

    def __init__(self, count: int, evicted: Callable[[int, bytes], None] | None = None):
        require(count >= 1, f"pages: there must be at least one, found {count}")
        self.count, self._evicted = count, evicted
        self._free = list(range(count - 1, -1, -1))
        self._holders = [0] * count
        self._hash_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._kept: collections.OrderedDict[int, None] = collections.OrderedDict()

    @property
    def available(self) -> int:
        """Pages that can be taken now."""
        return len(self._free) + len(self._kept)

    @property
    def held(self) -> int:
        """Pages that sequences hold."""
        return self.count - self.available

    @property
    def kept(self) -> int:
        """Pages that nobody holds and that can be found by their hash."""
        return len(self._kept)

    def take(self) -> int:
        """A page for one holder, with anything in it.

        Raises:
          CapacityError: all are held.
        """
        if self._free:
            page = self._free.pop()
        elif self._kept:
            page, _ = self._kept.popitem(last=False)
            key = self._hash_of.pop(page)
            del self._page_of[key]
            if self._evicted is not None:
                self._evicted(page, key)
        else:
            raise CapacityError(f"all {self.count} pages are held; release some first")
        self._holders[page] = 1
        return page

    def find(self, key: bytes) -> int | None:
        """The page with this hash, or None; it is not taken."""
        return self._page_of.get(key)

    def is_kept(self, page: int) -> bool:
        """Whether a page is held by nobody, so that sharing it takes an available one."""
        return page in self._kept

    def share(self, page: int) -> None:
        """One more holder of a page that was found or is held."""
        if self._holders[page] == 0:
            require(page in self._kept, f"page {page} is free; take it")
            del self._kept[page]
        self._holders[page] += 1

    def name(self, page: int, key: bytes) -> None:
        """Say what a held page is full of; the first page of a hash keeps it."""
        require(self._holders[page] > 0, f"page {page} is held by nobody")
        if key not in self._page_of and page not in self._hash_of:
            self._page_of[key] = page
            self._hash_of[page] = key

    def release(self, page: int) -> None:
        """One holder less; without any a page of known contents is kept, another is free."""
        require(self._holders[page] > 0, f"page {page} is held by nobody")
        self._holders[page] -= 1
        if self._holders[page] == 0:
            if page in self._hash_of:
                self._kept[page] = None
            else:
                self._free.append(page)

    def check(self) -> None:
        """Every page is free, held or kept, and only one of these.

        Raises:
          CapacityError: the account is wrong.
        """
        held = {page for page, holders in enumerate(self._holders) if holders > 0}
        free, kept = set(self._free), set(self._kept)
        whole = len(free) + len(kept) + len(held) == self.count == len(free | kept | held)
        named = {self._page_of[key]: key for key in self._page_of} == self._hash_of
        if not (whole and named and len(self._free) == len(free) and kept <= set(self._hash_of)):
            raise CapacityError("the account of pages is wrong")
