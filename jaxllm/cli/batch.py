"""`jaxllm batch`: answer a file of requests in OpenAI's batch format."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from typing import Any

from jaxllm.cli.options import Batch
from jaxllm.cli.serve import name_of
from jaxllm.core.logging import show_notes

__all__ = ["answer", "run"]


def run(options: Batch) -> int:
    """Run the subcommand; returns 1 when requests were refused."""
    show_notes()

    def begin() -> Any:
        from jaxllm.model import load
        from jaxllm.serve.engine import Engine

        return Engine(load(options.source, dtype=options.dtype))

    return answer(options, begin)


def answer(options: Batch, begin: Callable[[], Any]) -> int:
    """Answer the file by the engine that `begin` makes; returns 1 when requests were refused."""
    from jaxllm.serve import batch

    batch.read_lines(options.requests, options.max_lines)  # before the model is loaded
    batch.answered(options.answers)
    name = name_of(options.source)
    with begin() as engine:
        begun = time.perf_counter()
        counts = asyncio.run(
            batch.run(engine, options.requests, options.answers, name=name, most=options.max_lines)
        )
        took, drawn = time.perf_counter() - begun, engine.stats().drawn_tokens
    print(
        f"{counts.done} of {counts.total} answered now, {counts.before} before, {counts.refused} "
        f"refused; {drawn} tokens in {took:.1f} s",
        file=sys.stderr,
    )
    return 1 if counts.refused else 0
