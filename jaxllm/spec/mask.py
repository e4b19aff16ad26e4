"""Masks as a small algebra: which key positions a query position may attend to.

One declaration gives the dense oracle, the kernel's block map and the size of the cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Union

import numpy as np

from jaxllm.core.config import require
from jaxllm.spec.draw import drawn_units

__all__ = [
    "And",
    "Blocks",
    "Causal",
    "Chunk",
    "Full",
    "Global",
    "Mask",
    "Or",
    "Prefix",
    "Random",
    "Row",
    "Window",
    "allowed",
    "decodes",
    "draws",
    "parts",
    "reach",
]


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
class Global:
    """Pairs of which the query or the key is global: it sees all and is seen by all.

    Global are the `first` and `last` positions of a row. With neither, it is the tokens that the
    step marks (`Step.marks`), and none where it marks none. Source: arXiv 2004.05150.
    """

    kind: ClassVar[str] = "global"
    first: int = 0
    last: int = 0

    def __post_init__(self) -> None:
        require(self.first >= 0 and self.last >= 0, f"global: first and last are ≥ 0, found {self}")

    @property
    def marked(self) -> bool:
        """Whether the step says which tokens are global."""
        return self.first == 0 and self.last == 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefix:
    """Pairs of which both stand in the prefix: the `first` positions, or the marked tokens if 0.

    `Or(Causal, Prefix)` is a prefix language model; its prefix must come in one piece.
    """

    kind: ClassVar[str] = "prefix"
    first: int = 0

    def __post_init__(self) -> None:
        require(self.first >= 0, f"prefix: first is ≥ 0, found {self.first}")

    @property
    def marked(self) -> bool:
        """Whether the step says which tokens are of the prefix."""
        return self.first == 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Random:
    """`count` keys drawn for each query and each head, by seed and length of the row.

    Meant for `Blocks`. They are drawn from the first 2 count + 5 units without the ends of these
    and the query's neighbours; a row of at most 2 count + 5 units is seen whole. The draws are
    those of the public BigBird code in training. Source: arXiv 2007.14062.
    """

    kind: ClassVar[str] = "random"
    count: int
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.count >= 1, f"random: count is positive, found {self.count}")
        require(0 <= self.seed < 2**32, f"random: seed is in 0..2^32 - 1, found {self.seed}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """A mask over blocks of `size` positions: `mask` decides by the numbers of the blocks."""

    kind: ClassVar[str] = "blocks"
    size: int
    mask: Mask

    def __post_init__(self) -> None:
        require(self.size >= 1, f"blocks: size is positive, found {self.size}")
        marked = any(getattr(part, "marked", False) for part in parts(self.mask))
        require(not marked, "blocks: marks are on tokens; give `first` or `last`, in blocks")


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


Mask = Union[  # noqa: UP007 - a forward reference needs Union
    Causal, Full, Window, Chunk, Global, Prefix, Random, Blocks, And, Or
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What a mask may need to know beside two positions.

    Attributes:
      length: positions in the row, padding included; of blocks where the mask is over blocks.
      head: integer numbers of the heads, to broadcast with the positions; for `Random`.
      heads: N.
      marks: (query, key) booleans that broadcast with the positions, or None where none is marked.
      constant: makes a table of numpy one of the caller's arrays.
    """

    length: int | None = None
    head: Any = None
    heads: int | None = None
    marks: tuple[Any, Any] | None = None
    constant: Callable[[np.ndarray], Any] = np.asarray


def allowed(mask: Mask, query: Any, key: Any, row: Row = Row()) -> Any:
    """Whether a query position may attend to a key position; broadcasts over integer arrays.

    Args:
      mask: the declared mask.
      query: integer positions of queries, for example [B, T, 1].
      key: integer positions of keys, for example [B, 1, S].
      row: what masks need that look at ends, marks or draws.

    Returns:
      Booleans of the broadcast shape.
    """
    match mask:
        case Causal():
            return key <= query
        case Full():
            return (key == key) & (query == query)
        case Window():
            return (query - key <= mask.left) & (key - query <= mask.right)
        case Chunk():
            return query // mask.size == key // mask.size
        case Blocks(size=size):
            length = None if row.length is None else -(-row.length // size)
            row = dataclasses.replace(row, length=length)
            return allowed(mask.mask, query // size, key // size, row)
        case Random():
            require(row.length is not None and row.heads is not None, "random masks need the row")
            table = drawn_units(mask.count, mask.seed, row.heads or 0, row.length or 0)
            return row.constant(table)[row.head, query, key]
        case Global() | Prefix():
            first, second = _special(mask, query, key, row)
            return first | second if isinstance(mask, Global) else first & second
        case And():
            return allowed(mask.first, query, key, row) & allowed(mask.second, query, key, row)
        case Or():
            return allowed(mask.first, query, key, row) | allowed(mask.second, query, key, row)


def _special(mask: Global | Prefix, query: Any, key: Any, row: Row) -> tuple[Any, Any]:
    """Whether the query and the key are global, or in the prefix."""
    if mask.marked:
        none = (query < 0) & (key < 0)
        return (none, none) if row.marks is None else row.marks
    last = getattr(mask, "last", 0)
    if not last:
        return query < mask.first, key < mask.first
    require(row.length is not None, "a mask with global positions at the end needs the row")
    end = (row.length or 0) - last
    return (query < mask.first) | (query >= end), (key < mask.first) | (key >= end)


def parts(mask: Mask) -> Iterator[Mask]:
    """The mask and all that it is made of."""
    yield mask
    match mask:
        case And() | Or():
            yield from parts(mask.first)
            yield from parts(mask.second)
        case Blocks():
            yield from parts(mask.mask)


def draws(mask: Mask) -> bool:
    """Whether each head has a mask of its own."""
    return any(isinstance(part, Random) for part in parts(mask))


def decodes(mask: Mask) -> bool:
    """Whether tokens may be appended one by one: no token sees one that comes after its prefix."""
    match mask:
        case Causal() | Prefix():
            return True
        case Window():
            return mask.right == 0
        case And():
            return decodes(mask.first) or decodes(mask.second)
        case Or():
            return decodes(mask.first) and decodes(mask.second)
    return False


def reach(mask: Mask) -> tuple[int | None, int | None]:
    """How far a query sees to the left and to the right; None is without bound."""
    match mask:
        case Causal():
            return None, 0
        case Window():
            return mask.left, mask.right
        case Chunk():
            return mask.size - 1, mask.size - 1
        case Prefix() if mask.first:
            return mask.first - 1, mask.first - 1
        case Blocks():
            left, right = (
                None if side is None else (side + 1) * mask.size - 1 for side in reach(mask.mask)
            )
            return left, right
        case And() | Or():
            pairs = tuple(zip(reach(mask.first), reach(mask.second), strict=True))
            if isinstance(mask, And):
                left, right = (min((r for r in p if r is not None), default=None) for p in pairs)
            else:
                left, right = (None if a is None or b is None else max(a, b) for a, b in pairs)
            return left, right
    return None, None
