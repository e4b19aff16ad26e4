"""From the engine's pieces to the JSON of OpenAI's API, whole or as a stream of events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

from jaxllm.serve.http.asked import Asked
from jaxllm.serve.http.errors import body_of, status_of
from jaxllm.serve.request import Choice, Logprob, Piece, Stream
from jaxllm.text.tokenizer import Tokenizer
from jaxllm.text.tools import Delta, ToolParser

__all__ = ["Answers", "kept_alive"]


def _called(name: str, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def _chunk(delta: Delta) -> dict[str, Any]:
    """The delta of a chunk."""
    if delta.call is None:
        return {"content": delta.content}
    if delta.name is not None:
        return {"tool_calls": [{"index": delta.call, **_called(delta.name, delta.arguments)}]}
    return {"tool_calls": [{"index": delta.call, "function": {"arguments": delta.arguments}}]}


def gathered(deltas: Sequence[Delta]) -> tuple[str, list[dict[str, Any]]]:
    """(text, calls) of a whole answer."""
    calls: list[dict[str, Any]] = []
    for delta in deltas:
        if delta.name is not None:
            calls.append(_called(delta.name, delta.arguments))
        elif delta.call is not None:
            calls[delta.call]["function"]["arguments"] += delta.arguments
    return "".join(delta.content for delta in deltas), calls


def _finish(finish: str, parser: ToolParser) -> str:
    """Why an answer ended: an answer that calls and was not cut off ends for that."""
    return "tool_calls" if finish == "stop" and parser.calls else finish


async def kept_alive(events: AsyncIterator[str], silence_s: float) -> AsyncIterator[str]:
    """Events, with a comment whenever none came for so many seconds."""
    task: asyncio.Future[str] | None = None
    try:
        while True:
            task = task or asyncio.ensure_future(anext(events))
            await asyncio.wait({task}, timeout=silence_s)
            if not task.done():
                yield ": keep-alive\n\n"
                continue
            done, task = task, None
            try:
                event = done.result()
            except StopAsyncIteration:
                return
            yield event
    finally:
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration):
                await task
        if isinstance(events, AsyncGenerator):
            await events.aclose()


class Answers:
    """The answers to one request of /v1/chat/completions or /v1/completions.

    Args:
      asked: what was asked.
      streams: of the engine, one a prompt.
      model: the name that the client used.
      chat: whether it was a chat.
      tokenizer: for the texts of single tokens.
    """

    def __init__(
        self,
        asked: Asked,
        streams: Sequence[Stream],
        *,
        model: str,
        chat: bool,
        tokenizer: Tokenizer | None,
    ):
        self.asked, self.streams, self.chat, self.tokenizer = asked, streams, chat, tokenizer
        kind = "chat.completion" if chat else "text_completion"
        prefix = "chatcmpl" if chat else "cmpl"
        self._head = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }
        self._answered = 0
        self._cached = 0
        self._parsers: dict[int, ToolParser] = {}

    def cancel(self) -> None:
        """Nobody listens any more."""
        for stream in self.streams:
            stream.cancel()

    async def whole(self) -> dict[str, Any]:
        """The one JSON object of a request without a stream."""
        found = await asyncio.gather(*(stream.gather() for stream in self.streams))
        choices = []
        for choice in (choice for several in found for choice in several):
            self._answered += len(choice.token_ids)
            choices.append(self._choice(len(choices), choice))
        self._cached = sum(max(c.cached_tokens for c in several) for several in found)
        return {**self._head, "choices": choices, "usage": self._usage()}

    def events(self, keep_alive_s: float) -> AsyncIterator[str]:
        """Server-sent events; a comment when nothing came for a while."""
        return kept_alive(self._events(), keep_alive_s)

    async def _events(self) -> AsyncIterator[str]:
        if self.chat:
            for index in range(self.asked.requests[0].n):
                yield self._event([self._delta(index, {"role": "assistant", "content": ""}, None)])
        queue: asyncio.Queue[Any] = asyncio.Queue()
        tasks = [asyncio.create_task(self._follow(i, queue)) for i in range(len(self.streams))]
        try:
            left = len(tasks)
            while left:
                item = await queue.get()
                if item is None:
                    left -= 1
                elif isinstance(item, BaseException):
                    status, param, code = status_of(item)
                    error = body_of(str(item), status, param=param, code=code)
                    yield f"data: {json.dumps(error)}\n\n"
                    return
                else:
                    yield self._event([item])
            if self.asked.usage:
                yield self._event([], usage=self._usage())
            yield "data: [DONE]\n\n"
        finally:
            self.cancel()
            for task in tasks:
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _follow(self, prompt: int, queue: asyncio.Queue[Any]) -> None:
        """Pieces of one prompt's answers as choices."""
        stream = self.streams[prompt]
        base = sum(s.request.n for s in self.streams[:prompt])
        try:
            async for piece in stream:
                self._answered += len(piece.token_ids)
                if piece.finish_reason is not None and piece.index == 0:
                    self._cached += piece.cached_tokens
                if piece.text or piece.finish_reason is not None or piece.logprobs:
                    for part in self._parts(base + piece.index, piece):
                        queue.put_nowait(part)
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    def _event(self, choices: list[Any], **more: Any) -> str:
        head = dict(self._head)
        if self.chat:
            head["object"] = "chat.completion.chunk"
        if self.asked.usage:
            more = {"usage": None} | more
        return f"data: {json.dumps({**head, 'choices': choices, **more})}\n\n"

    def _parts(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """What a piece is as choices of chunks; one for each new thing in it."""
        finish = piece.finish_reason
        if not self.chat:
            scores = self._plain_logprobs(piece.logprobs)
            part = {"index": index, "text": piece.text, "finish_reason": finish, "logprobs": scores}
            return [part]
        deltas: list[dict[str, Any]] = [{"content": piece.text}] if piece.text else []
        if self.asked.tools is not None:
            parser = self._parsers.setdefault(index, self.asked.tools.parser())
            found = parser.push(piece.text)
            if finish is not None:
                found += parser.finish()
                finish = _finish(finish, parser)
            deltas = [_chunk(delta) for delta in found]
        if not deltas or finish is not None:
            deltas.append({})
        parts = [self._delta(index, delta, None) for delta in deltas]
        parts[0]["logprobs"] = self._chat_logprobs(piece.logprobs)
        parts[-1]["finish_reason"] = finish
        return parts

    def _delta(self, index: int, delta: Any, finish: str | None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "finish_reason": finish, "logprobs": None}

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        shared = {"index": index, "finish_reason": choice.finish_reason}
        if self.chat:
            message = {"role": "assistant", "content": choice.text, "refusal": None}
            if self.asked.tools is not None:
                parser = self.asked.tools.parser()
                text, calls = gathered([*parser.push(choice.text), *parser.finish()])
                shared["finish_reason"] = _finish(choice.finish_reason, parser)
                if calls:
                    message |= {"content": text or None, "tool_calls": calls}
            scores = self._chat_logprobs(choice.logprobs)
            return {**shared, "message": message, "logprobs": scores}
        return {**shared, "text": choice.text, "logprobs": self._plain_logprobs(choice.logprobs)}

    def _usage(self) -> dict[str, Any]:
        prompts = sum(len(request.prompt_ids) for request in self.asked.requests)
        return {
            "prompt_tokens": prompts,
            "completion_tokens": self._answered,
            "total_tokens": prompts + self._answered,
            "prompt_tokens_details": {"cached_tokens": self._cached},
        }

    def _text(self, token: int) -> str:
        return "" if self.tokenizer is None else self.tokenizer.decode([token], skip_special=False)

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._text(token)
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}

    def _chat_logprobs(self, logprobs: Sequence[Logprob]) -> dict[str, Any] | None:
        if not logprobs:
            return None
        content = [
            self._entry(entry.token, entry.logprob)
            | {"top_logprobs": [self._entry(*pair) for pair in entry.top]}
            for entry in logprobs
        ]
        return {"content": content, "refusal": None}

    def _plain_logprobs(self, logprobs: Sequence[Logprob]) -> dict[str, Any] | None:
        if not logprobs:
            return None
        texts = [self._text(entry.token) for entry in logprobs]
        offsets = [sum(map(len, texts[:i])) for i in range(len(texts))]
        top = [
            {self._text(token): max(logprob, -9999.0) for token, logprob in entry.top}
            for entry in logprobs
        ]
        return {
            "tokens": texts,
            "token_logprobs": [max(entry.logprob, -9999.0) for entry in logprobs],
            "top_logprobs": top,
            "text_offset": offsets,
        }
