"""A step's turns, one a sequence, and the bounds of a step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Sequence_

from jaxllm.core.config import require
from jaxllm.serve.sequence import Sequence

__all__ = ["Limits", "Turn"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of one step.

    Attributes:
      tokens: of all sequences together.
      sequences: that run at once.
      longest: tokens of one sequence.
      page_size: Z.
      prefix_cache: whether pages are found again by what they hold.
      mixed: tokens of a step in which prompts are computed while others decode; 0 for no bound.
      drafts: tokens that one sequence may guess in a step; 0 for none.
      verified: tokens of a step with drafts.
      steps: of decoding that the device can take by itself.
      guesses: how many tokens of each sequence a draft model can guess in a step, rising.
    """

    tokens: int
    sequences: int
    longest: int
    page_size: int
    prefix_cache: bool = True
    mixed: int = 0
    drafts: int = 0
    verified: int = 0
    steps: int = 1
    guesses: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        require(
            min(self.tokens, self.sequences, self.longest, self.page_size) >= 1,
            f"limits are positive, found {self}",
        )
        require(
            self.tokens >= self.sequences,
            f"a step of {self.tokens} tokens must hold one of each of {self.sequences} sequences",
        )


@dataclasses.dataclass(slots=True)
class Turn:
    """What one sequence does in a step.

    Attributes:
      sequence: whose turn it is.
      start: tokens computed before.
      count: tokens it feeds.
      draws: whether the step draws its next token.
      begins: whether it is the first chunk since it got its slot.
      unread: whether its one token is on the device only.
      drafts: the last ones of those that it feeds, that are guesses.
      steps: of decoding in one go, `count` of them for this sequence; it draws a token at each.
      guesses: of a draft model in this step, `count` - 1 of them of this sequence.
    """

    sequence: Sequence
    start: int
    count: int
    draws: bool
    begins: bool
    unread: bool
    drafts: Sequence_[int] = ()
    steps: int = 1
    guesses: int = 0

    @property
    def places(self) -> int:
        """Tokens that it draws if it draws any."""
        return self.count if self.steps > 1 or self.guesses else 1 + len(self.drafts)

    @property
    def fed(self) -> list[int]:
        """The tokens that it feeds, of those that the host knows."""
        end = self.start + self.count - len(self.drafts)
        return [*self.sequence.tokens[self.start : end], *self.drafts]

    @property
    def masked(self) -> bool:
        """Whether a grammar limits what it draws."""
        return self.draws and self.sequence.guide is not None
