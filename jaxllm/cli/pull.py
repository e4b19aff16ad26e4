"""`jaxllm pull`: fetch a model into the cache."""

from __future__ import annotations

import sys

from jaxllm.cli.options import Pull
from jaxllm.core.logging import show_notes

__all__ = ["run"]


def run(options: Pull) -> int:
    """Run the subcommand; prints where the model lies."""
    show_notes()
    from jaxllm.zoo.pull import pull

    print(pull(options.name, progress=lambda line: print(line, file=sys.stderr)))
    return 0
