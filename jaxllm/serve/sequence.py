"""One sequence on its way: its tokens, how far they are computed, and the pages it holds."""

from __future__ import annotations

import dataclasses
from typing import Any

__all__ = ["Holding", "Sequence"]


@dataclasses.dataclass(slots=True)
class Holding:
    """Pages of one group that a sequence holds: of page numbers `first`, `first` + 1, …

    `changed` is set with every change, and cleared by who keeps a copy.
    """

    pages: list[int] = dataclasses.field(default_factory=list)
    first: int = 0
    changed: bool = True

    @property
    def end(self) -> int:
        """The page number after the last."""
        return self.first + len(self.pages)


@dataclasses.dataclass(eq=False, kw_only=True, slots=True)
class Sequence:
    """A prompt and its answer; all requests, new, running or preempted, chase one token count.

    Attributes:
      tokens: those known on the host: the prompt, and answer tokens that were read.
      prompt_length: tokens of the prompt.
      limit: tokens of prompt and answer at which it ends.
      priority: smaller is sooner.
      tenant: who is served in turn with others, and shares a prefix cache with nobody else.
      arrival: a number that grows.
      cacheable: whether its pages may be shared.
      after: another of the same prompt whose pages it waits for.
      owner: whatever its results are for.
      length: tokens there are, those drawn on the device and not yet read included.
      computed: tokens in the state.
      cached: of these, at its last start, from the prefix cache.
      slot: its place in arrays by sequence, or None while it waits.
      holdings: pages by group.
      room: tokens that its pages reach up to.
      hashes: of full pages of known tokens.
      named: full pages that can be found by their hash.
      done: nothing more is wanted of it.
      begins: whether its next chunk is its first since it got its slot.
      guide: its way through a grammar, or None; the next token is drawn when the last is known.
      drafter: guesses what comes next, or None; likewise, while it is active.
      guessed: tokens fed that were guesses and are not known to be right yet.
      plain: whether it takes the most likely tokens and wants no more, so that the device can go on
        by itself.
    """

    tokens: list[int]
    prompt_length: int
    limit: int
    priority: int = 0
    tenant: str = ""
    arrival: int = 0
    cacheable: bool = True
    after: Sequence | None = None
    owner: Any = None
    length: int = 0
    computed: int = 0
    cached: int = 0
    slot: int | None = None
    holdings: dict[str, Holding] = dataclasses.field(default_factory=dict)
    room: int = 0
    hashes: list[bytes] = dataclasses.field(default_factory=list)
    named: int = 0
    done: bool = False
    begins: bool = True
    guide: Any = None
    drafter: Any = None
    guessed: int = 0
    plain: bool = False

    def __post_init__(self) -> None:
        self.length = len(self.tokens)

    @property
    def unread(self) -> int:
        """Tokens drawn on the device that the host does not know yet."""
        return self.length - len(self.tokens)

    @property
    def wanted(self) -> int:
        """Tokens to compute before the next is drawn; 0 when the answer is as long as allowed, or
        while it is held up."""
        length = self.length
        if self.done or length >= self.limit or (length != len(self.tokens) and self.held_up):
            return 0
        return length - self.computed

    @property
    def held_up(self) -> bool:
        """Whether it needs a token of which the host does not know yet."""
        if self.unread == 0:
            return False
        drafts = self.drafter is not None and self.drafter.active(self.length)
        return drafts or self.guessed > 0 or self.guide is not None

    def drafts(self, most: int, rows: int) -> list[int]:
        """A guess of what comes after its tokens, that its grammar allows.

        Args:
          most: tokens of the guess.
          rows: sequences in the step.
        """
        most = min(most, self.limit - self.length - 1)
        if most < 1 or self.drafter is None or not self.drafter.active(self.length):
            return []
        found = self.drafter.propose(self.tokens, most, rows)
        return found if self.guide is None else found[: self.guide.kept(found)]

    def guesses(self, rows: int) -> int:
        """Tokens that a draft model should guess of it; none where a grammar would have to follow.

        Args:
          rows: sequences in the step.
        """
        length, drafter = self.length, self.drafter
        if self.guide is not None or drafter is None or not drafter.active(length):
            return 0
        return min(drafter.count(length, rows), self.limit - length - 1)

    @property
    def ready(self) -> bool:
        """Whether a waiting sequence can start."""
        held_back = self.after is not None and not (
            self.after.done or self.after.computed >= self.after.prompt_length
        )
        return self.unread == 0 and not held_back
