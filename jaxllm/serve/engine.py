"""The engine: one thread that owns the model, and requests that come and go around it.

The thread plans a step, dispatches it, and only then reads what the step before drew: the device
never waits for the host. Text is made by the writer's thread. If the thread dies, every request
ends with an error, and so does every later one.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import dataclasses
import threading
import time
from collections.abc import Sequence as Sequence_
from typing import Any

import numpy as np

from jaxllm.aot import counter
from jaxllm.core.logging import log
from jaxllm.errors import CapacityError, UnsupportedError
from jaxllm.serve.config import EngineConfig
from jaxllm.serve.grammar import Grammars
from jaxllm.serve.parts import Served, make_parts
from jaxllm.serve.programs import Drawn, Shape
from jaxllm.serve.request import Choice, Gone, Request, Stream, check_prompt, check_room
from jaxllm.serve.results import hand_out
from jaxllm.serve.scheduler import Turn
from jaxllm.serve.sequence import Sequence
from jaxllm.serve.stats import Stats
from jaxllm.serve.writer import Draft, Writer
from jaxllm.text.answer import Answer

__all__ = ["Engine"]


class Engine:
    """A model that answers many requests at once.

    Args:
      model: a loaded model.
      config: bounds; what suits the device by default.
      draft: a smaller model of the same vocabulary that guesses tokens ahead, or the same in fewer
        bits; its keys and values lie in the same pages.

    Raises:
      UnsupportedError: an encoder, a mesh that does not divide the heads of keys, a mask that pages
        cannot serve, or a draft model that does not go with the model; CapacityError: there is no
        memory for the cache.
    """

    def __init__(
        self, model: Served, config: EngineConfig | None = None, *, draft: Served | None = None
    ):
        counter.start()
        self.model = model
        self._parts = parts = make_parts(model, config or EngineConfig(), draft)
        self.config, self.runner, self.host = parts.config, parts.runner, parts.host
        self.scheduler = parts.scheduler
        self._grammars = Grammars(model.tokenizer, model.spec.vocab, model.eos_ids)
        self.error: str | None = None
        self._stats = Stats(total_pages=sum(pages.count for pages in self.scheduler.pages.values()))
        self.host_times: collections.deque[float] = collections.deque(maxlen=4096)
        self._lock = threading.Condition()
        self._new: list[Sequence] = []
        self._dropped: list[Draft] = []
        self._live: dict[Draft, Sequence] = {}
        self._pins: list[tuple[list[int], concurrent.futures.Future[int]]] = []
        self._closing = False
        self._writer = Writer(self._drop)
        self._read_at = 0.0  # when the last step's tokens were there
        self._at_ready = counter.compilations()
        self._thread = threading.Thread(target=self._run, name="jaxllm-engine", daemon=True)
        self._thread.start()

    # What other threads call.

    def submit(self, request: Request, *, loop: asyncio.AbstractEventLoop | None = None) -> Stream:
        """Ask for answers; they come through the stream.

        Args:
          request: what is asked.
          loop: the event loop of whoever listens by `async for`.

        Raises:
          CapacityError: the prompt does not fit; Busy: the queue is full; Gone: it is not alive.
          ShapeError: token ids outside of the vocabulary; ConfigError: a wrong grammar.
        """
        stream = Stream(request, self._cancel, loop)
        sequences = self._sequences(request, stream)
        with self._lock:
            self._check_open(len(sequences) * len(request.prompt_ids))
            self._new += sequences
            self._live |= {sequence.owner: sequence for sequence in sequences}
            self._lock.notify()
        return stream

    def generate(self, request: Request) -> list[Choice]:
        """Whole answers to one request; see `submit`."""
        return self.submit(request).result()

    def pin(self, ids: Sequence_[int]) -> int:
        """Compute a prefix that many prompts begin with, and keep its pages for ever.

        Unlike what else the prefix cache holds, all tenants find it.

        Args:
          ids: tokens of the prefix.

        Returns:
          How many of them are pinned: those of whole pages.

        Raises:
          UnsupportedError: the prefix cache is off, or the model has none; CapacityError: it does
            not fit, or takes over half of the pages; Gone: the engine died.
        """
        if not self.scheduler.limits.prefix_cache:
            raise UnsupportedError(
                "a prefix can be pinned only where the prefix cache is on, and models with state "
                "of other kinds than pages have none"
            )
        self.generate(Request(prompt_ids=tuple(ids), max_tokens=1, ignore_eos=True))
        asked: concurrent.futures.Future[int] = concurrent.futures.Future()
        with self._lock:
            self._check_open(0)
            self._pins.append((list(ids), asked))
            self._lock.notify()
        return asked.result(timeout=60)

    def stats(self) -> Stats:
        """How the engine is doing."""
        scheduler, host = self.scheduler, self.host
        return dataclasses.replace(
            self._stats,
            waiting=len(scheduler.waiting) + len(self._new),
            running=len(scheduler.running),
            held_pages=sum(pages.held for pages in scheduler.pages.values()),
            preemptions=scheduler.preemptions,
            hit_tokens=scheduler.hit_tokens,
            drafted_tokens=scheduler.drafted_tokens,
            accepted_tokens=scheduler.accepted_tokens,
            prompt_tokens=scheduler.prompt_tokens,
            spilled_pages=0 if host is None else host.spilled,
            restored_pages=0 if host is None else host.restored,
            host_page_bytes=0 if host is None else host.bytes,
            compilations=counter.compilations() - self._at_ready,
        )

    @property
    def alive(self) -> bool:
        """Whether requests are answered."""
        return self.error is None and self._thread.is_alive()

    def close(self, *, drain_s: float = 0.0) -> None:
        """Take no more requests, wait for those there are for a while, and end the rest."""
        with self._lock:
            self._closing = True
        until = time.monotonic() + drain_s
        while self._live and self.alive and time.monotonic() < until:
            time.sleep(0.01)
        with self._lock:
            self.error = self.error or "the server is shutting down"
            self._lock.notify()
        self._thread.join(timeout=60)
        self._writer.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _sequences(self, request: Request, stream: Stream) -> list[Sequence]:
        """A sequence for each answer, checked."""
        spec, prompt = self.model.spec, request.prompt_ids
        context = self.config.context or spec.context
        check_prompt(request, spec.vocab, context)
        limit = min(context, len(prompt) + request.max_tokens)
        self.scheduler.check_fits(limit)
        ends = frozenset(request.stop_ids) | frozenset(
            () if request.ignore_eos else self.model.eos_ids
        )
        guide = None if request.grammar is None else self._grammars.guide(request.grammar)
        out: list[Sequence] = []
        for index in range(request.n):
            answer = Answer(self.model.tokenizer, tuple(ends), list(request.stop))
            out.append(
                Sequence(
                    tokens=list(prompt),
                    prompt_length=len(prompt),
                    limit=limit,
                    priority=request.priority,
                    tenant=request.tenant,
                    cacheable=request.sampling.mode != "penalize",
                    after=out[0] if out else None,
                    owner=Draft(stream, index, answer, ends),
                    guide=guide.copy() if guide is not None else None,
                    drafter=self._parts.drafter(),
                    plain=request.plain and not self.config.draft_tokens,
                )
            )
        return out

    def _check_open(self, tokens: int) -> None:
        if self.error is not None or self._closing or not self._thread.is_alive():
            raise Gone(self.error or "the engine is shutting down; ask another")
        waiting = [s.prompt_length for s in (*self.scheduler.waiting, *self._new)]
        check_room(waiting, tokens, self.config.max_queue, self.config.max_queued_tokens)

    def _drop(self, draft: Draft) -> None:
        with self._lock:
            self._dropped.append(draft)
            self._lock.notify()

    def _cancel(self, stream: Stream) -> None:
        with self._lock:
            self._dropped += [draft for draft in self._live if draft.stream is stream]
            self._lock.notify()

    # What the engine's own thread does.

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException as error:
            log.exception("the engine died")
            self.error = f"the engine died: {type(error).__name__}: {error}"
        with self._lock:
            left, pins = list(self._live), self._pins
            self._live.clear()
            self._pins = []
        for _, asked in pins:
            asked.set_exception(Gone(self.error or "the engine stopped"))
        for draft in left:
            self._writer.fail(draft, self.error or "the engine stopped")

    def _loop(self) -> None:
        pending: collections.deque[tuple[list[Turn], Any, Any]] = collections.deque()
        while self._take_in(idle=not pending):
            while pending and self.scheduler.held_up:
                self._read(*pending.popleft())
            start, before = time.perf_counter(), self._stats.host_seconds
            turns = self.scheduler.plan()
            if self.host is not None:
                self.runner.move(self.host)
            if turns:
                self._set_options(turns)
                begun = self._begun(turns)
                pending.append((turns, self.runner.dispatch(turns), begun))
                self._stats.steps += turns[0].steps
                self._stats.fed_tokens += sum(turn.count for turn in turns)
            self._stats.host_seconds += time.perf_counter() - start
            if pending and (not turns or len(pending) > self.config.ahead):
                self._read(*pending.popleft())
            if turns:
                took = self._stats.host_seconds - before
                self.host_times.append(took / turns[0].steps)

    def _take_in(self, *, idle: bool) -> bool:
        """Requests and cancellations that came; waits for some when there is nothing to do."""
        with self._lock:
            while idle and self.error is None and not self._wanted():
                self._lock.wait()
            if self.error is not None:
                return False
            new, self._new = self._new, []
            dropped, self._dropped = self._dropped, []
            gone = [self._live.pop(draft) for draft in dropped if draft in self._live]
            pins, self._pins = self._pins, []
        for sequence in new:
            self.scheduler.add(sequence)
        for sequence in gone:
            self.scheduler.finish(sequence)
        for ids, asked in pins:
            try:
                asked.set_result(self.scheduler.prefixes.pin(ids))
            except CapacityError as error:
                asked.set_exception(error)
        return True

    def _wanted(self) -> bool:
        """Whether there is anything to do."""
        scheduler = self.scheduler
        return bool(
            self._new or self._dropped or self._pins or scheduler.waiting or scheduler.running
        )

    def _set_options(self, turns: list[Turn]) -> None:
        for turn in turns:
            sequence = turn.sequence
            if turn.begins and sequence.slot is not None:
                draft, request = sequence.owner, sequence.owner.stream.request
                sampling = request.sampling
                seed = (sampling.seed + draft.index) % 2**32
                draft.cached_tokens = max(
                    draft.cached_tokens, min(sequence.cached, sequence.prompt_length)
                )
                self.runner.set_options(
                    sequence.slot,
                    dataclasses.replace(sampling, seed=seed),
                    bias=request.logit_bias,
                    logprobs=request.logprobs is not None,
                )

    def _begun(self, turns: list[Turn]) -> tuple[Shape, float] | None:
        """The program of a step and when it was dispatched, where somebody learns from its time."""
        if self.scheduler.cadence is None:
            return None
        return self.runner.shape_of(turns), time.perf_counter()

    def _read(self, turns: list[Turn], drawn: Drawn, begun: tuple[Shape, float] | None) -> None:
        """Wait for a step's tokens and hand them out."""
        tokens = np.asarray(drawn.tokens).tolist()
        start = time.perf_counter()
        if begun is not None and self.scheduler.cadence is not None and not begun[0].every:
            shape, dispatched = begun
            took = (start - max(dispatched, self._read_at)) / shape.steps
            self.scheduler.cadence.learn(shape.tokens, took, decode=shape.longest == 1)
        self._read_at = start
        news, ended, count = hand_out(turns, drawn, tokens, self.scheduler)
        self._writer.write(news)
        self._stats.drawn_tokens += count
        if ended:
            with self._lock:
                for draft in ended:
                    self._live.pop(draft, None)
        self._stats.host_seconds += time.perf_counter() - start
