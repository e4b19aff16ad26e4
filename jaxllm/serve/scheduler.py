"""The scheduler: one rule for prefill, chunks of prefill and decode.

Every sequence has a count of tokens and a count of those computed, and each step lets it chase the
first: by one token when it decodes, by a chunk when its prompt is not all in. Sequences that decode
come first, so that a long prompt never starves them; what is left of the step's tokens goes to
prompts on their way, then to those that wait, by priority and then in turn between tenants. When
pages run out, the least urgent sequence gives up its own and computes them again later.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping
from collections.abc import Sequence as Sequence_

from jaxllm.errors import CapacityError
from jaxllm.serve.ngram import agreed
from jaxllm.serve.pace import Cadence
from jaxllm.serve.pages import Pages
from jaxllm.serve.prefixes import Prefixes
from jaxllm.serve.sequence import Sequence
from jaxllm.serve.spill import HostPages
from jaxllm.serve.turn import Limits, Turn

__all__ = ["Limits", "Scheduler", "Turn"]


class Scheduler:
    """Sequences that wait and run, and the pages they hold.

    Args:
      limits: of a step.
      pages: of every group of layers.
      windows: how many tokens before a query each group sees, None for all.
      host: pages that were given up on the device, or None.
      cadence: bounds steps that compute prompts while others decode, or None.
    """

    def __init__(
        self,
        limits: Limits,
        pages: Mapping[str, Pages],
        windows: Mapping[str, int | None],
        host: HostPages | None = None,
        cadence: Cadence | None = None,
    ):
        self.limits, self.pages, self.windows = limits, dict(pages), dict(windows)
        self.cadence = cadence
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.hit_tokens = 0
        self.prompt_tokens = 0
        self.drafted_tokens = 0
        self.accepted_tokens = 0
        self.prefixes = Prefixes(
            pages, windows, size=limits.page_size, on=limits.prefix_cache, host=host
        )
        self._slots = list(range(limits.sequences - 1, -1, -1))
        self._served: dict[str, int] = {}
        self._arrivals = itertools.count()
        self._stuck = False  # whether the next that waits had no room, and nothing changed since

    def check_fits(self, tokens: int) -> None:
        """Refuse a sequence that could not run even alone.

        Raises:
          CapacityError: the pages do not hold so many tokens.
        """
        for group, pages in self.pages.items():
            left, longest = self.windows[group], self.limits.longest
            seen = tokens if left is None else min(tokens, left + longest + self.limits.page_size)
            count = pages.count - self.prefixes.pinned_pages[group]
            if -(-seen // self.limits.page_size) > count:
                raise CapacityError(
                    f"{tokens} tokens of prompt and answer exceed the {count} pages of "
                    f"{self.limits.page_size}; ask for fewer, or serve with more cache_tokens"
                )

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait for its turn.

        Raises:
          CapacityError: see `check_fits`.
        """
        self.check_fits(sequence.limit)
        sequence.arrival = next(self._arrivals)
        others = {s.tenant for s in (*self.waiting, *self.running)}
        if sequence.tenant not in others:  # whoever was away has no claim on the past
            least = min((self._served.get(t, 0) for t in others), default=0)
            self._served = {t: self._served.get(t, 0) for t in others}
            self._served[sequence.tenant] = least
        self.waiting.append(sequence)
        self._stuck = False

    def finish(self, sequence: Sequence) -> None:
        """Give back all that a sequence holds; nothing more is done for it."""
        if sequence.done:
            return
        sequence.done = True
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        if sequence in self.running:
            self.running.remove(sequence)
            self._give_back(sequence)

    @property
    def held_up(self) -> bool:
        """Whether a sequence cannot go on before what was drawn is read."""
        return any(sequence.held_up for sequence in self.running)

    def plan(self) -> list[Turn]:
        """The turns of the next step; empty when there is nothing to do."""
        turns: list[Turn] = []
        left = self.limits.tokens
        running = [(s, s.wanted) for s in self.running]  # sorted by urgency
        order = [x for x in running if x[1] == 1]
        order += [x for x in running if x[1] > 1]
        longest = self.limits.longest
        if self.limits.steps > 1 and order and self._alone(order):
            return self._several(order)
        if self.limits.guesses and order and (turns := self._guessed(order)):
            return turns
        spare, room = self._spare(order), self._prompt_room(order)
        for sequence, wanted in order:
            if wanted > 1:
                wanted = min(wanted, longest, left, room)
                room -= wanted
            if min(left, wanted) < 1 or sequence.slot is None:
                continue
            drafts = self._drafts(sequence, spare, len(order)) if spare > 0 else []
            count = wanted + len(drafts)
            if sequence.computed + count <= sequence.room or self._hold(sequence, count, turns):
                turns.append(self._turn(sequence, count, drafts))
                left, spare = left - count, spare - len(drafts)
        # A step that verifies drafts has no room for a prompt; preemption may have freed a slot.
        left = min(left, room)
        while left > 0 and self._slots and not any(turn.drafts for turn in turns):
            sequence = self._next_waiting()
            if sequence is None:
                break
            self._stuck = not self._admit(sequence, left)
            if self._stuck:
                break
            wanted = min(sequence.wanted, self.limits.longest, left)
            turns.append(self._turn(sequence, wanted))
            left -= wanted
        return turns

    def drawn(self, turn: Turn, tokens: Sequence_[int]) -> list[int]:
        """Take the tokens that a turn drew, as many as its places; those that are new and still
        wanted."""
        sequence = turn.sequence
        if not turn.draws or sequence.done:
            return []
        new = agreed(turn.drafts, tokens) if turn.drafts else [t for t in tokens if t >= 0]
        sequence.tokens += new
        guesses = len(turn.drafts) or (turn.count - 1 if turn.guesses else 0)
        if guesses:
            sequence.length, sequence.guessed = len(sequence.tokens), 0
            sequence.computed = turn.start + len(new)
            sequence.drafter.learn(guesses, len(new) - 1)
            self.drafted_tokens += guesses
            self.accepted_tokens += len(new) - 1
        if len(sequence.tokens) // self.limits.page_size > sequence.named:
            self.prefixes.name(sequence)
        return new

    def _alone(self, order: list[tuple[Sequence, int]]) -> bool:
        """Whether the device can take several steps."""
        plain = all(sequence.plain for sequence, _ in order)
        return plain and self._settled(order, self.limits.steps)

    def _settled(self, order: list[tuple[Sequence, int]], count: int) -> bool:
        """Whether all want one token, there are pages for `count` of each, and nobody who waits
        could start."""
        new = -(-count // self.limits.page_size)
        return (
            all(wanted == 1 for _, wanted in order)
            and all(pages.available >= new * len(order) for pages in self.pages.values())
            and (self._stuck or not self._slots or self._next_waiting() is None)
        )

    def _several(self, order: list[tuple[Sequence, int]]) -> list[Turn]:
        """Turns of several steps of decoding."""
        steps = self.limits.steps
        counts = [min(steps, sequence.limit - sequence.length) for sequence, _ in order]
        return self._together(order, counts, steps=steps)

    def _guessed(self, order: list[tuple[Sequence, int]]) -> list[Turn]:
        """Turns in which a draft model guesses; none where it should not, or cannot now."""
        rows, room = len(order), self.limits.verified
        fits = [n for n in self.limits.guesses if rows * (1 + n) <= room]
        if not fits or not self._settled(order, 1 + fits[-1]):
            return []
        wanted = [sequence.guesses(rows) for sequence, _ in order]
        most = next((n for n in fits if n >= max(wanted)), fits[-1])
        if not max(wanted):
            return []
        return self._together(order, [1 + min(n, most) for n in wanted], guesses=most)

    def _together(
        self,
        order: list[tuple[Sequence, int]],
        counts: list[int],
        *,
        steps: int = 1,
        guesses: int = 0,
    ) -> list[Turn]:
        """Turns of so many tokens, for which there are pages; the longest come first."""
        turns: list[Turn] = []
        for (sequence, _), count in zip(order, counts, strict=True):
            if sequence.computed + count > sequence.room:
                self._hold(sequence, count, turns)
            turns.append(self._turn(sequence, count, steps=steps, guesses=guesses))
        turns.sort(key=lambda turn: -turn.count)
        return turns

    def _spare(self, order: list[tuple[Sequence, int]]) -> int:
        """Tokens that the step has for drafts: none where a prompt is on its way or may start."""
        prompts = any(wanted > 1 for _, wanted in order)
        if not self.limits.drafts or prompts or (self._slots and self._next_waiting()):
            return 0
        return min(self.limits.verified, self.limits.tokens) - len(order)

    def _prompt_room(self, order: list[tuple[Sequence, int]]) -> int:
        """Tokens of prompts in the step: few while others decode, who wait for them."""
        decoding = sum(wanted == 1 for _, wanted in order)
        mixed = self.limits.mixed
        if decoding and self.cadence is not None:
            mixed = self.cadence.tokens(decoding)
        return max(1, mixed - decoding) if mixed and decoding else self.limits.tokens

    def _drafts(self, sequence: Sequence, most: int, rows: int) -> list[int]:
        """A sequence's drafts; nobody is preempted for them."""
        drafts = sequence.drafts(min(most, self.limits.drafts), rows)
        end = -(-(sequence.computed + 1 + len(drafts)) // self.limits.page_size)
        fits = all(
            self.pages[group].available >= end - holding.end
            for group, holding in sequence.holdings.items()
        )
        return drafts if fits else []

    def _turn(
        self,
        sequence: Sequence,
        count: int,
        drafts: Sequence_[int] = (),
        *,
        steps: int = 1,
        guesses: int = 0,
    ) -> Turn:
        start, begins = sequence.computed, sequence.begins
        end = sequence.computed = start + count
        known = start + 1 if steps > 1 or guesses else end - len(drafts)
        draws, unread = known == sequence.length, known > len(sequence.tokens)
        turn = Turn(sequence, start, count, draws, begins, unread, drafts, steps, guesses)
        sequence.begins = False
        if draws:
            sequence.length += turn.places
            sequence.guessed = count - 1 if guesses else len(drafts)
        self._served[sequence.tenant] += count
        if end // self.limits.page_size > sequence.named:
            self.prefixes.name(sequence)
        return turn

    def _next_waiting(self) -> Sequence | None:
        ready = [s for s in self.waiting if s.ready]
        return min(
            ready,
            key=lambda s: (s.priority, self._served.get(s.tenant, 0), s.arrival),
            default=None,
        )

    def _admit(self, sequence: Sequence, left: int) -> bool:
        """Give a waiting sequence a slot, what the cache has of it, and pages for its first chunk.

        Nobody is preempted for it, and each running sequence keeps a page to grow into.
        """
        found = self.prefixes.cached(sequence)
        begun = found * self.limits.page_size
        wanted = min(sequence.length - begun, self.limits.longest, left)
        end = -(-(begun + wanted) // self.limits.page_size)
        for group, pages in self.pages.items():
            taken = self.prefixes.costs(sequence, group, found)
            if pages.available - taken < end - found + len(self.running):
                return False
        sequence.holdings = self.prefixes.hold(sequence, found)
        for group, holding in sequence.holdings.items():
            holding.pages += [self.pages[group].take() for _ in range(end - found)]
        sequence.slot, sequence.begins = self._slots.pop(), True
        sequence.computed = sequence.cached = begun
        sequence.named = found
        self.hit_tokens += begun
        self.prompt_tokens += sequence.length
        sequence.room = self._room(end, wanted)
        self.waiting.remove(sequence)
        bisect.insort(self.running, sequence, key=lambda s: (s.priority, s.arrival))
        return True

    def _hold(self, sequence: Sequence, count: int, turns: list[Turn]) -> bool:
        """Pages for `count` more tokens, others preempted if need be; False if it was itself."""
        end = -(-(sequence.computed + count) // self.limits.page_size)
        for group, pages in self.pages.items():
            holding = sequence.holdings[group]
            first = min(self.prefixes.first_page(group, sequence.computed), holding.end)
            for page in holding.pages[: first - holding.first]:
                pages.release(page)
            holding.pages, holding.first = holding.pages[first - holding.first :], first
            while holding.end < end:
                while not pages.available:
                    victim = self._victim(turns)
                    self._preempt(victim)
                    if victim is sequence:
                        return False
                holding.pages.append(pages.take())
            holding.changed = True
        sequence.room = self._room(end, count)
        return True

    def _room(self, end: int, count: int) -> int:
        """Tokens that pages before `end` reach up to.

        After a chunk 0 where there are windows, which are wider for it: the next step trims them,
        as its table has no more columns than it needs.
        """
        windowed = any(left is not None for left in self.windows.values())
        return 0 if windowed and count > 1 else end * self.limits.page_size

    def _victim(self, turns: list[Turn]) -> Sequence:
        """The least urgent running sequence that has no turn yet; the one that asks has none."""
        taken = {id(turn.sequence) for turn in turns}
        free = [s for s in self.running if id(s) not in taken]
        return max(free, key=lambda s: (s.priority, s.arrival))

    def _preempt(self, sequence: Sequence) -> None:
        """Take away slot and pages; it waits with its place in line, to be computed again."""
        self.preemptions += 1
        self.running.remove(sequence)
        self._give_back(sequence)
        sequence.computed = sequence.named = 0
        self.waiting.append(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        for group, holding in sequence.holdings.items():
            for page in holding.pages:
                self.pages[group].release(page)
        sequence.holdings, sequence.room, self._stuck = {}, 0, False
        if sequence.slot is not None:
            self._slots.append(sequence.slot)
            sequence.slot = None
