"""Masks as a small algebra: which key positions a query position may attend to.

One declaration gives the dense oracle, the kernel's block map and the size of the cache.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Union

from jaxllm.core.config import require

__all__ = ["And", "Causal", "Chunk", "Full", "Mask", "Or", "Window", "allowed", "reach"]


@dataclasses.dataclass(frozen=True)
class Causal:
    """Keys at or before the query."""

    kind: ClassVar[str] = "causal"


@dataclasses.dataclass(frozen=True)
class Full:
    """All keys."""

    kind: ClassVar[str] = "full"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window:
    """Keys at most `left` positions before and `right` after the query."""

    kind: ClassVar[str] = "window"
    left: int
    right: int = 0

    def __post_init__(self) -> None:
        require(self.left >= 0 and self.right >= 0, f"window: left and right are ≥ 0, found {self}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """Keys of the query's own chunk: positions are cut into chunks of `size`."""

    kind: ClassVar[str] = "chunk"
    size: int

    def __post_init__(self) -> None:
        require(self.size >= 1, f"chunk: size is positive, found {self.size}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class And:
    """Keys that both masks admit."""

    kind: ClassVar[str] = "and"
    first: Mask
    second: Mask


@dataclasses.dataclass(frozen=True, kw_only=True)
class Or:
    """Keys that either mask admits."""

    kind: ClassVar[str] = "or"
    first: Mask
    second: Mask


Mask = Union[Causal, Full, Window, Chunk, And, Or]  # noqa: UP007 - a forward reference needs Union


def allowed(mask: Mask, query: Any, key: Any) -> Any:
    """Whether a query position may attend to a key position; broadcasts over integer arrays.

    Args:
      mask: the declared mask.
      query: integer positions of queries, for example [B, T, 1].
      key: integer positions of keys, for example [B, 1, S].

    Returns:
      Booleans of the broadcast shape.
    """
    if isinstance(mask, Causal):
        return key <= query
    if isinstance(mask, Full):
        return (key == key) & (query == query)
    if isinstance(mask, Window):
        return (query - key <= mask.left) & (key - query <= mask.right)
    if isinstance(mask, Chunk):
        return query // mask.size == key // mask.size
    first, second = allowed(mask.first, query, key), allowed(mask.second, query, key)
    return first & second if isinstance(mask, And) else first | second


def reach(mask: Mask) -> tuple[int | None, int | None]:
    """How far a query sees to the left and to the right; None is without bound."""
    if isinstance(mask, Causal):
        return None, 0
    if isinstance(mask, Full):
        return None, None
    if isinstance(mask, Window):
        return mask.left, mask.right
    if isinstance(mask, Chunk):
        return mask.size - 1, mask.size - 1
    pairs = tuple(zip(reach(mask.first), reach(mask.second), strict=True))
    if isinstance(mask, And):
        left, right = (min((r for r in p if r is not None), default=None) for p in pairs)
    else:
        left, right = (None if a is None or b is None else max(a, b) for a, b in pairs)
    return left, right
