"""The prefix cache: pages found again by what they hold, and prefixes that are kept for ever."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from collections.abc import Sequence as Sequence_

from jaxllm.errors import CapacityError
from jaxllm.serve.pages import Pages, chain
from jaxllm.serve.sequence import Sequence

__all__ = ["Prefixes"]


class Prefixes:
    """Which pages hold the beginning of which sequence.

    Args:
      pages: of every group of layers.
      windows: how many tokens before a query each group sees, None for all.
      size: tokens a page.
      on: whether anything is found at all.
    """

    def __init__(
        self,
        pages: Mapping[str, Pages],
        windows: Mapping[str, int | None],
        *,
        size: int,
        on: bool,
    ):
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

    def pages_of(self, sequence: Sequence, group: str, first: int, stop: int) -> list[int]:
        """Pages of a group that hold the sequence's pages first..stop-1, those that are there."""
        found = [self._pages[group].find(key) for key in sequence.hashes[first:stop]]
        return [page for page in found if page is not None]

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
                    lambda key, g=group: self._pages[g].find(key) is not None, sequence.hashes
                )
                most = min(most, sum(1 for _ in held))
        while most > 0 and not all(self._has(sequence, group, most) for group in self._windows):
            most -= 1
        return most

    def _has(self, sequence: Sequence, group: str, stop: int) -> bool:
        """Whether a group's pages before `stop` that a query there looks at are all to be found."""
        first = self.first_page(group, stop * self._size)
        return len(self.pages_of(sequence, group, first, stop)) == stop - first

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
