"""Tool calls in the text of an answer: how a chat template writes them, and how they are read.

Two forms are known. Tagged: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, any number of
them among other text. Bare: the answer is one JSON object `{"name": …, "parameters": {…}}`, or
several with semicolons between them.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection
from typing import Any, Literal

__all__ = ["Delta", "Form", "ToolParser", "form_of", "readable"]

Form = Literal["tagged", "bare"]
OPEN, CLOSE = "<tool_call>", "</tool_call>"
_HEAD = re.compile(
    r'\s*\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)


def form_of(template: str | None) -> Form | None:
    """The form in which a chat template writes tool calls; None if it has none that is known."""
    if template is None or "tools" not in template or "<function=" in template:
        return None
    if OPEN in template:
        return "tagged"
    return "bare" if '"name": ' in template and '"parameters": ' in template else None


@dataclasses.dataclass(frozen=True)
class Delta:
    """Something new of an answer.

    Attributes:
      content: text that is no tool call.
      call: which call the rest is about, counted from 0.
      name: of the function, in the first delta of a call.
      arguments: the next piece of the JSON text of its arguments.
    """

    content: str = ""
    call: int | None = None
    name: str | None = None
    arguments: str = ""


class ToolParser:
    """Takes an answer apart as it comes.

    Args:
      form: of the calls.
      names: functions there are; what calls another stays text.
    """

    def __init__(self, form: Form, names: Collection[str]):
        self._form, self._names = form, frozenset(names)
        self._state: Literal["text", "head", "value", "tail", "plain"] = "text"
        self._buffer, self.calls = "", 0
        self._depth, self._quoted, self._escaped = 0, False, False

    def push(self, text: str) -> list[Delta]:
        """Take more text; what is certain by now."""
        self._buffer += text
        out: list[Delta] = []
        steps = {
            "text": self._text if self._form == "tagged" else self._start,
            "head": self._head,
            "value": self._value,
            "tail": self._tail,
            "plain": self._plain,
        }
        while True:
            before = self._state, len(self._buffer)
            out += steps[self._state]()
            if (self._state, len(self._buffer)) == before or not self._buffer:
                return out

    def finish(self) -> list[Delta]:
        """The answer is over: what was held back."""
        rest, self._buffer = self._buffer, ""
        if self._state == "head":
            return self._block(rest, OPEN if self._form == "tagged" else "")
        return [Delta(rest)] if rest and self._state in ("text", "plain") else []

    def _plain(self) -> list[Delta]:
        text, self._buffer = self._buffer, ""
        return [Delta(text)] if text else []

    def _start(self) -> list[Delta]:
        """The first letter tells whether a bare answer is a call."""
        if self._buffer.lstrip():
            self._state = "head" if self._buffer.lstrip()[0] == "{" else "plain"
        return []

    def _text(self) -> list[Delta]:
        """Text up to a call; blanks before one are dropped, and what may open one is held back."""
        text, found, rest = self._buffer.partition(OPEN)
        if found:
            self._state, self._buffer = "head", rest
            text = text.rstrip()
            return [Delta(text)] if text else []
        keep = max((n for n in range(1, len(OPEN)) if text.endswith(OPEN[:n])), default=0)
        keep = len(text) - len(text[: len(text) - keep].rstrip())
        self._buffer = text[len(text) - keep :]
        text = text[: len(text) - keep]
        return [Delta(text)] if text else []

    def _head(self) -> list[Delta]:
        """A call's name, once it is whole; an odd block waits for its end."""
        found = _HEAD.match(self._buffer)
        if found and found[1] in self._names:
            self._buffer = self._buffer[found.end() :]
            self._state, self._depth, self._quoted = "value", 0, False
            self.calls += 1
            return [Delta(call=self.calls - 1, name=found[1])]
        if self._form == "tagged" and CLOSE in self._buffer:
            block, _, self._buffer = self._buffer.partition(CLOSE)
            self._state = "text"
            return self._block(block, OPEN, CLOSE)
        return []

    def _block(self, text: str, before: str = "", after: str = "") -> list[Delta]:
        """A whole block whose keys are in another order, or that is no call at all."""
        try:
            found = json.loads(text)
            name = found["name"]
            arguments = found.get("arguments", found.get("parameters", {}))
            if name not in self._names or not isinstance(arguments, dict):
                raise ValueError(name)
        except (ValueError, KeyError, TypeError, RecursionError):
            whole = before + text + after
            return [Delta(whole)] if whole else []
        self.calls += 1
        return [Delta(call=self.calls - 1, name=name, arguments=json.dumps(arguments))]

    def _value(self) -> list[Delta]:
        """Arguments up to the brace that ends them."""
        for place, letter in enumerate(self._buffer):
            if self._quoted:
                if self._escaped:
                    self._escaped = False
                elif letter == "\\":
                    self._escaped = True
                elif letter == '"':
                    self._quoted = False
            elif letter == '"':
                self._quoted = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if self._depth == 0:
                    text, self._buffer = self._buffer[: place + 1], self._buffer[place + 1 :]
                    self._state = "tail"
                    return [Delta(call=self.calls - 1, arguments=text)]
        text, self._buffer = self._buffer, ""
        return [Delta(call=self.calls - 1, arguments=text)] if text else []

    def _tail(self) -> list[Delta]:
        """What stands between a call's arguments and whatever comes next."""
        if self._form == "tagged":
            _, found, rest = self._buffer.partition(CLOSE)
            if found:
                self._state, self._buffer = "text", rest
            return []
        rest = self._buffer.lstrip(" \n\t};")
        if rest:
            self._state, self._buffer = ("head" if rest[0] == "{" else "plain"), rest
        return []


def readable(messages: Any) -> Any:
    """Messages as templates like them: the JSON text of earlier calls' arguments as objects."""
    if not isinstance(messages, list):
        return messages
    return [
        {**message, "tool_calls": [_opened(call) for call in message["tool_calls"]]}
        if isinstance(message, dict) and isinstance(message.get("tool_calls"), list)
        else message
        for message in messages
    ]


def _opened(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}}
