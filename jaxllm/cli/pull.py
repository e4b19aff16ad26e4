"""`jaxllm pull`: fetch a model or data into the cache."""

from __future__ import annotations

import sys

from jaxllm.cli.options import Pull
from jaxllm.core.logging import show_notes

__all__ = ["run"]


def run(options: Pull) -> int:
    """Run the subcommand; prints where it lies."""
    show_notes()
    if options.name.startswith("data:"):
        from jaxllm.data.download import pull_data as fetch
    else:
        from jaxllm.zoo.pull import pull as fetch

    print(fetch(options.name, progress=lambda line: print(line, file=sys.stderr)))
    return 0
