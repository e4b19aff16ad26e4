"""How many tokens a step has: guesses by how they fared and what they cost, prompts by how long
such steps took."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["Cadence", "Pace", "sizes"]

KEEP = 0.8
"""Of the estimate of acceptance, at each step."""
HOPE = 0.7
"""The estimate before anything is known."""
EVEN = 1.8
"""Times a step of decoding that one with prompts may take: tokens then come within twice."""
FORGET = 512
"""Steps after which what a step took is not known any more, so that it is tried again."""


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


class Cadence:
    """Tokens of a step that computes prompts while others decode: as many as leave it at most
    `EVEN` times as long as a step that decodes alone, by what steps took.

    Args:
      sizes: tokens of the programs for such steps.
    """

    def __init__(self, sizes: Sequence[int]):
        self._sizes = sorted(set(sizes))
        self._decode: dict[int, float] = {}
        self._mixed: dict[int, tuple[float, int]] = {}
        self._steps = 0

    def learn(self, tokens: int, seconds: float, *, decode: bool) -> None:
        """What a step took.

        Args:
          tokens: of its program.
          seconds: from its start to its tokens.
          decode: whether it computed no prompts.
        """
        self._steps += 1
        if decode:
            old = self._decode.get(tokens, seconds)
            self._decode[tokens] = KEEP * old + (1 - KEEP) * seconds
            return
        old, _ = self._mixed.get(tokens, (seconds, 0))
        self._mixed[tokens] = KEEP * old + (1 - KEEP) * seconds, self._steps

    def tokens(self, decoding: int) -> int:
        """Tokens of the next step in which so many sequences decode; the fewest that there is a
        program for while nothing is known, and then at most one size more than is known."""
        sizes = [size for size in self._sizes if size > decoding] or self._sizes[-1:]
        best = sizes[0]
        if not self._decode:
            return best
        near = min(self._decode, key=lambda rows: (abs(rows - decoding), rows))
        alone, took = self._decode[near], 0.0
        for size in sizes:
            seconds, when = self._mixed.get(size, (0.0, -FORGET))
            known = self._steps - when < FORGET
            if not known:  # as if each token took what those of the size before did
                seconds = alone + (took - alone) * (size - decoding) / max(1, best - decoding)
            if size > best and seconds > EVEN * alone:
                break
            best, took = size, seconds
            if not known:
                break
        return best
