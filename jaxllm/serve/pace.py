"""How many tokens of a sequence are guessed ahead: by how guesses fared, and what they cost."""

from __future__ import annotations

__all__ = ["Pace", "sizes"]

KEEP = 0.8
"""Of the estimate of acceptance, at each step."""
HOPE = 0.7
"""The estimate before anything is known."""


def sizes(most: int) -> list[int]:
    """Lengths of drafts that are tried, rising."""
    return [n for n in (1, 3, 7, 15, 31) if n < most] + [most]


def _gain(rate: float, count: int, cost: float) -> float:
    """Tokens a unit of time with so many drafts, of which each is right at this rate."""
    expected = sum(rate**i for i in range(count + 1))
    return expected / (1 + cost * count)


class Pace:
    """The length of one sequence's drafts.

    Args:
      most: tokens of a draft.
      cost: of verifying one more token in a step, as a share of a step of one.
      own: of a draft model's step, likewise.
    """

    def __init__(self, most: int, cost: float, own: float = 0.0):
        self._most, self._cost, self._own = most, cost, own
        self._rate, self._pause, self._resume = HOPE, 1, 0

    def active(self, length: int) -> bool:
        """Whether it wants to see a sequence of so many tokens."""
        return length >= self._resume

    def count(self, length: int, rows: int = 1) -> int:
        """Tokens worth guessing of a sequence of so many; 0 for none for a while.

        Args:
          length: of the sequence.
          rows: sequences in the step: the more there are, the less a step is free.
        """
        cost = self._cost * rows / (1 + self._cost * (rows - 1)) + self._own
        best = max(sizes(self._most), key=lambda n: _gain(self._rate, n, cost))
        if _gain(self._rate, best, cost) > 1:
            return best
        # Not worth it; try again later, a little, and later still if that fails too.
        self.rest(length, 64)
        self._rate = max(self._rate, min(1.0, 1.2 * cost))
        return 0

    def learn(self, drafted: int, accepted: int) -> None:
        """How a draft fared."""
        tried = accepted + (accepted < drafted)
        share = accepted / tried
        self._rate = KEEP * self._rate + (1 - KEEP) * share
        if accepted:
            self._pause = 1

    def rest(self, length: int, most: int) -> None:
        """Guess nothing before the sequence is longer by a pause, which grows."""
        self._resume = length + self._pause
        self._pause = min(2 * self._pause, most)
