"""One answer at a time with guesses ahead, in the caller's thread: `Model.generate(..., draft=…)`.

The engine's programs, scheduler and pages, so that what is verified and kept is the same.
"""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxllm.core.config import require
from jaxllm.errors import UnsupportedError
from jaxllm.infer.programs import bucket
from jaxllm.infer.sampling import Sampling
from jaxllm.infer.timings import Timings
from jaxllm.serve import sequence
from jaxllm.serve.config import EngineConfig
from jaxllm.serve.parts import Parts, Served, make_parts

__all__ = ["Drafting", "drafted", "drafting_of"]

Drafting = tuple[Served | None, int]
"""A draft model, or None for prompt lookup, and most tokens guessed in a step."""
CHUNK = 256
"""Tokens of a prompt that a step takes in: few programs to build for one answer."""
LEAST_CONTEXT = 1024
"""Tokens that pages are laid out for, so that short answers share the programs."""


def drafting_of(draft: Any) -> Drafting:
    """What `draft` asks for: tokens of prompt lookup, a model, or (model, tokens).

    Raises:
      ConfigError: it is something else, or not 1 to 31 tokens.
    """
    model, tokens = draft if isinstance(draft, tuple) and len(draft) == 2 else (draft, 3)
    if isinstance(draft, int):
        model, tokens = None, draft
    known = isinstance(model, Served) or isinstance(draft, int)
    require(
        known and isinstance(tokens, int) and not isinstance(tokens, bool),
        f"draft is a model, a number of tokens for prompt lookup, or (model, tokens), found "
        f"{type(draft).__name__}",
    )
    require(1 <= tokens <= 31, f"draft: 1 to 31 tokens are guessed in a step, found {tokens}")
    return (model if isinstance(model, Served) else None), tokens


def drafted(
    model: Served,
    drafting: Drafting,
    ids: Sequence[int],
    sampling: Sampling,
    max_tokens: int,
    timings: Timings,
) -> Iterator[list[int]]:
    """Yield lists of new tokens, those that `Generator.stream` would give; see there.

    What is built stays with the model's generator for the next answer.

    Args:
      model: that answers.
      drafting: what guesses.
      ids: of the prompt.
      sampling: options.
      max_tokens: at most this many new tokens.
      timings: filled in as it goes.

    Raises:
      UnsupportedError: the draft does not go with the model, or the model cannot take a guess back;
        CapacityError: there is no room for the prompt or for the pages.
    """
    generator, (draft, tokens) = model.generator, drafting
    generator.check([len(ids)], max_tokens)
    limit = min(len(ids) + max_tokens, model.spec.context)
    if draft is not None and draft.spec.context < limit:
        raise UnsupportedError(
            f"the draft model's context is {draft.spec.context} tokens, prompt and answer are up "
            f"to {limit}; lower max_tokens, or generate without draft"
        )
    kept = generator.kept.get("single")
    if not (isinstance(kept, Single) and kept.serves(draft, tokens, limit)):
        start = time.perf_counter()
        kept = None
        generator.kept.pop("single", None)  # its pages make room for the others
        kept = generator.kept["single"] = Single(model, draft, tokens, limit)
        timings.build_ms += 1e3 * (time.perf_counter() - start)
    return _stream(kept, ids, sampling, limit, timings)


class Single:
    """What answers one request at a time.

    Args:
      model: that answers.
      draft: that guesses, or None for prompt lookup.
      tokens: most that are guessed in a step.
      limit: tokens of prompt and answer that are asked for at least.
    """

    def __init__(self, model: Served, draft: Served | None, tokens: int, limit: int):
        self.model, self.draft, self.tokens = model, draft, tokens
        longest = [one.spec.context for one in (model, draft) if one is not None]
        self.context = min(*longest, bucket(limit, LEAST_CONTEXT))
        self.lock = threading.Lock()
        self.parts = self._parts()

    def _parts(self) -> Parts:
        config = EngineConfig(
            max_sequences=1,
            context=self.context,
            cache_tokens=self.context,
            prefix_cache=False,
            decode_steps=1,
            max_batch_tokens=CHUNK,
            draft_tokens=self.tokens,
        )
        return make_parts(self.model, config, self.draft)

    def serves(self, draft: Served | None, tokens: int, limit: int) -> bool:
        """Whether it is what is asked for."""
        return self.draft is draft and self.tokens == tokens and self.context >= limit

    def again(self) -> Single:
        """Another one beside it, by the same programs."""
        return Single(self.model, self.draft, self.tokens, self.context)


def _stream(
    single: Single, ids: Sequence[int], sampling: Sampling, limit: int, timings: Timings
) -> Iterator[list[int]]:
    """Plan, dispatch and read until there are enough tokens, or nobody wants more."""
    start = time.perf_counter()
    if not single.lock.acquire(blocking=False):  # an answer of it is still on its way
        single = single.again()
        single.lock.acquire()
    parts = single.parts
    one = sequence.Sequence(
        tokens=list(ids),
        prompt_length=len(ids),
        limit=limit,
        cacheable=False,
        drafter=parts.drafter(),
    )
    scheduler = parts.scheduler
    before = scheduler.drafted_tokens, scheduler.accepted_tokens
    timings.prompt_tokens += len(ids)
    try:
        begun = 0.0
        for new in _steps(parts, one, sampling):
            if not begun:
                begun = time.perf_counter()
                timings.time_to_first_token_ms = 1e3 * (begun - start) + timings.build_ms
                timings.decoded_tokens -= 1
            timings.decoded_tokens += len(new)
            timings.decode_ms = 1e3 * (time.perf_counter() - begun)
            timings.drafted_tokens = scheduler.drafted_tokens - before[0]
            timings.accepted_tokens = scheduler.accepted_tokens - before[1]
            yield new
    finally:
        scheduler.finish(one)
        single.lock.release()


def _steps(parts: Parts, one: sequence.Sequence, sampling: Sampling) -> Iterator[list[int]]:
    """The new tokens of each step that draws any."""
    scheduler, runner = parts.scheduler, parts.runner
    pending: collections.deque[Any] = collections.deque()
    scheduler.add(one)
    while len(one.tokens) < one.limit:
        turns = [] if scheduler.held_up else scheduler.plan()
        for turn in turns:
            if turn.begins:
                assert one.slot is not None
                runner.set_options(one.slot, sampling, bias={}, logprobs=False)
            pending.append((turn, runner.dispatch(turns)))
        if not turns or len(pending) > parts.config.ahead:
            turn, drawn = pending.popleft()
            new = scheduler.drawn(turn, np.asarray(drawn.tokens)[: turn.places].tolist())
            if new:
                yield new
