"""Frozen dataclasses to JSON and strictly back: an error for an unknown key names the nearest."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from jaxllm.errors import ConfigError

__all__ = ["check_new", "from_dict", "nearest", "require", "to_dict"]


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError(message)` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def check_new(dest: Path, wanted: str) -> None:
    """Refuse a place where something is already.

    Raises:
      ConfigError: it is there and no empty directory.
    """
    empty = not dest.exists() or (dest.is_dir() and not any(dest.iterdir()))
    require(empty, f"{dest} exists; give {wanted}")


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Text that names the nearest allowed word and then all of them."""
    names = sorted(allowed)
    close = difflib.get_close_matches(word, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}allowed: {', '.join(names)}"


def to_dict(value: Any) -> Any:
    """JSON-ready form of a value: a dataclass becomes an object, tagged by `kind` if it has one."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = getattr(value, "kind", None)
        tag = {} if kind is None else {"kind": kind}
        return tag | {
            f.name: to_dict(getattr(value, f.name))
            for f in dataclasses.fields(value)
            if getattr(value, f.name) != f.default
        }
    if isinstance(value, (tuple, list)):
        return [to_dict(v) for v in value]
    if isinstance(value, dict):
        return {k: to_dict(v) for k, v in value.items()}
    if callable(value):
        return f"{value.__module__}:{getattr(value, '__qualname__', type(value).__name__)}"
    return value


def from_dict(cls: Any, data: Any, where: str = "config") -> Any:
    """Build a value of annotation `cls` from JSON-ready data.

    Args:
      cls: a dataclass, `X | None`, a union of tagged dataclasses, `tuple[X, ...]` or a plain type.
      data: the JSON value.
      where: path shown in errors.

    Raises:
      ConfigError: an unknown key, a missing key or a value of the wrong type.
    """
    origin, args = typing.get_origin(cls), typing.get_args(cls)
    if origin in (typing.Union, types.UnionType):
        return _from_union(args, data, where)
    if origin is tuple:
        require(isinstance(data, (list, tuple)), f"{where}: expected a list, found {data!r}")
        kinds = [args[0]] * len(data) if args[-1] is Ellipsis else args
        require(len(kinds) == len(data), f"{where}: expected {len(kinds)} items, found {len(data)}")
        return tuple(
            from_dict(k, v, f"{where}[{i}]")
            for i, (k, v) in enumerate(zip(kinds, data, strict=True))
        )
    if origin is typing.Literal:
        require(data in args, f"{where}: {data!r} is not one of {', '.join(map(str, args))}")
        return data
    if origin is Callable:
        raise ConfigError(f"{where}: {data!r} is Python code, which JSON does not hold")
    if dataclasses.is_dataclass(cls):
        return _from_object(cls, data, where)
    return _from_plain(cls, data, where)


def _from_plain(cls: Any, data: Any, where: str) -> Any:
    if cls is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    wrong = not isinstance(data, cls) or (isinstance(data, bool) and cls is not bool)
    require(not wrong, f"{where}: expected {cls.__name__}, found {data!r}")
    return data


def _from_union(members: tuple[Any, ...], data: Any, where: str) -> Any:
    if data is None and type(None) in members:
        return None
    rest = [m for m in members if m is not type(None)]
    if len(rest) == 1:
        return from_dict(rest[0], data, where)
    tagged = {m.kind: m for m in rest if hasattr(m, "kind")}
    if tagged and isinstance(data, dict):
        kind = str(data.get("kind"))
        require(kind in tagged, f"{where}: unknown kind {kind!r}; {nearest(kind, tagged)}")
        return from_dict(tagged[kind], data, where)
    for member in rest:
        if member not in tagged.values() and isinstance(data, member):
            return data
    raise ConfigError(f"{where}: {data!r} fits none of {', '.join(m.__name__ for m in rest)}")


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _from_object(cls: Any, data: Any, where: str) -> Any:
    require(isinstance(data, dict), f"{where}: expected an object, found {data!r}")
    given = dict(data)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    tag = None if "kind" in fields else getattr(cls, "kind", None)
    if tag is not None:
        kind = given.pop("kind", tag)
        require(kind == tag, f"{where}: expected kind {tag!r}, found {kind!r}")
    for key in given:
        require(key in fields, f"{where}: unknown key {key!r}; {nearest(key, fields)}")
    for name, field in fields.items():
        optional = (
            field.default is not dataclasses.MISSING
            or field.default_factory is not dataclasses.MISSING
        )
        require(name in given or optional, f"{where}: missing key {name!r}")
    hints = _hints(cls)
    return cls(**{k: from_dict(hints[k], v, f"{where}.{k}") for k, v in given.items()})
