"""The prefix cache: pages found again by what they hold, and prefixes that are kept for ever."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from collections.abc import Sequence as Sequence_

from jaxllm.errors import CapacityError
from jaxllm.serve.pages import Pages, chain
from jaxllm.serve.sequence import Holding, Sequence
from jaxllm.serve.spill import HostPages

__all__ = ["Prefixes"]


class Prefixes:
    """Which pages hold the beginning of which sequence.

    Args:
      pages: of every group of layers.
      windows: how many tokens before a query each group sees, None for all.
      size: tokens a page.
      on: whether anything is found at all.
      host: pages that were given up on the device, or None.
    """

    def __init__(
        self,
        pages: Mapping[str, Pages],
        windows: Mapping[str, int | None],
        *,
        size: int,
        on: bool,
        host: HostPages | None = None,
    ):
        self._host = host
        self._pages, self._windows, self._size, self.on = dict(pages), dict(windows), size, on
        self._pinned: list[tuple[list[int], list[bytes]]] = []
        self.pinned_pages = dict.fromkeys(pages, 0)

    def pin(self, tokens: Sequence_[int]) -> int:
        """Keep the pages of a prefix for ever, and let every tenant find them.

        Args:
          tokens: that were computed just now, for the tenant without a name.

        Returns:
          How many tokens are pinned, those of whole pages.

        Raises:
          CapacityError: their pages are not there any more, or are over half of all.
        """
        size = self._size
        hashes = chain(tokens, size)
        found: dict[str, list[int]] = {}
        for group, pages in self._pages.items():
            keys = hashes[self.first_page(group, len(hashes) * size) :]
            found[group] = [page for key in keys if (page := pages.find(key)) is not None]
            count = self.pinned_pages[group] + len(found[group])
            if len(found[group]) < len(keys) or 2 * count > pages.count:
                raise CapacityError(
                    f"a prefix of {len(tokens)} tokens cannot be pinned: of {pages.count} pages "
                    f"of {size} at most half are; serve with more cache_tokens"
                )
        for group, taken in found.items():
            for page in taken:
                self._pages[group].share(page)
            self.pinned_pages[group] += len(taken)
        self._pinned.append((list(tokens[: len(hashes) * size]), hashes))
        return len(hashes) * size

    def _public(self, tokens: list[int]) -> list[bytes]:
        """Hashes of the pages that tokens begin with and that a pinned prefix has."""
        size, best = self._size, []
        for pinned, hashes in self._pinned:
            same = 0
            for start in range(0, len(pinned), size):
                if tokens[start : start + size] != pinned[start : start + size]:
                    break
                same += 1
            best = hashes[:same] if same > len(best) else best
        return list(best)

    def first_page(self, group: str, position: int) -> int:
        """The first page number that a query at this position looks at."""
        left = self._windows[group]
        return 0 if left is None else max(0, position - left) // self._size

    def costs(self, sequence: Sequence, group: str, stop: int) -> int:
        """Available pages that `hold` takes: those that nobody holds, and those on the host."""
        pages, first = self._pages[group], self.first_page(group, stop * self._size)
        found = [pages.find(key) for key in sequence.hashes[first:stop]]
        return sum(page is None or pages.is_kept(page) for page in found)

    def hold(self, sequence: Sequence, stop: int) -> dict[str, Holding]:
        """Hold what the next token sees of the first `stop` pages, which `cached` found; what is on
        the host comes back."""
        held, kept = {}, []
        for group, pages in self._pages.items():
            first = self.first_page(group, stop * self._size)
            held[group] = Holding([], first)
            for key in sequence.hashes[first:stop]:
                page = pages.find(key)
                if page is not None:
                    pages.share(page)
                else:
                    assert self._host is not None
                    kept.append((group, key, len(held[group].pages), self._host.find(group, key)))
                held[group].pages.append(-1 if page is None else page)
        # All are found by now: to take a page may cost another its place on the host.
        for group, key, place, one in kept:
            assert self._host is not None and one is not None
            page = held[group].pages[place] = self._pages[group].take()
            self._pages[group].name(page, key)
            self._host.come(group, key, page, one)
        return held

    def _there(self, group: str, key: bytes) -> bool:
        """Whether a page is on the device or on the host."""
        if self._pages[group].find(key) is not None:
            return True
        return self._host is not None and self._host.find(group, key) is not None

    def cached(self, sequence: Sequence) -> int:
        """Full pages from the start that the cache can give; one token at least is computed."""
        if not (self.on and sequence.cacheable):
            return 0
        size = self._size
        sequence.hashes = sequence.hashes or self._public(sequence.tokens)
        sequence.hashes = chain(sequence.tokens, size, salt=sequence.tenant, known=sequence.hashes)
        most = min(len(sequence.hashes), (sequence.length - 1) // size)
        for group, left in self._windows.items():
            if left is None:
                held = itertools.takewhile(
                    lambda key, g=group: self._there(g, key), sequence.hashes
                )
                most = min(most, sum(1 for _ in held))
        while most > 0 and not all(self._has(sequence, group, most) for group in self._windows):
            most -= 1
        return most

    def _has(self, sequence: Sequence, group: str, stop: int) -> bool:
        """Whether a group's pages before `stop` that a query there looks at are all to be found."""
        first = self.first_page(group, stop * self._size)
        return all(self._there(group, key) for key in sequence.hashes[first:stop])

    def name(self, sequence: Sequence) -> None:
        """Let full pages of known tokens be found: a later step reads them after this one's."""
        if not (self.on and sequence.cacheable) or not sequence.holdings:
            return
        size = self._size
        full = min(sequence.computed, len(sequence.tokens)) // size
        if full <= sequence.named:
            return
        if len(sequence.hashes) < full:
            sequence.hashes = chain(
                sequence.tokens, size, salt=sequence.tenant, known=sequence.hashes
            )
        for group, holding in sequence.holdings.items():
            for number in range(max(sequence.named, holding.first), min(full, holding.end)):
                page = holding.pages[number - holding.first]
                self._pages[group].name(page, sequence.hashes[number])
        sequence.named = full
