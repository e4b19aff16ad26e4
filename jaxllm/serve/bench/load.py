"""Puts load on a server or an engine and writes down when every piece of an answer came."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

import numpy as np

from jaxllm.core.config import require
from jaxllm.errors import CapacityError, ConfigError
from jaxllm.infer.sampling import Sampling
from jaxllm.serve.bench.workload import Ask
from jaxllm.serve.engine import Engine
from jaxllm.serve.request import Request

__all__ = ["EngineTarget", "HttpTarget", "Load", "Record", "Target", "drive"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """How requests come: so many at once, or so many a second at random times (Poisson).

    Attributes:
      concurrency: requests on their way at once; the next starts when one ends.
      rate: requests a second, whatever is on its way.
    """

    concurrency: int | None = None
    rate: float | None = None

    def __post_init__(self) -> None:
        require(
            (self.concurrency is None) != (self.rate is None), "give either concurrency or rate"
        )
        require((self.concurrency or self.rate or 0) > 0, f"a load is positive, found {self.name}")

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.concurrency} at once" if self.rate is None else f"{self.rate:g}/s"


@dataclasses.dataclass(kw_only=True)
class Record:
    """One request as it went; times in seconds of `time.perf_counter`.

    Attributes:
      sent: when it was asked.
      stamps: when each piece of the answer came.
      ended: when the answer was whole.
      input_tokens: of the prompt, as counted by who answered.
      output_tokens: of the answer, likewise.
      cached_tokens: of the prompt, from the prefix cache.
      error: what went wrong, or None.
    """

    sent: float
    stamps: list[float] = dataclasses.field(default_factory=list)
    ended: float = 0.0
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    error: str | None = None


class Target(Protocol):
    """What answers."""

    async def answer(self, ask: Ask, record: Record) -> None:
        """Ask and write down what comes."""
        ...


class EngineTarget:
    """An engine in this process, without HTTP.

    Args:
      engine: that answers.
      temperature: of every request.
    """

    def __init__(self, engine: Engine, *, temperature: float = 0.0):
        self.engine, self._sampling = engine, Sampling(temperature=temperature)

    async def answer(self, ask: Ask, record: Record) -> None:
        """See `Target`."""
        ids = ask.prompt
        if isinstance(ids, str):
            tokenizer = self.engine.model.tokenizer
            require(tokenizer is not None, "this model has no tokenizer: use random prompts")
            ids = tuple(tokenizer.encode(ids)) if tokenizer else ()
        request = Request(
            prompt_ids=ids,
            max_tokens=ask.output_tokens,
            sampling=self._sampling,
            ignore_eos=True,
        )
        record.input_tokens = len(ids)
        async for piece in self.engine.submit(request, loop=asyncio.get_running_loop()):
            record.stamps.append(time.perf_counter())
            record.output_tokens += len(piece.token_ids)
            record.cached_tokens = max(record.cached_tokens, piece.cached_tokens)


class HttpTarget:
    """A server with OpenAI's /v1/completions.

    Args:
      url: its address, with or without /v1.
      api_key: if it needs one.
      temperature: of every request.
      model: its name for the model; the first that it lists by default.
    """

    def __init__(
        self, url: str, *, api_key: str = "", temperature: float = 0.0, model: str | None = None
    ):
        import httpx

        self._base = url.rstrip("/").removesuffix("/v1") + "/v1"
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._client = httpx.AsyncClient(headers=headers, timeout=None, limits=limits)
        self._model, self._temperature = model, temperature

    async def __aenter__(self) -> HttpTarget:
        import httpx

        try:
            reply = await self._client.get(f"{self._base}/models")
            reply.raise_for_status()
            self._model = self._model or reply.json()["data"][0]["id"]
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, IndexError) as error:
            await self._client.aclose()
            raise ConfigError(
                f"{self._base}/models gives no list of models: {error}; is the server ready, and "
                "does it need --api-key?"
            ) from None
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def answer(self, ask: Ask, record: Record) -> None:
        """See `Target`; a piece is an event with text."""
        body = {
            "model": self._model,
            "prompt": ask.prompt,
            "max_tokens": ask.output_tokens,
            "temperature": self._temperature,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        async for event in self._events(body):
            if any(choice.get("text") for choice in event.get("choices", ())):
                record.stamps.append(time.perf_counter())
            if usage := event.get("usage"):
                record.input_tokens = usage["prompt_tokens"]
                record.output_tokens = usage["completion_tokens"]
                details = usage.get("prompt_tokens_details") or {}
                record.cached_tokens = details.get("cached_tokens") or 0

    async def _events(self, body: Any) -> AsyncIterator[dict[str, Any]]:
        async with self._client.stream("POST", f"{self._base}/completions", json=body) as reply:
            if reply.status_code != 200:
                text = (await reply.aread()).decode(errors="replace")
                raise CapacityError(f"HTTP {reply.status_code}: {text[:300]}")
            async for line in reply.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise CapacityError(str(event["error"])[:300])
                yield event


async def drive(
    target: Target, asks: Sequence[Ask], load: Load, *, seed: int = 0
) -> tuple[list[Record], float]:
    """Ask everything under a load.

    Args:
      target: that answers.
      asks: in their order.
      load: how they come.
      seed: of the times at which they come.

    Returns:
      What became of each, and the seconds from the first request to the last answer.
    """
    records: list[Record] = []

    async def one(ask: Ask) -> None:
        record = Record(sent=time.perf_counter())
        records.append(record)
        try:
            await target.answer(ask, record)
        except Exception as error:  # a refusal is a result
            record.error = f"{type(error).__name__}: {error}"
        record.ended = time.perf_counter()

    async def several(left: Any) -> None:
        for ask in left:
            await one(ask)

    begun = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        if load.concurrency is not None:
            left = iter(asks)
            for _ in range(min(load.concurrency, len(asks))):
                group.create_task(several(left))
        else:
            gaps = np.random.default_rng(seed).exponential(1 / (load.rate or 1), len(asks))
            for ask, due in zip(asks, begun + np.cumsum(gaps) - gaps[0], strict=True):
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                group.create_task(one(ask))
    return records, time.perf_counter() - begun
