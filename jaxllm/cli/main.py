"""`jaxllm`: parses, runs one subcommand, and turns the house's errors into exit code 2."""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from collections.abc import Sequence
from typing import Any

from jaxllm.errors import user_errors

__all__ = ["main", "parse"]

_BOX = str.maketrans("", "", "╭╮╰╯│─├┤")
_MAX_LINES = 5


def parse(arguments: Sequence[str]) -> Any:
    """Options of the subcommand that the arguments name.

    Raises:
      SystemExit: 0 after --help, 2 after a message of a few lines on stderr.
    """
    import tyro

    from jaxllm.cli.options import COMMANDS

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.extras.subcommand_cli_from_dict(
                COMMANDS,
                prog="jaxllm",
                description="Import, run and measure language models compiled ahead of time.",
                args=list(arguments),
                config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff),
            )
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
    options = parse(sys.argv[1:] if arguments is None else arguments)
    name = type(options).__name__.lower()
    try:
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
