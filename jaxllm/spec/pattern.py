"""Layer patterns: text such as `(L*5 G)*5 L*4` to block names and to segments.

Every repeated top-level item becomes one stacked segment: the repeat is the scan.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence

from jaxllm.core.tree import Segment
from jaxllm.errors import ConfigError

__all__ = ["Pattern", "compress", "parse"]

_TOKEN = re.compile(r"\s*(?:([A-Za-z_][A-Za-z0-9_]*)|\*\s*(\d+)|([()]))")
_MAX_LAYERS = 10_000
_MAX_DEPTH = 20
_MAX_UNIT = 24  # layers of a repeated unit that `compress` looks for


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Block names of all layers in order, and how they are stacked."""

    names: tuple[str, ...]
    segments: tuple[Segment, ...]


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:80] + "…")


def _tokens(text: str) -> list[tuple[str, str]]:
    out, position = [], 0
    stripped = text.rstrip()
    while position < len(stripped):
        match = _TOKEN.match(stripped, position)
        if match is None:
            raise ConfigError(
                f"layers {_shown(text)}: unexpected {stripped[position:].strip()[0]!r}; "
                "write block names, *n and parentheses, for example '(L*5 G)*5 L*4'"
            )
        kind = ("name", "times", "paren")[match.lastindex - 1 if match.lastindex else 0]
        out.append((kind, match.group(match.lastindex or 0)))
        position = match.end()
    return out


def _items(tokens: list[tuple[str, str]], text: str, depth: int) -> list[tuple[list[str], int]]:
    items: list[tuple[list[str], int]] = []
    while tokens:
        kind, value = tokens.pop(0)
        if value == ")" and kind == "paren":
            if depth == 0:
                raise ConfigError(f"layers {_shown(text)}: ')' without '('")
            return items
        if kind == "times":
            raise ConfigError(f"layers {_shown(text)}: '*{value[:9]}' follows no block")
        if kind == "paren" and depth == _MAX_DEPTH:
            raise ConfigError(f"layers {_shown(text)}: more than {_MAX_DEPTH} nested groups")
        inner = [value] if kind == "name" else _expand(_items(tokens, text, depth + 1), text)
        times = 1
        if tokens and tokens[0][0] == "times":
            digits = tokens.pop(0)[1]
            times = int(digits) if len(digits) < 9 else _MAX_LAYERS + 1
        if not inner or not 1 <= times <= _MAX_LAYERS or len(inner) * times > _MAX_LAYERS:
            raise ConfigError(f"layers {_shown(text)}: a repeat gives 1 to {_MAX_LAYERS} layers")
        items.append((inner, times))
    if depth:
        raise ConfigError(f"layers {_shown(text)}: '(' without ')'")
    return items


def _expand(items: list[tuple[list[str], int]], text: str) -> list[str]:
    names = [name for inner, times in items for _ in range(times) for name in inner]
    if len(names) > _MAX_LAYERS:
        raise ConfigError(f"layers {_shown(text)}: more than {_MAX_LAYERS} layers")
    return names


def parse(text: str) -> Pattern:
    """Parse a pattern text.

    Args:
      text: block names separated by blanks, `*n` for repeats, parentheses for groups.

    Returns:
      All block names in order, and one segment for each top-level item.

    Raises:
      ConfigError: the text is empty or malformed.
    """
    items = _items(_tokens(text), text, 0)
    if not items:
        raise ConfigError("layers: the pattern is empty; write for example 'G*12'")
    segments: list[Segment] = []
    start = 0
    for inner, times in items:
        if times == 1:
            segments += [Segment(start + i, start + i + 1, 1, False) for i in range(len(inner))]
        else:
            segments.append(Segment(start, start + times * len(inner), len(inner)))
        start += times * len(inner)
    return Pattern(tuple(_expand(items, text)), tuple(segments))


def compress(names: Sequence[str]) -> str:
    """The pattern of a list of block names that compiles the fewest layers, in the fewest items.

    Args:
      names: of all layers in order.

    Returns:
      Text that `parse` expands to the names: `(L*5 G)*5 L*4` for 34 layers of which every sixth is
      G.

    Raises:
      ConfigError: there is no layer, or more than 10000.
    """
    if not 1 <= len(names) <= _MAX_LAYERS:
        raise ConfigError(f"layers: a model has 1 to {_MAX_LAYERS} layers, found {len(names)}")
    # costs[i]: of the layers from i on, the least number of layers and items in their text.
    end = len(names)
    costs, best = [0] * (end + 1), [("", end)] * (end + 1)
    for start in reversed(range(end)):
        found = []
        for unit in range(1, min(_MAX_UNIT, end - start) + 1):
            stop = start + unit
            while stop <= end and names[stop - unit : stop] == names[start : start + unit]:
                if unit == 1 or stop > start + unit:  # a longer unit has to repeat
                    found.append((costs[stop] + unit + 1, -stop, unit))
                stop += unit
        costs[start], stop, unit = min(found)  # of equals the one that takes most layers
        best[start] = _item(names[start : start + unit], (-stop - start) // unit), -stop
    out, start = [], 0
    while start < end:
        text, start = best[start]
        out.append(text)
    return " ".join(out)


def _item(unit: Sequence[str], times: int) -> str:
    runs = [(name, len(list(same))) for name, same in itertools.groupby(unit)]
    text = " ".join(name if count == 1 else f"{name}*{count}" for name, count in runs)
    if times == 1:
        return text
    return f"{text}*{times}" if len(unit) == 1 else f"({text})*{times}"
