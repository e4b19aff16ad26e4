"""/v1/responses: what it asks, and its answer as items, whole or as a stream of events."""

from __future__ import annotations

import dataclasses
import json
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from jaxllm.serve.grammar import Grammar
from jaxllm.serve.http import asked, schemas
from jaxllm.serve.http.answering import Worded
from jaxllm.serve.http.answers import kept_alive
from jaxllm.serve.http.config import ServerConfig
from jaxllm.serve.http.errors import RequestError, body_of, status_of
from jaxllm.serve.http.fields import Fields
from jaxllm.serve.http.tools import read_tools
from jaxllm.serve.request import Piece, Stream
from jaxllm.text.tools import Delta

__all__ = ["Reply", "read"]

_TEXTS = ("input_text", "output_text", "text")
_ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}


def _content(given: Any, where: str) -> str:
    """The text of a message, which may come in parts."""
    if isinstance(given, str):
        return given
    fine = isinstance(given, list) and all(
        isinstance(p, dict) and p.get("type") in _TEXTS and isinstance(p.get("text"), str)
        for p in given
    )
    if not fine:
        raise RequestError(f"{where}.content must be a string or parts with text", param="input")
    return "".join(part["text"] for part in given)


def _message(item: Any, where: str) -> dict[str, Any]:
    """A message of a chat from an item of the input."""
    if not isinstance(item, dict):
        raise RequestError(f"{where} must be an object", param="input")
    kind, role = item.get("type", "message"), item.get("role")
    if kind == "message" and isinstance(role, str) and role in _ROLES:
        return {"role": _ROLES[role], "content": _content(item.get("content"), where)}
    if kind == "function_call" and isinstance(item.get("name"), str):
        function = {"name": item["name"], "arguments": item.get("arguments", "{}")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        return {"role": "assistant", "content": "", "tool_calls": [call]}
    if kind == "function_call_output":
        output = _content(item.get("output"), where)
        return {"role": "tool", "tool_call_id": item.get("call_id"), "content": output}
    raise RequestError(
        f"{where} must be a message with a role, a function_call or a function_call_output",
        param="input",
    )


def _messages(fields: Fields, most: int) -> list[dict[str, Any]]:
    given = fields.raw("input", schemas.items(most), needed=True)
    first = fields.text("instructions", most=1 << 20)
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not isinstance(given, list) or not 1 <= len(given) <= most:
        raise RequestError(f"input must be a string or a list of 1 to {most} items", param="input")
    messages = [_message(item, f"input[{i}]") for i, item in enumerate(given)]
    return messages if first is None else [{"role": "system", "content": first}, *messages]


def _grammar(given: Any) -> Grammar | None:
    """The grammar of the field `text`."""
    if given is None:
        return None
    fields = asked.object_of(given, "text")
    form = fields.raw("format", schemas.OBJECT)
    fields.only("verbosity", "medium")
    fields.close()
    if isinstance(form, dict) and form.get("type") == "json_schema":
        inner = {name: value for name, value in form.items() if name != "type"}
        form = {"type": "json_schema", "json_schema": inner}
    return asked.format_of(form, "text.format")


def read(fields: Fields, model: Worded, config: ServerConfig) -> asked.Asked:
    """A request to /v1/responses.

    Raises:
      RequestError, ConfigError: a field is wrong, unknown or not served.
    """
    fields.text("model")
    messages = _messages(fields, config.max_messages)
    tools = read_tools(fields, model)
    held = _grammar(fields.raw("text", schemas.TEXT_FORMAT))
    fields.only("previous_response_id")
    fields.only("conversation")
    fields.only("background", False)
    fields.only("truncation", "disabled")
    fields.only("include", [])
    fields.only("reasoning", {})
    fields.only("top_logprobs", 0)
    for name in ("safety_identifier", "prompt_cache_key"):
        fields.text(name)
    most = fields.integer("max_output_tokens", 1, config.max_tokens) or config.max_tokens
    (first,) = asked.requests_of(fields, [[0]], config, max_tokens=most)
    stream = fields.flag("stream")
    fields.close()
    if held is not None:
        first = dataclasses.replace(first, grammar=held)
    first = asked.with_tools(first, tools)
    ids = asked.messages_ids(messages, model, config.max_messages + 1, tools)
    request = dataclasses.replace(first, prompt_ids=tuple(ids))
    return asked.Asked(requests=(request,), stream=stream, usage=True, tools=tools)


class Reply:
    """The answer to one request of /v1/responses.

    Args:
      asked: what was asked.
      streams: of the engine, one.
      model: the name that the client used.
      body: of the request; parts of it are said again.
    """

    def __init__(
        self, asked: asked.Asked, streams: Sequence[Stream], *, model: str, body: dict[str, Any]
    ):
        self._asked, (self._stream,) = asked, streams
        self._parser = None if asked.tools is None else asked.tools.parser()
        self._output: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        said = ("instructions", "max_output_tokens", "temperature", "top_p", "metadata", "text")
        self._response: dict[str, Any] = {
            "id": f"resp_{secrets.token_hex(16)}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "model": model,
            "error": None,
            "incomplete_details": None,
            "output": [],
            "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
            "previous_response_id": None,
            "store": False,
            "tool_choice": body.get("tool_choice") or "auto",
            "tools": body.get("tools") or [],
            "usage": None,
            **{name: body.get(name) for name in said},
        }

    def cancel(self) -> None:
        """Nobody listens any more."""
        self._stream.cancel()

    async def whole(self) -> dict[str, Any]:
        """The one JSON object of a request without a stream."""
        async for piece in self._stream:
            for _ in self._take(piece):
                pass
        return self._response

    def events(self, keep_alive_s: float) -> AsyncIterator[str]:
        """Server-sent events; a comment when nothing came for a while."""
        return kept_alive(self._events(), keep_alive_s)

    async def _events(self) -> AsyncIterator[str]:
        number = 0

        def sent(event: dict[str, Any]) -> str:
            nonlocal number
            event["sequence_number"] = number
            number += 1
            return f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"

        try:
            for kind in ("created", "in_progress"):
                yield sent({"type": f"response.{kind}", "response": self._response})
            try:
                async for piece in self._stream:
                    for event in self._take(piece):
                        yield sent(event)
            except Exception as error:
                status, param, code = status_of(error)
                body = body_of(str(error), status, param=param, code=code)["error"]
                failed = {"code": "server_error", "message": body["message"]}
                self._response |= {"status": "failed", "error": failed}
                yield sent({"type": "response.failed", "response": self._response})
                return
            kind = self._response["status"]
            yield sent({"type": f"response.{kind}", "response": self._response})
        finally:
            self.cancel()

    def _take(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """Events of a piece; with the last one the response is whole."""
        usage = self._response["usage"] or self._usage()
        usage["output_tokens"] += len(piece.token_ids)
        usage["total_tokens"] += len(piece.token_ids)
        usage["input_tokens_details"]["cached_tokens"] = piece.cached_tokens
        self._response["usage"] = usage
        last = piece.finish_reason is not None
        if self._parser is None:
            deltas = [Delta(piece.text)] if piece.text else []
        else:
            deltas = self._parser.push(piece.text) + (self._parser.finish() if last else [])
        for delta in deltas:
            yield from self._grow(delta)
        if not last:
            return
        if not self._output:
            yield from self._begin({"type": "message", "role": "assistant", "content": []}, "msg")
        cut = piece.finish_reason == "length"
        yield from self._end("incomplete" if cut else "completed")
        self._response |= {"status": "incomplete" if cut else "completed", "output": self._output}
        if cut:
            self._response["incomplete_details"] = {"reason": "max_output_tokens"}

    def _usage(self) -> dict[str, Any]:
        prompt = len(self._asked.requests[0].prompt_ids)
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": 0,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt,
        }

    def _place(self, **more: Any) -> dict[str, Any]:
        """Which item an event is about."""
        place = {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1}
        return place | more

    def _grow(self, delta: Delta) -> Iterator[dict[str, Any]]:
        """More of the item that is open, or of a new one."""
        if delta.name is not None:
            call = {"call_id": f"call_{secrets.token_hex(12)}", "name": delta.name, "arguments": ""}
            yield from self._begin({"type": "function_call", **call}, "fc")
        elif delta.call is None and (self._open is None or self._open["type"] != "message"):
            yield from self._begin({"type": "message", "role": "assistant", "content": []}, "msg")
        item = self._output[-1]
        if delta.call is None:
            item["content"][0]["text"] += delta.content
            more = self._place(content_index=0, delta=delta.content, logprobs=[])
            yield {"type": "response.output_text.delta", **more}
        elif delta.arguments:
            item["arguments"] += delta.arguments
            more = self._place(delta=delta.arguments)
            yield {"type": "response.function_call_arguments.delta", **more}

    def _begin(self, item: dict[str, Any], prefix: str) -> Iterator[dict[str, Any]]:
        """A new item, after the end of the one before."""
        yield from self._end("completed")
        item = {"id": f"{prefix}_{secrets.token_hex(16)}", "status": "in_progress", **item}
        self._output.append(item)
        self._open = item
        added = {"item": json.loads(json.dumps(item)), "output_index": len(self._output) - 1}
        yield {"type": "response.output_item.added", **added}
        if item["type"] == "message":
            item["content"] = [{"type": "output_text", "text": "", "annotations": []}]
            more = self._place(content_index=0, part=dict(item["content"][0]))
            yield {"type": "response.content_part.added", **more}

    def _end(self, status: str) -> Iterator[dict[str, Any]]:
        """The open item is whole."""
        item, self._open = self._open, None
        if item is None:
            return
        item["status"] = status
        if item["type"] == "message":
            part = item["content"][0]
            more = self._place(content_index=0, text=part["text"], logprobs=[])
            yield {"type": "response.output_text.done", **more}
            yield {"type": "response.content_part.done", **self._place(content_index=0, part=part)}
        else:
            more = self._place(arguments=item["arguments"], name=item["name"])
            yield {"type": "response.function_call_arguments.done", **more}
        done = {"item": item, "output_index": len(self._output) - 1}
        yield {"type": "response.output_item.done", **done}
