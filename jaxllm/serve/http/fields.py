"""Reads the fields of a JSON object strictly: types, ranges, and no unknown names."""

from __future__ import annotations

import json
import math
from typing import Any

from jaxllm.core.config import nearest
from jaxllm.serve.http.errors import RequestError

__all__ = ["Described", "Fields", "parse_object"]

MAX_DEPTH = 64


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object of a request's body.

    Raises:
      RequestError: no JSON, no object, or nested too deeply.
    """
    try:
        value = json.loads(body.decode(), parse_constant=_refuse)
        if b"\\ud" in body.lower():  # half of a surrogate pair is no text
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeError:
        raise RequestError("the body is no JSON: its text is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is no JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise RequestError("the body must be a JSON object")
    _check_depth(value)
    return value


def _refuse(word: str) -> Any:
    raise ValueError(f"{word} is no JSON number")


def _check_depth(value: Any) -> None:
    """Refuse what is nested so deeply that later readers might recurse too far."""
    level = [value]
    for _ in range(MAX_DEPTH):
        children: list[Any] = []
        for item in level:
            children += item.values() if isinstance(item, dict) else item
        level = [item for item in children if isinstance(item, (dict, list))]
        if not level:
            return
    raise RequestError(f"the body is nested more than {MAX_DEPTH} deep")


class Described(Exception):
    """All questions about an object were asked; `Fields.document` says what they were."""


class Fields:
    """One object's fields, taken one by one; null stands for a field that is not there.

    What each question allows is on record as a JSON schema, so that the server's OpenAPI document
    says what is checked and nothing else.

    Args:
      given: the object.
      describe: end with `Described` when all questions were asked.
    """

    def __init__(self, given: dict[str, Any], *, describe: bool = False):
        self._given, self._describe = given, describe
        self._asked: dict[str, dict[str, Any]] = {}
        self._needed: set[str] = set()

    def _take(self, name: str, schema: dict[str, Any]) -> Any:
        self._asked[name] = schema
        return self._given.get(name)

    def raw(self, name: str, schema: dict[str, Any], *, needed: bool = False) -> Any:
        """A field that the caller checks: by no less than a JSON schema says."""
        value = self._take(name, schema)
        if needed:
            self._needed.add(name)
            if value is None:
                raise RequestError(f"{name} is missing", param=name)
        return value

    def text(self, name: str, *, most: int = 1024) -> str | None:
        """A string."""
        value = self._take(name, {"type": "string", "maxLength": most})
        if value is not None and not isinstance(value, str):
            raise RequestError(f"{name} must be a string", param=name)
        if value is not None and len(value) > most:
            raise RequestError(f"{name} has at most {most} characters", param=name)
        return value

    def flag(self, name: str) -> bool:
        """A boolean; false by default."""
        value = self._take(name, {"type": "boolean"})
        if value is not None and not isinstance(value, bool):
            raise RequestError(f"{name} must be true or false", param=name)
        return bool(value)

    def integer(self, name: str, low: int, high: int) -> int | None:
        """An integer within bounds."""
        value = self._take(name, {"type": "integer", "minimum": low, "maximum": high})
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise RequestError(f"{name} must be an integer", param=name)
        if value is not None and not low <= value <= high:
            raise RequestError(f"{name} is in {low}..{high}, found {value}", param=name)
        return value

    def number(self, name: str, low: int | float, high: int | float) -> float | None:
        """A number within bounds."""
        value = self._take(name, {"type": "number", "minimum": low, "maximum": high})
        if value is None:
            return None
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise RequestError(f"{name} must be a number", param=name)
        if not low <= value <= high or not math.isfinite(value):
            raise RequestError(f"{name} is in [{low}, {high}], found {value}", param=name)
        return float(value)

    def texts(self, name: str, most: int) -> tuple[str, ...]:
        """A string or a list of non-empty strings."""
        one = {"type": "string", "minLength": 1, "maxLength": 256}
        several = {"type": "array", "items": one, "maxItems": most}
        value = self._take(name, {"anyOf": [one, several]})
        value = [value] if isinstance(value, str) else [] if value is None else value
        fine = isinstance(value, list) and all(
            isinstance(x, str) and 0 < len(x) <= 256 for x in value
        )
        if not fine or len(value) > most:
            raise RequestError(
                f"{name} must be at most {most} strings of 1 to 256 characters", param=name
            )
        return tuple(value)

    def only(self, name: str, *allowed: Any) -> Any:
        """A field that is served with some values only."""
        value = self._take(name, {"enum": list(allowed)})
        if value is not None and not any(
            value == x and isinstance(value, bool) == isinstance(x, bool) for x in allowed
        ):
            shown = ", ".join(json.dumps(x) for x in allowed) or "left out"
            raise RequestError(f"{name} is served only as {shown}", param=name, code="unsupported")
        return value

    def close(self) -> None:
        """Refuse fields that nobody took."""
        if self._describe:
            raise Described
        for name in self._given:
            if name not in self._asked:
                hint = nearest(str(name)[:64], self._asked)
                raise RequestError(
                    f"unknown field {str(name)[:64]!r}; {hint}", param=str(name)[:64]
                )

    def document(self) -> dict[str, Any]:
        """JSON schema of the object: what was asked so far."""
        fields = self._asked.items()
        return {
            "type": "object",
            "properties": {n: s if n in self._needed else _or_null(s) for n, s in fields},
            "required": sorted(self._needed),
            "additionalProperties": False,
        }


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    """The same, or null."""
    if "enum" in schema:
        return {"enum": [*schema["enum"], None]}
    if isinstance(schema.get("type"), str):
        return {**schema, "type": [schema["type"], "null"]}
    return {"anyOf": [*schema.get("anyOf", [schema]), {"type": "null"}]} if schema else schema
