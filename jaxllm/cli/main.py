"""`jaxllm`: parses, runs one subcommand, and turns the house's errors into exit code 2."""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from collections.abc import Callable, Sequence
from typing import Any

from jaxllm.errors import user_errors

__all__ = ["main", "parse"]

_BOX = str.maketrans("", "", "╭╮╰╯│─├┤")
_MAX_LINES = 5


def parse(arguments: list[str]) -> Any:
    """Options of the subcommand that the arguments name.

    Raises:
      SystemExit: 0 after --help, 2 after a message of a few lines on stderr.
    """
    import tyro

    from jaxllm.cli.options import COMMANDS

    if arguments[:1] == ["train"] and len(arguments) > 1 and not arguments[1].startswith("-"):
        from jaxllm.cli.train import parse_run

        return _quietly(arguments, lambda: parse_run(arguments[1], arguments[2:]))
    if arguments[:1] == ["run"] and len(arguments) > 1 and not arguments[1].startswith("-"):
        from jaxllm.cli import run

        return _quietly(arguments, lambda: run.parse_run(arguments[1], arguments[2:]))
    return _quietly(
        arguments,
        lambda: tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="jaxllm",
            description="Import, train and measure language models compiled ahead of time.",
            args=list(arguments),
            config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff),
        ),
    )


def _quietly(arguments: Sequence[str], parser: Callable[[], Any]) -> Any:
    """What a parser gives; its complaints in a few plain lines."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parser()
    except SystemExit as end:
        lines = [line.translate(_BOX).strip() for line in said.getvalue().splitlines()]
        lines = [line for line in lines if line]
        if lines:
            _complain(" ".join(arguments[:1]), "; ".join(lines[1:_MAX_LINES]))
        raise SystemExit(end.code) from None


def _complain(what: str, message: str) -> None:
    print(f"jaxllm {what}: {message}".replace("  ", " "), file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    name = given[0] if given else ""
    try:
        options = parse(given)
        return importlib.import_module(f"jaxllm.cli.{name}").run(options) or 0
    except user_errors as error:
        _complain(name, "\n".join(str(error).splitlines()[:_MAX_LINES]))
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 141


if __name__ == "__main__":
    sys.exit(main())
