"""What the HTTP layer needs of a model and of an engine: ours, a bundle's, or anybody's."""

from __future__ import annotations

import asyncio
from typing import Protocol, runtime_checkable

from jaxllm.serve.config import EngineConfig
from jaxllm.serve.request import Request, Stream
from jaxllm.serve.stats import Stats
from jaxllm.spec.model import ModelSpec
from jaxllm.text.tokenizer import Tokenizer

__all__ = ["Answering", "Worded"]


@runtime_checkable
class Worded(Protocol):
    """A model as requests are read for it."""

    @property
    def spec(self) -> ModelSpec: ...
    @property
    def tokenizer(self) -> Tokenizer | None: ...


@runtime_checkable
class Answering(Protocol):
    """An engine: it takes requests from any thread, and answers or refuses each."""

    config: EngineConfig
    error: str | None

    @property
    def alive(self) -> bool: ...
    def submit(
        self, request: Request, *, loop: asyncio.AbstractEventLoop | None = None
    ) -> Stream: ...
    def stats(self) -> Stats: ...
