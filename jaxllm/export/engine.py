"""A bundle that answers many clients: one answer at a time, the others wait in a bounded queue.

It has the face of `jaxllm.serve.engine.Engine`, so that the same server stands before it. Its
programs give tokens and nothing else: log probabilities, biases and grammars are refused.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import os
import threading
from collections.abc import Iterator
from typing import Any

from jaxllm.aot import counter
from jaxllm.core.logging import log
from jaxllm.errors import UnsupportedError
from jaxllm.export.model import BundleModel
from jaxllm.serve.config import EngineConfig
from jaxllm.serve.request import (
    Choice,
    Gone,
    Piece,
    Request,
    Stream,
    check_prompt,
    check_room,
)
from jaxllm.serve.stats import Stats
from jaxllm.text.answer import Answer

__all__ = ["BundleEngine"]


class BundleEngine:
    """A loaded bundle, all of its programs compiled, and a thread that runs them.

    Args:
      model: of `load_bundle`.
      config: bounds of the queue; the context is the bundle's.

    Raises:
      WeightsError: a program cannot be read here.
    """

    def __init__(self, model: BundleModel, config: EngineConfig | None = None):
        counter.start()
        manifest: Any = model.bundle.manifest
        self.model, self._vocab = model, int(manifest["vocab"])
        self._context, self._eos = int(manifest["context"]), tuple(manifest["eos_ids"])
        self.config = dataclasses.replace(config or EngineConfig(), context=self._context)
        self.error: str | None = None
        self._stats = Stats()
        self._lock = threading.Condition()
        self._waiting: list[Stream] = []
        self._running: Stream | None = None
        self._closing = False
        build_all(model)
        self._at_ready = counter.compilations()
        self._thread = threading.Thread(target=self._run, name="jaxllm-bundle", daemon=True)
        self._thread.start()

    def submit(self, request: Request, *, loop: asyncio.AbstractEventLoop | None = None) -> Stream:
        """Ask for answers; they come through the stream.

        Raises:
          UnsupportedError: for what a bundle has no program; CapacityError: the prompt does not
            fit; Busy: the queue is full; Gone: it is not alive; ShapeError: wrong token ids.
        """
        for name in ("logprobs", "logit_bias", "grammar"):
            if getattr(request, name) not in (None, {}):
                raise UnsupportedError(
                    f"{name}: a bundle's programs give tokens and nothing else; serve the model "
                    "itself for log probabilities, biases and structured output"
                )
        check_prompt(request, self._vocab, self._context)
        tokens = request.n * len(request.prompt_ids)
        stream = Stream(request, self._cancel, loop)
        with self._lock:
            if self._closing or not self.alive:
                raise Gone(self.error or "the engine is shutting down; ask another")
            waiting = [len(s.request.prompt_ids) for s in self._waiting for _ in range(s.request.n)]
            check_room(waiting, tokens, self.config.max_queue, self.config.max_queued_tokens)
            self._waiting.append(stream)
            self._lock.notify()
        return stream

    def generate(self, request: Request) -> list[Choice]:
        """Whole answers to one request; see `submit`."""
        return self.submit(request).result()

    def stats(self) -> Stats:
        """How the engine is doing; it has no pages."""
        return dataclasses.replace(
            self._stats,
            waiting=len(self._waiting),
            running=int(self._running is not None),
            compilations=counter.compilations() - self._at_ready,
        )

    @property
    def alive(self) -> bool:
        """Whether requests are answered."""
        return self.error is None and self._thread.is_alive()

    def close(self) -> None:
        """Take no more requests, and end those there are."""
        with self._lock:
            self._closing = True
            self.error = self.error or "the server is shutting down"
            self._lock.notify()
        self._thread.join(timeout=60)

    def __enter__(self) -> BundleEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _cancel(self, stream: Stream) -> None:
        with self._lock:
            if stream in self._waiting:
                self._waiting.remove(stream)

    def _run(self) -> None:
        try:
            while (stream := self._next()) is not None:
                for index in range(stream.request.n):
                    if self.error is None and not stream.finished:
                        self._answer(stream, index)
        except BaseException as error:
            log.exception("the engine died")
            self.error = f"the engine died: {type(error).__name__}: {error}"
        with self._lock:
            left = [*self._waiting, *([self._running] if self._running else [])]
            self._waiting, self._running = [], None
        for stream in left:
            stream.push(Piece(index=0, error=self.error or "the engine stopped"))

    def _next(self) -> Stream | None:
        """The most urgent request, the first of these; None when all is over."""
        with self._lock:
            if self.error is not None:
                return None  # what runs is not finished
            self._running = None
            while not self._waiting and self.error is None:
                self._lock.wait()
            if self.error is not None:
                return None
            self._running = min(self._waiting, key=lambda stream: stream.request.priority)
            self._waiting.remove(self._running)
            return self._running

    def _answer(self, stream: Stream, index: int) -> None:
        """One answer, chunk by chunk, as long as somebody listens."""
        request = stream.request
        ends = request.stop_ids + (() if request.ignore_eos else self._eos)
        answer = Answer(self.model.tokenizer, ends, list(request.stop))
        self._stats.prompt_tokens += len(request.prompt_ids)
        for chunk in self._chunks(request, index):
            if self.error is not None or stream.finished:
                return
            known = len(answer.token_ids)
            text = answer.push(chunk)
            new = tuple(answer.token_ids[known:])
            self._stats.steps += 1
            self._stats.drawn_tokens += len(new)
            if answer.finished:
                text += answer.flush()
            finish = "stop" if answer.finished else None
            stream.push(Piece(index=index, text=text, token_ids=new, finish_reason=finish))
            if answer.finished:
                return
        stream.push(Piece(index=index, text=answer.flush(), finish_reason="length"))

    def _chunks(self, request: Request, index: int) -> Iterator[list[int]]:
        sampling = request.sampling
        sampling = dataclasses.replace(sampling, seed=(sampling.seed + index) % 2**32)
        options = dataclasses.asdict(sampling)
        return self.model.bundle.stream(list(request.prompt_ids), request.max_tokens, **options)


def build_all(model: BundleModel) -> None:
    """Load or compile every program of a bundle's way, several at a time."""
    bundle = model.bundle
    programs: Any = bundle.way["programs"]
    with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 2)) as pool:
        built = pool.map(bundle.build, programs.values())
        bundle.ready.update(zip(programs, built, strict=True))
