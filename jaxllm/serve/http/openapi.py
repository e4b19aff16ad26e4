"""The server's OpenAPI document, from the very questions that check a request.

Each reader of a request is asked what it asks (`Fields.document`): a field that it takes, and the
bounds that it holds the field to, are in the document, and nothing else can be.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jaxllm.serve.http.answering import Worded
from jaxllm.serve.http.config import ServerConfig
from jaxllm.serve.http.errors import KINDS
from jaxllm.serve.http.fields import Described, Fields
from jaxllm.serve.http.guard import OPEN, PAGE

__all__ = ["CHAT", "COMPLETION", "INPUT", "Way", "document"]

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}
COMPLETION: dict[str, Any] = {"prompt": [0, 1]}
INPUT: dict[str, Any] = {"input": "Hello"}


@dataclasses.dataclass(frozen=True)
class Way:
    """One route.

    Attributes:
      path: as Starlette writes it.
      answer: its handler; the first line of the docstring says what it does.
      read: what reads and checks its body, or None for a route without one.
      sample: a body with which the reader asks all its questions; the document's example.
    """

    path: str
    answer: Callable[..., Any]
    read: Callable[..., Any] | None = None
    sample: dict[str, Any] | None = None

    @property
    def method(self) -> str:
        """GET, or POST where there is a body."""
        return "GET" if self.read is None else "POST"


_TEXT = {"type": "string"}
_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": _TEXT,
                "type": {
                    "enum": sorted({*KINDS.values(), "server_error", "invalid_request_error"})
                },
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
            "additionalProperties": False,
        }
    },
    "required": ["error"],
    "additionalProperties": False,
}
_STREAMS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
_PAGES = {PAGE: "text/html", "/metrics": "text/plain"}
_ANSWERS = {
    "/health": {"status": {"const": "ok"}},
    "/ready": {"status": {"const": "ready"}},
    "/v1/models": {"object": {"const": "list"}, "data": {"type": "array"}},
    "/v1/models/{name}": {"id": _TEXT, "object": {"const": "model"}, "created": {}, "owned_by": {}},
    "/v1/chat/completions": {
        "id": _TEXT,
        "object": {"const": "chat.completion"},
        "created": {"type": "integer"},
        "model": _TEXT,
        "choices": {"type": "array", "minItems": 1},
        "usage": {"type": "object"},
    },
    "/v1/responses": {
        "id": _TEXT,
        "object": {"const": "response"},
        "status": {"enum": ["completed", "incomplete", "failed"]},
        "output": {"type": "array"},
        "usage": {"type": ["object", "null"]},
    },
    "/v1/embeddings": {"object": {"const": "list"}, "data": {"type": "array"}, "usage": {}},
    "/tokenize": {
        "tokens": {"type": "array", "items": {"type": "integer"}},
        "count": {"type": "integer"},
        "max_model_len": {"type": "integer"},
    },
    "/openapi.json": {"openapi": _TEXT, "paths": {"type": "object"}},
}
_ANSWERS["/v1/completions"] = _ANSWERS["/v1/chat/completions"] | {
    "object": {"const": "text_completion"}
}


_LINKS = {
    "/v1/models": {
        "card": {"operationId": "model_card", "parameters": {"name": "$response.body#/data/0/id"}}
    },
    "/tokenize": {
        "completion": {
            "operationId": "completions",
            "requestBody": {"prompt": "$response.body#/tokens", "max_tokens": 4},
        }
    },
}
"""What an answer is good for in another request."""


def document(
    table: Sequence[Way], model: Worded, config: ServerConfig, name: str
) -> dict[str, Any]:
    """OpenAPI 3.1 of a server.

    Args:
      table: its routes.
      model: that is served.
      config: its bounds.
      name: of the model, for clients.
    """
    paths: dict[str, Any] = {}
    for way in table:
        path = way.path.replace(":path", "")
        made: dict[str, Any] = {
            "summary": (way.answer.__doc__ or "").strip().partition("\n")[0],
            "operationId": way.answer.__name__,
            "responses": _replies(path, way),
        }
        if "{name}" in path:
            made["parameters"] = [
                {"name": "name", "in": "path", "required": True, "schema": _TEXT, "example": name}
            ]
        if way.read is not None:
            schema = _body(way, model, config)
            schema["properties"]["model"] = {"enum": [name, None]}
            content = {"application/json": {"schema": schema, "example": way.sample}}
            made["requestBody"] = {"required": True, "content": content}
        if config.api_keys and path not in OPEN:
            made["security"] = [{"key": []}, *([{"password": []}] if path == PAGE else [])]
        paths[path] = {way.method.lower(): made}
    schemes = {
        "key": {"type": "http", "scheme": "bearer"},
        "password": {"type": "http", "scheme": "basic", "description": "the key, any user name"},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "jaxllm", "version": "1"},
        "paths": paths,
        "components": {"schemas": {"Error": _ERROR}, "securitySchemes": schemes},
    }


def _body(way: Way, model: Worded, config: ServerConfig) -> dict[str, Any]:
    assert way.read is not None and way.sample is not None
    fields = Fields(way.sample, describe=True)
    with contextlib.suppress(Described):
        way.read(fields, model, config)
        raise AssertionError(f"the reader of {way.path} never closes its fields")
    return fields.document()


def _replies(path: str, way: Way) -> dict[str, Any]:
    """What may come back; errors have one shape."""
    if path in _PAGES:
        content: dict[str, Any] = {_PAGES[path]: {"schema": _TEXT}}
    else:
        fields = _ANSWERS[path]
        schema = {"type": "object", "properties": fields, "required": sorted(fields)}
        content = {"application/json": {"schema": schema}}
    if path in _STREAMS:
        event = {"type": "object", "properties": {"data": _TEXT}, "required": ["data"]}
        content["text/event-stream"] = {"schema": event}
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    wrong = {"400": "wrong, unknown or unserved fields"} if way.read is not None else {}
    wrong |= {
        "401": "no key, or a wrong one",
        "403": "a page of another origin asks a server without a key",
        "404": "no such model or route",
        "413": "the body is too large",
        "429": "too many requests wait, or of this client at once; see Retry-After",
        "431": "the headers are too large",
        "503": "shutting down, or the engine died; see Retry-After",
    }
    replies = {code: {"description": why, "content": error} for code, why in wrong.items()}
    fine = {"description": "the answer", "content": content}
    if path in _LINKS:
        fine["links"] = _LINKS[path]
    return {"200": fine, **replies}
