"""Chat templates: check the messages, render them in a bounded worker process.

The worker (`sandbox.py`) starts at the first rendering (about 0.1 s) and then serves every thread,
one rendering at a time; an ordinary template takes well under a millisecond. A template that runs
too long or takes too much memory costs the worker its life, and the next rendering a new start.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from jaxllm.errors import ConfigError, UnsupportedError, WeightsError

__all__ = ["ChatLimits", "check_messages", "render_template"]

START_LIMIT_S = 60.0  # a worker's start, on a loaded machine with a cold disk


@dataclass(frozen=True, kw_only=True)
class ChatLimits:
    """What one rendering may take: seconds, bytes of memory, characters of output."""

    time_s: float = 5.0
    memory_bytes: int = 1 << 30
    output_chars: int = 4_000_000

    def __post_init__(self) -> None:
        if not 0 < self.time_s <= 600:
            raise ConfigError(f"time_s is {self.time_s}; allowed: above 0, at most 600 seconds")
        if self.memory_bytes < 1 << 28:
            raise ConfigError(f"memory_bytes is {self.memory_bytes}; allowed: at least 2**28")
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
    reply = _worker.ask(line, limits)
    if "text" in reply:
        return reply["text"]
    kind, message = reply["kind"], reply["message"]
    if kind == "refused":
        raise ConfigError(f"the model's chat template refuses these messages: {message}")
    raise WeightsError(
        f"the model's chat template failed: {message}. Check that the messages are of the form "
        "that it expects (some take text only), or use a raw prompt"
    )


class _Worker:
    """The one worker process of this interpreter: started when needed, replaced when it dies."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.memory_bytes = 0
        self.hooked = False

    def ask(self, line: bytes, limits: ChatLimits) -> dict[str, str]:
        """Send one request and wait for its answer, at most about `limits.time_s`."""
        with self.lock:
            if self.process is not None and self.process.poll() is not None:
                self.stop()
            if self.memory_bytes != limits.memory_bytes:
                self.stop()
            if self.process is None:
                self.start(limits.memory_bytes)
            assert self.process is not None and self.process.stdin and self.process.stdout
            # Escapes make a character 12 bytes at most; the margin lets the worker's own
            # timer, which needs no scheduling of ours, come first.
            most = 12 * limits.output_chars + 10_000
            with _Deadline(self.process, limits.time_s + 0.5) as deadline:
                with contextlib.suppress(OSError):
                    self.process.stdin.write(line)
                    self.process.stdin.flush()
                    reply = self.process.stdout.readline(most)
                    if reply.endswith(b"\n"):
                        return json.loads(reply)
            code = self.stop()
            if deadline.passed or code == -14:  # SIGALRM, by number: Windows has no such name
                return {"kind": "time", "message": f"it ran longer than {limits.time_s:g} s"}
            return {"kind": "died", "message": f"it ended its process (exit code {code})"}

    def start(self, memory_bytes: int) -> None:
        """Start the worker and wait until it is ready."""
        if not self.hooked:  # a forked child must not share this process's pipe
            atexit.register(self.stop)
            if hasattr(os, "register_at_fork"):
                os.register_at_fork(after_in_child=self.forget)
            self.hooked = True
        program = str(Path(__file__).with_name("sandbox.py"))
        command = [sys.executable, "-I", "-S", program, str(memory_bytes), *_jinja_folders()]
        try:
            if not sys.executable:
                raise OSError("this interpreter does not know its own program (sys.executable)")
            pipe = subprocess.PIPE
            process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, bufsize=-1
            )
        except OSError as error:
            raise UnsupportedError(
                f"chat templates run in a process of their own, which cannot start: {error}. "
                "Use a raw prompt"
            ) from None
        self.process, self.memory_bytes = process, memory_bytes
        with _Deadline(process, START_LIMIT_S):
            ready = _read_line(process.stdout)
        if ready != b"ready\n":
            raise UnsupportedError(
                "chat templates run in a process of their own, which ended with exit code "
                f"{self.stop()} before it was ready. Use a raw prompt"
            )

    def stop(self) -> int | None:
        """End the worker; its exit code."""
        process, self.process = self.process, None
        if process is None:
            return None
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):  # a broken pipe still holds unsent bytes
                if pipe is not None:
                    pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=1.0)
        process.kill()
        return process.wait()

    def forget(self) -> None:
        """In a forked child: drop the parent's worker without ending it."""
        if self.process is not None:
            for pipe in (self.process.stdin, self.process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        os.close(pipe.fileno())
            self.process.returncode = 0  # not this process's child: nothing to wait for
        self.process, self.lock = None, threading.Lock()


class _Deadline:
    """Kill a process when a block takes too long; works in any thread and on any system."""

    def __init__(self, process: subprocess.Popen[bytes], time_s: float) -> None:
        self.passed = False
        self.process = process
        self.timer = threading.Timer(time_s, self.fire)
        self.timer.daemon = True

    def fire(self) -> None:
        self.passed = True
        self.process.kill()

    def __enter__(self) -> _Deadline:
        self.timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.timer.cancel()


def _read_line(pipe: IO[bytes] | None) -> bytes:
    return pipe.readline(10_000) if pipe is not None else b""


def _jinja_folders() -> list[str]:
    """The import folders of jinja2 and what it needs, found without importing them."""
    specs = [importlib.util.find_spec(name) for name in ("jinja2", "markupsafe")]
    found = [Path(spec.origin).parent.parent for spec in specs if spec and spec.origin]
    if len(found) < len(specs):
        raise UnsupportedError(
            "chat templates need the jinja2 package: install it, or use a raw prompt"
        )
    return sorted({str(folder) for folder in found})


_worker = _Worker()
