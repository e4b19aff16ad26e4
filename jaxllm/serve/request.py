"""What is asked of the engine and what comes back."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import queue
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

from jaxllm.core.config import require
from jaxllm.errors import CapacityError, ShapeError, UnsupportedError
from jaxllm.infer.sampling import Sampling
from jaxllm.serve.grammar import Grammar
from jaxllm.serve.programs import BIASES, TOP

__all__ = [
    "Busy",
    "Choice",
    "Gone",
    "Logprob",
    "Piece",
    "Request",
    "Stream",
    "check_prompt",
    "check_room",
]


class Busy(CapacityError):
    """The queue is full: try later."""


class Gone(CapacityError):
    """The engine died or shuts down: ask another."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt and how to answer it.

    Attributes:
      prompt_ids: token ids, at least one.
      max_tokens: of each answer.
      sampling: options; answer i draws with seed + i.
      n: answers; they share the prompt's pages.
      stop: strings that end an answer and are not part of it.
      stop_ids: tokens that end an answer, beside the model's own.
      ignore_eos: whether the model's own end tokens end nothing.
      logit_bias: added to the logits of tokens.
      logprobs: alternatives of each token to give log probabilities of; None for no logprobs.
      grammar: that the answer must keep.
      priority: smaller is sooner.
      tenant: who asks; tenants take turns and do not share a prefix cache.
    """

    prompt_ids: tuple[int, ...]
    max_tokens: int = 256
    sampling: Sampling = Sampling()
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    logprobs: int | None = None
    grammar: Grammar | None = None
    priority: int = 0
    tenant: str = ""

    def __post_init__(self) -> None:
        require(bool(self.prompt_ids), "the prompt is empty; give at least one token")
        require(self.max_tokens >= 1, f"max_tokens is at least 1, found {self.max_tokens}")
        require(1 <= self.n <= 128, f"n is in 1..128, found {self.n}")
        require(len(self.stop) <= 16, f"at most 16 stop strings, found {len(self.stop)}")
        require(all(self.stop), "a stop string is empty")
        require(
            len(self.logit_bias) <= BIASES,
            f"logit_bias holds at most {BIASES} tokens, found {len(self.logit_bias)}",
        )
        fine = all(math.isfinite(x) and abs(x) <= 100 for x in self.logit_bias.values())
        require(fine, "values of logit_bias are in [-100, 100]")
        wanted = self.logprobs
        require(wanted is None or 0 <= wanted <= TOP, f"logprobs is in 0..{TOP}, found {wanted}")

    @property
    def plain(self) -> bool:
        """Whether the most likely tokens are wanted and nothing else."""
        asks = self.logit_bias or self.logprobs is not None or self.grammar is not None
        return self.sampling.mode == "greedy" and not asks


def check_prompt(request: Request, vocab: int, context: int) -> None:
    """Refuse what a model cannot be given.

    Raises:
      ShapeError: token ids outside of the vocabulary; CapacityError: a prompt that leaves no room.
    """
    prompt = request.prompt_ids
    for name, ids in (("token ids", prompt), ("logit_bias", tuple(request.logit_bias))):
        if ids and not 0 <= min(ids) <= max(ids) < vocab:
            raise ShapeError(f"{name} are in 0..{vocab - 1}, found {min(ids)}..{max(ids)}")
    if len(prompt) >= context:
        raise CapacityError(
            f"the prompt has {len(prompt)} tokens; the context of {context} tokens must hold "
            "the prompt and at least one more"
        )


def check_room(waiting: list[int], tokens: int, most: int, most_tokens: int) -> None:
    """Refuse a request that would wait behind too many.

    Args:
      waiting: tokens of each prompt that waits.
      tokens: of the prompts that come.
      most: prompts that may wait.
      most_tokens: that they may have, unless nothing waits.

    Raises:
      Busy: the queue is full.
    """
    queued = sum(waiting)
    if len(waiting) >= most or (waiting and queued + tokens > most_tokens):
        raise Busy(f"the queue is full ({len(waiting)} sequences, {queued} tokens wait); try later")


@dataclasses.dataclass(frozen=True)
class Logprob:
    """Log probability of a token by the model's own distribution, and of the most likely ones."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(kw_only=True, slots=True)
class Piece:
    """Something new of one answer.

    Attributes:
      index: which of the n answers.
      text: that is certain by now.
      token_ids: new tokens.
      logprobs: one for each of them, if asked for.
      finish_reason: `stop`, `length` or `abort` in the last piece of an answer.
      error: why the engine gave up, in a last piece.
      refused: whether it is the request that cannot be served.
      cached_tokens: of the prompt, that came from the prefix cache.
    """

    index: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[Logprob, ...] = ()
    finish_reason: str | None = None
    error: str | None = None
    refused: bool = False
    cached_tokens: int = 0


@dataclasses.dataclass(kw_only=True)
class Choice:
    """One whole answer."""

    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[Logprob] = dataclasses.field(default_factory=list)
    finish_reason: str = ""
    cached_tokens: int = 0


class Stream:
    """The pieces of a request, to be iterated over once: by `for`, or by `async for`.

    Args:
      request: what was asked.
      cancel: tells the engine that nobody listens any more.
      loop: the event loop of whoever iterates by `async for`.
    """

    def __init__(
        self,
        request: Request,
        cancel: Callable[[Stream], None],
        loop: asyncio.AbstractEventLoop | None = None,
    ):
        self.request = request
        self._cancel, self._loop = cancel, loop
        self._queue: Any = queue.SimpleQueue() if loop is None else asyncio.Queue()
        self._left = request.n
        self.finished = False

    def push(self, piece: Piece) -> None:
        """Hand a piece over; from any thread."""
        if self._loop is None:
            self._queue.put(piece)
            return
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, piece)
        except RuntimeError:  # the loop is closed: nobody listens
            self.cancel()

    def cancel(self) -> None:
        """Give up what is not finished; its pages are free at once."""
        if not self.finished:
            self.finished = True
            self._cancel(self)

    def _take(self, piece: Piece) -> Piece:
        if piece.error is not None:
            self.finished = True
            raise UnsupportedError(piece.error) if piece.refused else Gone(piece.error)
        self._left -= piece.finish_reason is not None
        self.finished = self._left == 0
        return piece

    def __iter__(self) -> Iterator[Piece]:
        """Pieces as they come.

        Raises:
          Gone: the engine died or was shut down; UnsupportedError: the request's grammar became
            too much work.
        """
        while not self.finished:
            yield self._take(self._queue.get())

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """As `__iter__`, on the event loop."""
        while not self.finished:
            yield self._take(await self._queue.get())

    def result(self) -> list[Choice]:
        """Wait for all answers."""
        choices = [Choice() for _ in range(self.request.n)]
        for piece in self:
            add(choices, piece)
        return choices

    async def gather(self) -> list[Choice]:
        """Wait for all answers on the event loop."""
        choices = [Choice() for _ in range(self.request.n)]
        async for piece in self:
            add(choices, piece)
        return choices


def add(choices: list[Choice], piece: Piece) -> None:
    """Put a piece at the end of its answer."""
    choice = choices[piece.index]
    choice.text += piece.text
    choice.token_ids += piece.token_ids
    choice.logprobs += piece.logprobs
    choice.finish_reason = piece.finish_reason or choice.finish_reason
    choice.cached_tokens = max(choice.cached_tokens, piece.cached_tokens)
