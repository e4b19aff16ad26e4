"""The routes."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from jaxllm.serve.embedder import Embedder
from jaxllm.serve.http import asked, responses
from jaxllm.serve.http.answering import Answering, Worded
from jaxllm.serve.http.answers import Answers
from jaxllm.serve.http.config import ServerConfig
from jaxllm.serve.http.errors import RequestError, response_to
from jaxllm.serve.http.fields import Fields, parse_object
from jaxllm.serve.http.guard import PAGE, Guard
from jaxllm.serve.http.metrics import Metrics
from jaxllm.serve.http.openapi import CHAT, COMPLETION, INPUT, Way, document
from jaxllm.serve.http.page import page
from jaxllm.serve.request import Gone

__all__ = ["App", "build"]


_PIECES = (
    "data: {",
    "event: response.output_text.delta",
    "event: response.function_call_arguments.delta",
)
"""How events begin that bring something of an answer."""


class App:
    """The server's state and its routes.

    Args:
      name: of the model, as clients ask for it.
      model: loaded.
      engine: that answers; None for an encoder.
      config: bounds.
      embedder: that gives vectors, or None.
    """

    def __init__(
        self,
        name: str,
        model: Worded,
        engine: Answering | None,
        config: ServerConfig,
        *,
        embedder: Embedder | None = None,
    ):
        self.name, self.model, self.engine, self.config = name, model, engine, config
        self.embedder = embedder
        self.metrics = Metrics(engine, embedder)
        self.created = int(time.time())
        self.draining = False

    async def health(self, _: Request) -> Response:
        """Whether the engine lives."""
        if self.engine is not None and not self.engine.alive:
            raise Gone(self.engine.error or "the engine is not alive")
        return JSONResponse({"status": "ok"})

    async def ready(self, _: Request) -> Response:
        """Whether new requests are taken."""
        if self.draining:
            raise Gone("the server is shutting down")
        await self.health(_)
        return JSONResponse({"status": "ready"})

    async def chat_page(self, _: Request) -> Response:
        """A page to talk with the model."""
        return page()

    async def show_metrics(self, _: Request) -> Response:
        """Prometheus."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self, _: Request) -> Response:
        """The one model."""
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model_card(self, request: Request) -> Response:
        """One model by its name."""
        self._check_name(request.path_params["name"])
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "jaxllm",
            "max_model_len": self._context,
        }

    @property
    def _context(self) -> int:
        """Most tokens of one sequence."""
        if self.engine is not None:
            return self.engine.config.context or self.model.spec.context
        return self.embedder.max_tokens if self.embedder else self.model.spec.context

    async def embeddings(self, request: Request) -> Response:
        """/v1/embeddings"""
        if self.embedder is None:
            raise RequestError(
                "this model does not say how its hidden states become a vector", code="unsupported"
            )
        body = parse_object(await request.body())
        self._check_name(body.get("model"))
        wanted = asked.embeddings(Fields(body), self.model, self.config)
        found, count = await asyncio.to_thread(self.embedder.embed, wanted.texts)
        data = [
            {"object": "embedding", "index": i, "embedding": _vector(vector, wanted.packed)}
            for i, vector in enumerate(found)
        ]
        usage = {"prompt_tokens": count, "total_tokens": count}
        return JSONResponse({"object": "list", "data": data, "model": self.name, "usage": usage})

    async def tokenize(self, request: Request) -> Response:
        """Token ids of a prompt or of messages."""
        body = parse_object(await request.body())
        self._check_name(body.get("model"))
        ids = await asyncio.to_thread(asked.tokens, Fields(body), self.model, self.config)
        most = self._context
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": most})

    async def chat(self, request: Request) -> Response:
        """/v1/chat/completions"""
        return await self._complete(request, asked.chat, self._answers(chat=True))

    async def completions(self, request: Request) -> Response:
        """/v1/completions"""
        return await self._complete(request, asked.completions, self._answers(chat=False))

    async def responses(self, request: Request) -> Response:
        """/v1/responses"""

        def reply(wanted: asked.Asked, streams: list[Any], body: Any) -> responses.Reply:
            return responses.Reply(wanted, streams, model=self.name, body=body)

        return await self._complete(request, responses.read, reply)

    def _answers(self, *, chat: bool) -> Callable[..., Answers]:
        """Makes answers of completions."""

        def make(wanted: asked.Asked, streams: list[Any], _: Any) -> Answers:
            tokenizer = self.model.tokenizer
            return Answers(wanted, streams, model=self.name, chat=chat, tokenizer=tokenizer)

        return make

    async def _complete(
        self, request: Request, read: Callable[..., asked.Asked], make: Callable[..., Any]
    ) -> Response:
        begun = time.perf_counter()
        body = parse_object(await request.body())
        self._check_name(body.get("model"))
        wanted = await asyncio.to_thread(read, Fields(body), self.model, self.config)
        tenant, loop = request.scope.get("tenant", ""), asyncio.get_running_loop()
        streams = await asyncio.to_thread(self._submit, wanted, tenant, loop)
        answers = make(wanted, streams, body)
        if wanted.stream:
            events = self._timed(answers.events(self.config.keep_alive_s), begun)
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        return JSONResponse(await self._unless_gone(request, answers))

    def _submit(
        self, wanted: asked.Asked, tenant: str, loop: asyncio.AbstractEventLoop
    ) -> list[Any]:
        """All prompts, or none; not on the event loop, as it may compile a grammar."""
        if self.engine is None:
            raise RequestError(
                "this model is an encoder: it answers /v1/embeddings", code="unsupported"
            )
        if self.draining:
            raise Gone("the server is shutting down")
        streams = []
        try:
            for one in wanted.requests:
                one = dataclasses.replace(one, tenant=tenant)
                streams.append(self.engine.submit(one, loop=loop))
        except Exception:
            for stream in streams:
                stream.cancel()
            raise
        return streams

    async def _unless_gone(self, request: Request, answers: Any) -> Any:
        """The whole answer, given up when the client hangs up."""
        task = asyncio.create_task(answers.whole())
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=0.5)
                if not task.done() and await request.is_disconnected():
                    raise ClientDisconnect
            return task.result()
        finally:
            answers.cancel()
            task.cancel()

    async def _timed(self, events: AsyncIterator[str], begun: float) -> AsyncIterator[str]:
        """Events, with the times between them on record."""
        last, texts = begun, 0
        async for event in events:
            if event.startswith(_PIECES) and '"content": ""' not in event:
                now = time.perf_counter()
                (self.metrics.gaps if texts else self.metrics.first).observe(now - last)
                last, texts = now, texts + 1
            yield event

    def _check_name(self, name: Any) -> None:
        if isinstance(name, str) and name != self.name:  # else the reader says what it must be
            raise RequestError(
                f"the model {name[:100]!r} is not served here; allowed: {self.name!r}",
                status=404,
                param="model",
                code="model_not_found",
            )


def _vector(vector: np.ndarray, packed: str) -> Any:
    """Numbers, or their bytes in base64."""
    if packed == "float":
        return vector.tolist()
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def _caught(app: App, route: Callable[..., Any]) -> Callable[..., Any]:
    """A route whose errors become answers."""

    async def run(request: Request) -> Response:
        try:
            response = await route(request)
        except ClientDisconnect:
            response = Response(status_code=499)
        except RequestError as error:
            response = response_to(error)
        except Exception as error:
            response = response_to(error)
        app.metrics.requests.labels(route.__name__, str(response.status_code)).inc()
        return response

    return run


async def _missing(request: Request, _: Exception) -> Response:
    return response_to(
        RequestError(f"no such route: {request.method} {request.url.path[:200]}", status=404)
    )


async def _wrong_method(request: Request, error: Any) -> Response:
    reply = response_to(
        RequestError(f"{request.url.path[:200]} does not take {request.method}", status=405)
    )
    reply.headers.update(error.headers or {})  # Allow
    return reply


def build(app: App) -> Any:
    """The ASGI application."""
    table = [
        Way(PAGE, app.chat_page),
        Way("/health", app.health),
        Way("/ready", app.ready),
        Way("/metrics", app.show_metrics),
        Way("/v1/models", app.models),
        Way("/v1/models/{name:path}", app.model_card),
        Way("/v1/chat/completions", app.chat, asked.chat, CHAT),
        Way("/v1/completions", app.completions, asked.completions, COMPLETION),
        Way("/v1/responses", app.responses, responses.read, INPUT),
        Way("/v1/embeddings", app.embeddings, asked.embeddings, INPUT),
        Way("/tokenize", app.tokenize, asked.tokens, CHAT),
    ]

    async def openapi(_: Request) -> Response:
        """This document."""
        return JSONResponse(document(table, app.model, app.config, app.name))

    table.append(Way("/openapi.json", openapi))
    routes = [Route(way.path, _caught(app, way.answer), methods=[way.method]) for way in table]
    inner = Starlette(routes=routes, exception_handlers={404: _missing, 405: _wrong_method})
    return Guard(inner, app.config)
