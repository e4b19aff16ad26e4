"""The writer: a thread that turns drawn tokens into text, away from the one that drives the device.

It is the one to find stop strings; it then tells the engine that the rest is not wanted.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

from jaxllm.core.logging import log
from jaxllm.serve.request import Logprob, Piece, Stream
from jaxllm.text.answer import Answer

__all__ = ["Draft", "News", "Writer"]


class Draft:
    """One answer on its way to its listener.

    Args:
      stream: where its pieces go.
      index: which of the request's answers.
      answer: its text.
      ends: tokens that end it.
    """

    def __init__(self, stream: Stream, index: int, answer: Answer, ends: frozenset[int]):
        self.stream, self.index, self.answer, self.ends = stream, index, answer, ends
        self.wants_logprobs = stream.request.logprobs is not None
        self.closed = False
        self.cached_tokens = 0


News = tuple[Draft, Sequence[int] | str, Sequence[Logprob] | bool, str | None]
"""(answer, new tokens, their log probabilities, why it finishes), or (answer, error, refused, None)
where there is an error."""


class Writer:
    """Texts of all answers, on a thread of its own.

    Args:
      stopped: called with the draft of an answer that a stop string ended.
    """

    def __init__(self, stopped: Callable[[Draft], None]):
        self._stopped = stopped
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="jaxllm-writer", daemon=True)
        self._thread.start()

    def write(self, news: Sequence[News]) -> None:
        """What a step brought: new tokens of answers, the last ones where there is a finish."""
        if news:
            self._queue.put(news)

    def fail(self, draft: Draft, error: str, *, refused: bool = False) -> None:
        """End an answer with an error, of the engine's or of the request's own."""
        self._queue.put([(draft, error, refused, None)])

    def close(self) -> None:
        """Write what is there and end."""
        self._queue.put(None)
        self._thread.join(timeout=10)

    def _run(self) -> None:
        while (news := self._queue.get()) is not None:
            for item in news:
                if not item[0].closed:
                    self._one(*item)

    def _one(self, draft: Draft, new: Any, more: Any, finish: str | None) -> None:
        try:
            if isinstance(new, str):
                draft.closed = True
                draft.stream.push(Piece(index=draft.index, error=new, refused=more))
            else:
                self._write(draft, tuple(new), tuple(more), finish)
        except Exception as error:  # one answer's trouble is not the others'
            log.exception("an answer cannot be written")
            draft.closed = True
            draft.stream.push(Piece(index=draft.index, error=f"internal error: {error}"))
            self._stopped(draft)

    def _write(
        self,
        draft: Draft,
        tokens: tuple[int, ...],
        logprobs: tuple[Logprob, ...],
        finish: str | None,
    ) -> None:
        text = draft.answer.push(tokens)
        stopped = draft.answer.finished
        if stopped and finish is None:
            self._stopped(draft)
        finish = "stop" if stopped else finish
        if finish is not None:
            text += draft.answer.flush()
            draft.closed = True
        draft.stream.push(
            Piece(
                index=draft.index,
                text=text,
                token_ids=tokens,
                logprobs=logprobs,
                finish_reason=finish,
                cached_tokens=draft.cached_tokens,
            )
        )
