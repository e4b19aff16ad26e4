"""`jaxllm chat`: talk with a model over several turns."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any

from jaxllm.cli.generate import sampling_of
from jaxllm.cli.options import Chat
from jaxllm.core.logging import show_notes
from jaxllm.errors import CapacityError

__all__ = ["run", "talk"]

_HELP = "Type a message; /reset forgets the conversation, /quit (or Ctrl-D) ends it."


def run(options: Chat) -> int:
    """Run the subcommand."""
    show_notes()

    def load() -> Any:
        from jaxllm.model import load

        return load(options.source, dtype=options.dtype)

    return talk(options, load)


def talk(options: Chat, load: Callable[[], Any]) -> int:
    """Talk with a model, which is loaded once all options are checked."""
    sampling = sampling_of(options)
    model = load()
    first = [] if options.system is None else [{"role": "system", "content": options.system}]
    history: list[dict[str, Any]] = [*first]
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - line editing for input()
    print(_HELP, file=sys.stderr)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return 0
        if line == "/quit":
            return 0
        if line == "/reset":
            history = [*first]
            continue
        if line:
            turn = [*history, {"role": "user", "content": line}]
            history = _answer(model, turn, sampling, history)


def _answer(model: Any, turn: list[Any], sampling: Any, history: list[Any]) -> list[Any]:
    """Stream one answer and return the history with it; a turn that does not fit leaves none."""
    text = ""
    try:
        for piece in model.stream(turn, **sampling):
            print(piece, end="", flush=True)
            text += piece
    except CapacityError as error:
        print(f"jaxllm chat: {error}; /reset starts anew", file=sys.stderr)
        return history
    except KeyboardInterrupt:
        print(" [interrupted]", end="", file=sys.stderr)
    print()
    return [*turn, {"role": "assistant", "content": text}]
