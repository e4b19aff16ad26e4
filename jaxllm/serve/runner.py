"""The runner: holds the compiled programs and what is on the device, and feeds steps to it."""

from __future__ import annotations

import bisect
import concurrent.futures
import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxllm.aot.ahead import THREADS
from jaxllm.aot.program import Executable
from jaxllm.aot.store import Store
from jaxllm.errors import CapacityError
from jaxllm.infer.programs import Setup
from jaxllm.infer.sampling import Sampling
from jaxllm.serve import programs
from jaxllm.serve.grammar import fill, words
from jaxllm.serve.programs import BIASES, Drawn, Memory, Shape
from jaxllm.serve.scheduler import Turn
from jaxllm.serve.spill import HostPages
from jaxllm.serve.transfer import Transfer

__all__ = ["Runner", "places_of"]


class Runner:
    """One model on one device or a mesh, and every program that can be asked of it.

    Args:
      setup: what the programs share.
      params: parameters in the run's layout.
      memory: pages and slots.
      shapes: the table.
      store: where programs are kept, or None.
      draft: a draft model's (setup, params), or None.
      spills: whether pages go to the host and come back.
    """

    def __init__(
        self,
        setup: Setup,
        params: Any,
        memory: Memory,
        shapes: Sequence[Shape],
        *,
        store: Store | None,
        draft: tuple[Setup, Any] | None = None,
        spills: bool = False,
    ):
        self._place = None
        if setup.mesh is not None:
            self._place = jax.sharding.NamedSharding(setup.mesh, jax.sharding.PartitionSpec())
        self.setup, self.memory = setup, memory
        self._draft, others = draft or (None, None)
        self.params = (params, others)
        # Greedy ones first: the first that serves is taken.
        order = lambda s: (s.context, s.tokens, s.rows, not s.greedy)  # noqa: E731
        self._shapes = tuple(sorted(shapes, key=order))
        self._programs, self._empty = self._load(store)
        self.state, self.carry = self._empty()  # when nothing compiles: that needs memory too
        self.transfer = Transfer(setup, memory, self._draft, store) if spills else None
        self._options = programs.empty_options(memory.slots, setup.spec.vocab)
        self._on_device = self._put(_copy(self._options))
        self._stale = False
        self._words = words(setup.spec.vocab)
        self._contexts = sorted({shape.context for shape in self._shapes})
        self._found: dict[Any, Shape] = {}
        self._parts = {shape: shape.parts(memory) for shape in self._shapes}
        self._sizes = {
            shape: sum(math.prod(part) for part in parts.values())
            for shape, parts in self._parts.items()
        }
        self._no_masks = {
            places: self._put(np.zeros((places, self._words), np.int32))
            for places in {shape.places for shape in self._shapes}
        }
        self._greedy = np.ones((memory.slots,), np.bool_)  # slots whose options ask for nothing
        # What each slot's sequence holds; columns past its end are left over and never looked at.
        widths: dict[str, int] = {}
        for shape in self._shapes:
            for group, width in shape.widths(memory).items():
                widths[group] = max(width, widths.get(group, 0))
        self._tables = {
            group: (
                np.zeros((memory.slots, width), np.int32),
                np.zeros((memory.slots,), np.int32),
            )
            for group, width in widths.items()
        }

    def _load(self, store: Store | None) -> tuple[dict[Shape, Executable], Executable]:
        """Every program and that of an empty state, from the store or compiled.

        Several at once, as XLA works outside of Python; the largest first, so that none is left
        for the end.
        """
        of = self.setup, self.memory
        held = programs.abstract_state(*of, self._draft)
        largest = sorted(self._shapes, key=lambda s: (-s.tokens * s.steps, s.greedy))
        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            empty = pool.submit(programs.zeros(*of, self._draft).load, store)
            made = {
                shape: pool.submit(programs.step(*of, shape, self._draft, held=held).load, store)
                for shape in largest
            }
            return {shape: made[shape].result() for shape in self._shapes}, empty.result()

    @property
    def executables(self) -> Mapping[Shape, Executable]:
        """The table with what was compiled for it."""
        return self._programs

    @property
    def loaded(self) -> list[Executable]:
        """Every program of a start."""
        return [self._empty, *self._programs.values()]

    def set_options(
        self, slot: int, sampling: Sampling, *, bias: Mapping[int, float], logprobs: bool
    ) -> None:
        """Sampling options of the sequence that gets a slot, from the next step on."""
        held = self._options
        one = sampling.rows(1)
        for field in dataclasses.fields(one):
            getattr(held.rows, field.name)[slot] = getattr(one, field.name)[0]
        held.penalized[slot] = sampling.mode == "penalize"
        held.logprobs[slot] = logprobs
        self._greedy[slot] = sampling.mode == "greedy" and not bias and not logprobs
        held.bias_ids[slot], held.bias[slot] = self.setup.spec.vocab, 0.0
        if len(bias) > BIASES:
            raise CapacityError(f"{len(bias)} tokens are biased; at most {BIASES} can be")
        held.bias_ids[slot, : len(bias)] = list(bias)
        held.bias[slot, : len(bias)] = list(bias.values())
        self._stale = True

    def shape_of(self, turns: Sequence[Turn]) -> Shape:
        """The smallest program that holds the turns.

        Raises:
          CapacityError: there is none: the scheduler's limits are not those of the table.
        """
        steps, guesses = turns[0].steps, turns[0].guesses
        tokens = sum(turn.count for turn in turns) if steps == 1 else len(turns)
        longest = max(turn.count for turn in turns) if steps == 1 else 1
        context = max(turn.start + turn.count for turn in turns)
        every = guesses > 0 or any(turn.drafts for turn in turns)
        greedy = all(self._greedy[t.sequence.slot] and t.sequence.guide is None for t in turns)
        reach = bisect.bisect_left(self._contexts, context)
        key = (tokens, len(turns), longest, reach, every, greedy, steps, guesses)
        if (known := self._found.get(key)) is not None:
            return known
        fits = (
            shape
            for shape in self._shapes
            if shape.every == every
            and (shape.steps, shape.drafts) == (steps, guesses)
            and shape.tokens >= tokens
            and shape.rows >= len(turns)
            and shape.longest >= longest
            and shape.context >= context
            and (greedy or not shape.greedy)
        )
        found = next(fits, None)
        if found is None:
            raise CapacityError(
                f"no program holds {tokens} tokens of {len(turns)} sequences, {longest} of one, "
                f"up to {context}"
            )
        self._found[key] = found
        return found

    def dispatch(self, turns: Sequence[Turn]) -> Drawn:
        """Start a step; what it draws are device arrays that need not be there yet."""
        shape = self.shape_of(turns)
        if self._stale:
            self._on_device = self._put(_copy(self._options))
            self._stale = False
        packed = self._put(self._pack(turns, shape))
        run = self._programs[shape]
        self.state, self.carry, drawn = run(
            self.params, self.state, self.carry, self._on_device, packed, self._masks(turns, shape)
        )
        return drawn

    def move(self, host: HostPages) -> None:
        """Copy pages to the host and back, as planned for the step that is dispatched next."""
        if self.transfer is not None:
            leaving, coming = host.moves()
            self.state = self.transfer.run(self.state, leaving, coming)

    def _put(self, tree: Any) -> Any:
        """Host arrays on every device."""
        return jax.device_put(tree, self._place)

    def _masks(self, turns: Sequence[Turn], shape: Shape) -> jax.Array:
        """Bits of the tokens that each place may draw; what lies on the device if all may be."""
        guides = [(t.sequence.guide, place, t.drafts) for t, place in guided(turns)]
        if not guides:
            return self._no_masks[shape.places]
        masks = np.zeros((shape.places, self._words), np.int32)
        fill(masks, guides)
        return self._put(masks)

    def _pack(self, turns: Sequence[Turn], shape: Shape) -> np.ndarray:
        """The step's integers."""
        packed = np.zeros((self._sizes[shape],), np.int32)
        views = programs.unpack(packed, self._parts[shape])
        used = len(turns)
        sequences = [turn.sequence for turn in turns]
        views["slots"][used:] = self.memory.slots
        views["counts"][:used] = [turn.count for turn in turns]
        views["starts"][:used] = [turn.start for turn in turns]
        views["slots"][:used] = [s.slot for s in sequences]
        views["prompts"][:used] = [s.prompt_length for s in sequences]
        views["unread"][:used] = [turn.unread for turn in turns]
        views["begins"][:used] = [turn.begins for turn in turns]
        for turn, place in guided(turns):
            views["masked"][place : place + 1 + len(turn.drafts)] = 1
        if shape.longest == 1 or shape.drafts:
            known = [i for i, turn in enumerate(turns) if not turn.unread]
            views["ids"][known] = [turns[i].sequence.tokens[turns[i].start] for i in known]
        else:
            _chunks(turns, views["ids"])
        rows = views["slots"][:used]
        for group, (pages, firsts) in self._tables.items():
            for sequence in sequences:
                holding = sequence.holdings[group]
                if holding.changed:
                    pages[sequence.slot, : len(holding.pages)] = holding.pages
                    firsts[sequence.slot] = holding.first
                    holding.changed = False
            views[f"firsts:{group}"][:used] = firsts[rows]
            width = views[f"pages:{group}"].shape[1]
            views[f"pages:{group}"][:used] = pages[rows, :width]
        return packed


def guided(turns: Sequence[Turn]) -> list[tuple[Turn, int]]:
    """Turns whose tokens a grammar limits, and where in what a step draws each begins."""
    if all(turn.sequence.guide is None for turn in turns):
        return []
    return [(t, place) for t, place in zip(turns, places_of(turns), strict=True) if t.masked]


def places_of(turns: Sequence[Turn]) -> list[int]:
    """Where in what a step draws each turn's tokens begin."""
    if all(not turn.drafts and not turn.guesses for turn in turns):
        steps = turns[0].steps if turns else 1
        return list(range(0, steps * len(turns), steps))
    return list(itertools.accumulate((turn.count for turn in turns[:-1]), initial=0))


def _chunks(turns: Sequence[Turn], ids: np.ndarray) -> None:
    """Token ids of chunks, one after another."""
    at = 0
    for turn in turns:
        if not turn.unread:
            ids[at : at + turn.count] = turn.fed
        at += turn.count


def _copy(tree: Any) -> Any:
    """Arrays that nobody writes to: a CPU device may use them where they lie."""
    return jax.tree.map(np.copy, tree)
