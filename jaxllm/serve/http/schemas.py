"""JSON schemas of the fields that have a shape of their own, beside what checks them."""

from __future__ import annotations

from typing import Any

__all__ = [
    "ANY",
    "FORMAT",
    "MAX_TOKEN",
    "MAX_TOOLS",
    "OBJECT",
    "SCHEMA",
    "STREAM_OPTIONS",
    "STRUCTURED",
    "TEXT_FORMAT",
    "TOOLS",
    "TOOL_CHOICE",
    "bias",
    "items",
    "messages",
    "rows",
    "token_ids",
]

MAX_TOKEN = 2**31 - 1
"""No vocabulary is larger."""
MAX_TOOLS = 128
ANY: dict[str, Any] = {}
OBJECT = {"type": "object"}
SCHEMA = {"type": "object", "description": "a JSON schema"}
_TEXT = {"type": "string"}
_TEXT_OR_NULL = {"type": ["string", "null"]}
_FLAG_OR_NULL = {"type": ["boolean", "null"]}
STREAM_OPTIONS = {
    "type": "object",
    "properties": {"include_usage": _FLAG_OR_NULL},
    "additionalProperties": False,
}
_NAMED = {
    "name": {"type": ["string", "null"], "maxLength": 64},
    "description": {"type": ["string", "null"], "maxLength": 4096},
    "strict": _FLAG_OR_NULL,
    "schema": SCHEMA,
}


def _closed(properties: dict[str, Any], *needed: str) -> dict[str, Any]:
    """An object with these fields and no other."""
    out = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**out, "required": list(needed)} if needed else out


_PLAIN_FORMAT = _closed(
    {"type": {"enum": ["text", "json_object"]}, "json_schema": {"type": "null"}}, "type"
)
FORMAT = {
    "anyOf": [
        _PLAIN_FORMAT,
        _closed(
            {"type": {"const": "json_schema"}, "json_schema": _closed(_NAMED, "schema")},
            "type",
            "json_schema",
        ),
    ]
}
TEXT_FORMAT = _closed(
    {
        "format": {
            "anyOf": [
                _PLAIN_FORMAT,
                _closed({"type": {"const": "json_schema"}, **_NAMED}, "type", "schema"),
                {"type": "null"},
            ]
        },
        "verbosity": {"enum": ["medium", None]},
    }
)
STRUCTURED = _closed({"json": ANY, "regex": ANY, "choice": ANY})
_FUNCTION = {
    "name": {"type": "string", "pattern": "^[a-zA-Z0-9_.-]{1,64}$"},
    "description": {"type": ["string", "null"], "maxLength": 1 << 14},
    "parameters": {"type": ["object", "null"]},
    "strict": _FLAG_OR_NULL,
}
_KIND = {"type": {"const": "function"}}
TOOLS = {
    "type": "array",
    "maxItems": MAX_TOOLS,
    "items": {
        "anyOf": [
            {
                "type": "object",
                "properties": {**_KIND, "function": _closed(_FUNCTION, "name")},
                "required": ["type", "function"],
            },
            _closed({**_KIND, **_FUNCTION}, "type", "name"),
        ]
    },
}
TOOL_CHOICE = {"anyOf": [{"enum": ["none", "auto", "required"]}, OBJECT]}
_PART = {"type": "object", "properties": {"type": _TEXT}, "required": ["type"]}
_MESSAGE = {
    "type": "object",
    "properties": {
        "role": {"type": "string", "minLength": 1},
        "content": {"anyOf": [_TEXT_OR_NULL, {"type": "array", "items": _PART}]},
    },
    "required": ["role"],
}
_ITEM_PARTS = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"type": {"enum": ["input_text", "output_text", "text"]}, "text": _TEXT},
        "required": ["type", "text"],
    },
}
_ITEM_TEXT = {"anyOf": [_TEXT, _ITEM_PARTS]}
_ITEM = {
    "anyOf": [
        {
            "type": "object",
            "properties": {
                "type": {"const": "message"},
                "role": {"enum": ["user", "assistant", "system", "developer"]},
                "content": _ITEM_TEXT,
            },
            "required": ["role", "content"],
        },
        {
            "type": "object",
            "properties": {"type": {"const": "function_call"}, "name": _TEXT},
            "required": ["type", "name"],
        },
        {
            "type": "object",
            "properties": {"type": {"const": "function_call_output"}, "output": _ITEM_TEXT},
            "required": ["type", "output"],
        },
    ]
}


def messages(most: int) -> dict[str, Any]:
    """Of a chat."""
    return {"type": "array", "minItems": 1, "maxItems": most, "items": _MESSAGE}


def items(most: int) -> dict[str, Any]:
    """The input of a response."""
    several = {"type": "array", "minItems": 1, "maxItems": most, "items": _ITEM}
    return {"anyOf": [_TEXT, several]}


def token_ids(most: int) -> dict[str, Any]:
    """A list of tokens."""
    token = {"type": "integer", "minimum": 0, "maximum": MAX_TOKEN}
    return {"type": "array", "maxItems": most, "items": token}


def rows(most: int, tokens: int) -> dict[str, Any]:
    """A text, token ids, or several of either."""
    ids = token_ids(tokens)
    several = {"type": "array", "minItems": 1, "maxItems": most, "items": {"anyOf": [_TEXT, ids]}}
    return {"anyOf": [_TEXT, ids | {"minItems": 1}, several]}


def bias(most: int) -> dict[str, Any]:
    """Token ids and what is added to their logits."""
    return {
        "type": "object",
        "maxProperties": most,
        "propertyNames": {"pattern": "^[0-9]{1,9}$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    }
