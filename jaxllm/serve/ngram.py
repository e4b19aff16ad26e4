"""Drafts by prompt lookup: what followed the last few tokens when they came before.

A draft is a guess with all its mass on one token. A step that draws its own token at every place,
by the noise of the request's seed and that place, and keeps those after drafts that it agrees with,
is rejection sampling for such guesses: a draft d is kept with probability p(d), and what stands in
its place otherwise is p without d. So the tokens are those of no drafts at all, only sooner.
Source: arXiv 2211.17192 for verification; arXiv 2304.04487 for drafts from the context.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxllm.serve.pace import Pace

__all__ = ["Drafter", "agreed"]

SIZES = (4, 3, 2)
"""Tokens that must have come before, the most telling first."""
MOST_TOKENS = 1 << 14
"""Of a prompt that are looked at, its last ones."""


def agreed(drafts: Sequence[int], drawn: Sequence[int]) -> list[int]:
    """New tokens: those drawn up to the first that is not the draft, and this one.

    Args:
      drafts: k guesses.
      drawn: k + 1 tokens, each as if all drafts before were right.
    """
    count = 0
    while count < len(drafts) and drafts[count] == drawn[count]:
        count += 1
    return list(drawn[: count + 1])


class Drafter(Pace):
    """Drafts for one sequence; see `Pace`."""

    def __init__(self, most: int, cost: float):
        super().__init__(most, cost)
        self._places: list[dict[tuple[int, ...], int]] = [{} for _ in SIZES]
        self._read = -1

    def propose(self, tokens: Sequence[int], most: int, rows: int = 1) -> list[int]:
        """A draft of what follows, perhaps none.

        Args:
          tokens: of the sequence.
          most: of the draft.
          rows: sequences in the step.
        """
        best = self.count(len(tokens), rows)
        if not best:
            return []
        found = self._after(tokens)
        if found is None:
            self.rest(len(tokens), 16)
            return []
        whole = list(tokens[found:])
        count = min(best, most)
        while 0 < len(whole) < count:  # what repeats itself goes on repeating
            whole += whole[: count - len(whole)]
        return whole[:count]

    def _after(self, tokens: Sequence[int]) -> int | None:
        """Where what came after the last tokens begins; the latest such place."""
        end = len(tokens)
        if self._read < 0:
            self._read = max(0, end - MOST_TOKENS)
        for stop in range(self._read + 1, end):  # the end itself is what is looked for
            for size, places in zip(SIZES, self._places, strict=True):
                if stop >= size:
                    places[tuple(tokens[stop - size : stop])] = stop
        self._read = max(self._read, end - 1)
        for size, places in zip(SIZES, self._places, strict=True):
            if end >= size:
                found = places.get(tuple(tokens[end - size : end]))
                if found is not None:
                    return found
        return None
