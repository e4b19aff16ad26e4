"""Chat templates: check the messages, render them in a bounded worker process.

The worker (`worker.py`, `sandbox.py`) starts at the first rendering (about 0.1 s) and then serves
every thread, one rendering at a time; an ordinary template takes well under a millisecond. A
template that runs too long or takes too much memory costs the worker its life, and the next
rendering a new start.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxllm.errors import ConfigError, WeightsError
from jaxllm.text.worker import Worker

__all__ = ["ChatLimits", "check_messages", "check_tools", "render_template"]

_worker = Worker()


@dataclass(frozen=True, kw_only=True)
class ChatLimits:
    """What one rendering may take: seconds, bytes of memory, characters of output."""

    time_s: float = 5.0
    memory_bytes: int = 1 << 29
    output_chars: int = 4_000_000

    def __post_init__(self) -> None:
        if not 0 < self.time_s <= 600:
            raise ConfigError(f"time_s is {self.time_s}; allowed: above 0, at most 600 seconds")
        if self.memory_bytes < 1 << 27:
            raise ConfigError(f"memory_bytes is {self.memory_bytes}; allowed: at least 2**27")
        if self.output_chars < 1:
            raise ConfigError(f"output_chars is {self.output_chars}; allowed: at least 1")


DEFAULT_LIMITS = ChatLimits()


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """The messages as a template takes them; keys whose value is None are left out.

    Args:
        messages: A list of dicts. `role` is a string; `content` a string or a list of parts, each
            a dict with a `type` (a part of type "text" has a string `text`). A message with
            `tool_calls` needs no content. Other keys pass through.

    Raises:
        ConfigError: The first message that is otherwise, by its index.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise ConfigError(
            f"messages must be a list of dicts with role and content, not {_kind(messages)}"
        )
    if not messages:
        raise ConfigError("messages is empty; give at least one message with role and content")
    return [_check_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def check_tools(tools: Any) -> list[dict[str, Any]] | None:
    """The tools as a template takes them: a list of JSON schemas, or None."""
    if tools is None:
        return None
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ConfigError(
            'tools must be a list of dicts such as {"type": "function", "function": {...}}, '
            f"not {_kind(tools)}"
        )
    return [dict(tool) for tool in tools]


def _check_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ConfigError(
            f"{where} must be a dict with role and content, not {_kind(message)}; "
            'for example {"role": "user", "content": "Hello"}'
        )
    unnamed = [key for key in message if not isinstance(key, str)]
    if unnamed:
        raise ConfigError(f"{where} has the key {unnamed[0]!r}; every key must be a string")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise ConfigError(
            f"{where}.role must be a string such as 'user', 'assistant' or 'system', "
            f"not {_kind(role)}"
        )
    if content is None and not message.get("tool_calls"):
        raise ConfigError(f"{where} has no content; give a string or a list of parts")
    if isinstance(content, list | tuple):
        for i, part in enumerate(content):
            _check_part(part, f"{where}.content[{i}]")
    elif content is not None and not isinstance(content, str):
        raise ConfigError(
            f"{where}.content must be a string or a list of parts, not {_kind(content)}"
        )
    return {key: value for key, value in message.items() if value is not None}


def _check_part(part: Any, where: str) -> None:
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        raise ConfigError(
            f'{where} must be a dict with a type, for example {{"type": "text", "text": "Hello"}}, '
            f"not {_kind(part)}"
        )
    if part["type"] == "text" and not isinstance(part.get("text"), str):
        raise ConfigError(f"{where}.text must be a string, not {_kind(part.get('text'))}")


def _kind(value: Any) -> str:
    """A short name of what was given, without its content."""
    if value is None:
        return "nothing (None)"
    return repr(value) if isinstance(value, str) and len(value) < 20 else type(value).__name__


def render_template(
    template: str, variables: Mapping[str, Any], *, limits: ChatLimits = DEFAULT_LIMITS
) -> str:
    """Render a chat template, as jinja2's sandbox would, within limits of time, memory and output.

    Args:
        template: The jinja2 text, with the conventions of public chat templates: blocks trimmed,
            `break` and `continue`, `raise_exception`, `strftime_now`, `tojson`, `generation`.
        variables: What the template sees; JSON types only.
        limits: Bounds of one rendering. Memory is bounded where the system can (Linux).

    Raises:
        ConfigError: The template refuses the messages, or a variable is not JSON.
        WeightsError: The template is wrong: its syntax, its operations, or over a limit.
        UnsupportedError: jinja2 is not installed, or the worker process cannot start.
    """
    request = {"template": template, "variables": dict(variables)}
    request |= {"time_s": limits.time_s, "output_chars": limits.output_chars}
    try:
        line = json.dumps(request).encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"messages, tools and template options must be plain JSON values: {error}"
        ) from None
    reply = _worker.ask(
        line,
        time_s=limits.time_s,
        memory_bytes=limits.memory_bytes,
        output_chars=limits.output_chars,
    )
    if "text" in reply:
        return reply["text"]
    kind, message = reply["kind"], reply["message"]
    if kind == "refused":
        raise ConfigError(f"the model's chat template refuses these messages: {message}")
    hint = "use a raw prompt"
    if kind == "template":
        hint = (
            "check that the messages are of the form it expects (some take text only), or " + hint
        )
    raise WeightsError(f"the model's chat template failed: {message.rstrip('.')}; {hint}")
