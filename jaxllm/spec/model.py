"""ModelSpec: what a model is, as hashable data with JSON both ways."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

from jaxllm.core.config import from_dict, nearest, require, to_dict
from jaxllm.core.tree import Segment
from jaxllm.errors import ConfigError
from jaxllm.spec.ops import Norm, Op
from jaxllm.spec.pattern import Pattern, parse

__all__ = ["Block", "Embedding", "Head", "ModelSpec", "NamedOp", "Sub", "sub"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NamedOp:
    """An op, the name its parameters stand under, and factors on its input and output."""

    name: str
    op: Op
    scale_in: float = 1.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        require(self.name.isidentifier(), f"op name {self.name!r} is no identifier")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sub:
    """One residual update: x <- after(x + scale * out(sum of ops(in(x)))).

    Several ops run in parallel on one input, each with factors of its own. Pre-LN sets `norm_in`,
    output-only `norm_out`, sandwich both, post-LN `norm_after`.
    """

    ops: tuple[NamedOp, ...]
    norm_in: Norm | None = None
    norm_out: Norm | None = None
    norm_after: Norm | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        require(len(self.ops) >= 1, "sub: needs at least one op")

    @property
    def name(self) -> str:
        """Name of the first op; the norms stand under `<name>_norm`, `_out_norm`, `_after_norm`."""
        return self.ops[0].name

    @property
    def norms(self) -> dict[str, Norm]:
        """The norms present, by the name of their parameters."""
        named = {"norm": self.norm_in, "out_norm": self.norm_out, "after_norm": self.norm_after}
        return {f"{self.name}_{key}": norm for key, norm in named.items() if norm is not None}


def sub(name: str, op: Op, **norms: Any) -> Sub:
    """A residual update of one op."""
    return Sub(ops=(NamedOp(name=name, op=op),), **norms)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """A named layer kind: residual updates in order."""

    name: str
    subs: tuple[Sub, ...]

    def __post_init__(self) -> None:
        names = [n for s in self.subs for n in (*(o.name for o in s.ops), *s.norms)]
        double = sorted({n for n in names if names.count(n) > 1})
        require(not double, f"block {self.name!r}: names used twice: {', '.join(double)}")
        require(len(self.subs) >= 1, f"block {self.name!r}: needs at least one sub")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Embedding:
    """Token embedding; rows are multiplied by `scale`.

    With `positions` a learned row a position is added: a table of so many rows.
    """

    scale: float = 1.0
    positions: int | None = None

    def __post_init__(self) -> None:
        require(
            self.positions is None or self.positions >= 1,
            f"embedding: positions is positive, found {self.positions}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Head:
    """From hidden states to logits: tied to the embedding or with a matrix of its own."""

    tied: bool = False
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        require(self.softcap is None or self.softcap > 0, "head: softcap is positive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A decoder: vocabulary, width, named blocks, and the pattern in which layers use them."""

    vocab: int
    width: int
    blocks: tuple[Block, ...]
    layers: str
    context: int
    embedding: Embedding = Embedding()
    final_norm: Norm | None = None
    head: Head = Head()

    def __post_init__(self) -> None:
        require(
            min(self.vocab, self.width, self.context) >= 1,
            f"spec: vocab {self.vocab}, width {self.width} and context {self.context} are positive",
        )
        learned = self.embedding.positions
        require(
            learned is None or learned >= self.context,
            f"spec: context {self.context} is over the {learned} learned positions",
        )
        names = [b.name for b in self.blocks]
        require(len(set(names)) == len(names), f"spec: block names used twice in {names}")
        for name in sorted(set(self.pattern.names)):
            require(name in names, f"layers: unknown block {name!r}; {nearest(name, names)}")

    @functools.cached_property
    def pattern(self) -> Pattern:
        """The parsed layer pattern."""
        return parse(self.layers)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The canonical segmentation: one stacked segment for each repeat of the pattern."""
        return self.pattern.segments

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.pattern.names)

    @property
    def follows_length(self) -> bool:
        """Whether tokens are rotated by how long their sequence is: padding would count."""
        ropes = [getattr(o.op, "rope", None) for b in self.blocks for s in b.subs for o in s.ops]
        return any(rope is not None and rope.follows_length for rope in ropes)

    def block(self, layer: int) -> Block:
        """The block that a layer uses."""
        name = self.pattern.names[layer]
        return next(b for b in self.blocks if b.name == name)

    def to_json(self) -> str:
        """JSON text; `from_json` gives back an equal spec."""
        return json.dumps(to_dict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> ModelSpec:
        """Read a spec strictly.

        Raises:
          ConfigError: no JSON, an unknown or missing key, a contradiction.
        """
        try:
            return from_dict(ModelSpec, json.loads(text), "spec")
        except json.JSONDecodeError as error:
            raise ConfigError(f"spec: no JSON: {error}") from None
        except RecursionError:
            raise ConfigError("spec: its JSON is nested too deeply") from None
