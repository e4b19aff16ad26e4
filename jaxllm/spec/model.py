"""ModelSpec: what a model is, as hashable data with JSON both ways."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from typing import Literal

from jaxllm.core.config import from_dict, nearest, require, to_dict
from jaxllm.core.tree import Segment
from jaxllm.errors import ConfigError
from jaxllm.spec.block import Block, NamedOp, Sub, sub
from jaxllm.spec.mask import Blocks, Mask, decodes, draws, parts
from jaxllm.spec.ops import (
    Activation,
    Attention,
    InfiniAttention,
    LatentAttention,
    Memory,
    Norm,
    Op,
)
from jaxllm.spec.pattern import Pattern, parse

__all__ = [
    "Block",
    "Embedding",
    "Head",
    "ModelSpec",
    "NamedOp",
    "Pooling",
    "Sub",
    "Transform",
    "sub",
]


_ATTENTIONS = (Attention, LatentAttention, InfiniAttention)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Embedding:
    """Token embedding; rows are multiplied by `scale`.

    Attributes:
      scale: of the rows of tokens.
      positions: rows of a table of learned positions, of which one is added a token.
      position_offset: row of position 0; the rows before it stand for padding.
      types: rows of a table of token types, of which one is added (`Inputs.types`, else row 0).
      norm: of the sum.
    """

    scale: float = 1.0
    positions: int | None = None
    position_offset: int = 0
    types: int | None = None
    norm: Norm | None = None

    def __post_init__(self) -> None:
        for name in ("positions", "types"):
            rows = getattr(self, name)
            require(rows is None or rows >= 1, f"embedding: {name} is positive, found {rows}")
        require(
            self.position_offset >= 0,
            f"embedding: position_offset is ≥ 0, found {self.position_offset}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transform:
    """What a head does before the logits: norm(act(x W + b)), as BERT's."""

    norm: Norm
    activation: Activation = "gelu"
    bias: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pooling:
    """From the hidden states of a text to one vector.

    Attributes:
      by: the mean over its tokens, that of the first token (`cls`), or of the last.
      normalize: whether the vector is scaled to length 1.
      max_tokens: texts are cut to so many tokens, or to the model's context.
    """

    by: Literal["mean", "cls", "last"] = "mean"
    normalize: bool = False
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        require(
            self.max_tokens is None or self.max_tokens >= 1,
            f"pooling: max_tokens is positive, found {self.max_tokens}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Head:
    """From hidden states to logits: tied to the embedding or with a matrix of its own.

    Attributes:
      tied: whether the embedding's table is the matrix.
      scale: of the logits.
      softcap: logits become softcap * tanh(logits / softcap).
      bias: of the logits.
      transform: of the hidden states before the matrix.
      logits: False for a body without a head.
      pooling: of `Model.embed`.
    """

    tied: bool = False
    scale: float = 1.0
    softcap: float | None = None
    bias: bool = False
    transform: Transform | None = None
    logits: bool = True
    pooling: Pooling | None = None

    def __post_init__(self) -> None:
        require(self.softcap is None or self.softcap > 0, "head: softcap is positive")
        require(
            self.logits or not (self.tied or self.bias or self.transform),
            "head: without logits it is not tied and has neither bias nor transform",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A decoder or encoder: vocabulary, width, named blocks, and the pattern of its layers."""

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
            learned is None or learned >= self.context + self.embedding.position_offset,
            f"spec: context {self.context} is over the {learned} learned positions, of which "
            f"{self.embedding.position_offset} come before the first",
        )
        names = [b.name for b in self.blocks]
        require(len(set(names)) == len(names), f"spec: block names used twice in {names}")
        self._check_shared()
        self._check_subs()
        for name in sorted(set(self.pattern.names)):
            require(name in names, f"layers: unknown block {name!r}; {nearest(name, names)}")

    @property
    def subs(self) -> tuple[Sub, ...]:
        """The residual updates of all blocks, in their order."""
        return tuple(part for block in self.blocks for part in block.subs)

    @property
    def ops(self) -> tuple[Op, ...]:
        """The ops of all blocks, in their order."""
        return tuple(named.op for part in self.subs for named in part.ops)

    @functools.cached_property
    def shared(self) -> dict[str, Memory]:
        """Name of each table that several layers may share -> the first op that reads it."""
        named = [
            (op.share, op) for op in self.ops if isinstance(op, Memory) and op.share is not None
        ]
        return dict(reversed(named))

    @functools.cached_property
    def shared_subs(self) -> dict[str, dict[str, Sub]]:
        """Name of parameters that several layers read -> the updates that do, by their names."""
        found: dict[str, dict[str, Sub]] = {}
        for part in self.subs:
            if part.share is not None:
                found.setdefault(part.share, {}).setdefault(part.name, part)
        return found

    @property
    def reads_embedding(self) -> bool:
        """Whether a layer reads the embedding beside what passes from layer to layer."""
        return any(part.reads == "embedded" for part in self.subs)

    def _check_subs(self) -> None:
        for part in self.subs:
            widths = {getattr(o.op, "out_width", None) for o in part.ops} - {None, self.width}
            require(not widths, f"spec: out_width is the width {self.width}, found {widths}")
            if part.share is not None:
                require(
                    part == self.shared_subs[part.share][part.name],
                    f"spec: updates {part.name!r} that share {part.share!r} are not alike",
                )
        both = sorted(self.shared.keys() & self.shared_subs.keys())
        require(not both, f"spec: shared by memories and by updates: {', '.join(both)}")

    def _check_shared(self) -> None:
        for op in self.ops:
            if isinstance(op, Memory) and op.share is not None:
                first = self.shared[op.share]
                require(
                    (op.keys, op.value_dim) == (first.keys, first.value_dim),
                    f"spec: memories that share {op.share!r} have tables of unlike sizes, "
                    f"{first.keys}^2 x {first.value_dim} and {op.keys}^2 x {op.value_dim}",
                )

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
    def has_slots(self) -> bool:
        """Whether a layer remembers token by token, so that its state grows with the text."""
        ops = [o.op for b in self.blocks for s in b.subs for o in s.ops]
        return any(isinstance(op, _ATTENTIONS) for op in ops)

    @property
    def follows_length(self) -> bool:
        """Whether tokens are rotated by how long their sequence is: padding would count."""
        ropes = [getattr(o.op, "rope", None) for b in self.blocks for s in b.subs for o in s.ops]
        return any(rope is not None and rope.follows_length for rope in ropes)

    @functools.cached_property
    def masks(self) -> tuple[Mask, ...]:
        """Masks of the attentions, each once."""
        ops = [o.op for b in self.blocks for s in b.subs for o in s.ops]
        return tuple(dict.fromkeys(op.mask for op in ops if isinstance(op, _ATTENTIONS)))

    @property
    def decodes(self) -> bool:
        """Whether it can generate: no token sees a later one. False for an encoder."""
        return all(decodes(mask) for mask in self.masks)

    @property
    def length_unit(self) -> int | None:
        """Tokens of which a row's length must be a multiple where masks look at its end, or None.

        Padding up to more than the next multiple would change what such a mask admits.
        """
        sizes = []
        for mask in self.masks:
            blocks = [p for p in parts(mask) if isinstance(p, Blocks)]
            if draws(mask) or any(getattr(p, "last", 0) for p in parts(mask)):
                sizes.append(math.lcm(*(b.size for b in blocks)) if blocks else 1)
        return math.lcm(*sizes) if sizes else None

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
