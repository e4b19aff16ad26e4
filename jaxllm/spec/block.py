"""Blocks: residual updates in order, each of one op or of several side by side, between norms."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from jaxllm.core.config import require
from jaxllm.spec.ops import Memory, MoE, Norm, Op

__all__ = ["Block", "NamedOp", "Sub", "sub"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NamedOp:
    """An op, the name its parameters stand under, and factors on its input and output.

    `norm_in` is for ops side by side that have a norm each; it stands under `<name>_norm`.
    """

    name: str
    op: Op
    norm_in: Norm | None = None
    scale_in: float = 1.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        require(self.name.isidentifier(), f"op name {self.name!r} is no identifier")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sub:
    """One residual update: x <- after(skip_scale * x + scale * out(sum of ops(in(x)))).

    Several ops run in parallel on one input, each with factors of its own, or with a norm too.
    Pre-LN sets `norm_in`, output-only `norm_out`, sandwich both, post-LN `norm_after`.

    Attributes:
      ops: in parallel.
      norm_in: before the ops.
      norm_out: of their sum.
      norm_after: of x with the update.
      scale: of the update.
      skip_scale: of what goes past the ops.
      skip_normed: what goes past them is in(x) too (arXiv 2501.08313).
      reads: what the ops see: x (`hidden`); it and the embedding side by side, 2 D wide
        (`embedded`); what an earlier update of the block left aside (`aside`), or x with that added
        (`sum`).
      aside: the update is left aside for later ones of the block, and x stays as it was.
      share: name of the parameters that all updates of this name read, ops' and norms'; adapters
        are each layer's own. None: all are. Source: arXiv 2405.16712, 2411.15242.
    """

    ops: tuple[NamedOp, ...]
    norm_in: Norm | None = None
    norm_out: Norm | None = None
    norm_after: Norm | None = None
    scale: float = 1.0
    skip_scale: float = 1.0
    skip_normed: bool = False
    reads: Literal["hidden", "embedded", "aside", "sum"] = "hidden"
    aside: bool = False
    share: str | None = None

    def __post_init__(self) -> None:
        require(len(self.ops) >= 1, "sub: needs at least one op")
        self._check_norms()
        self._check_streams()
        require(
            self.share is None or self.share.isidentifier(),
            f"sub: share {self.share!r} is no identifier",
        )
        alone = [o.name for o in self.ops if isinstance(o.op, MoE | Memory)]
        require(
            self.share is None or not alone,
            f"sub: experts and memories share no parameters by share, found {', '.join(alone)}",
        )

    def _check_norms(self) -> None:
        require(
            self.norm_in is not None or not self.skip_normed,
            "sub: skip_normed is of the norm before the ops; give norm_in",
        )
        own = [named.name for named in self.ops if named.norm_in is not None]
        require(
            not own or (len(self.ops) > 1 and self.norm_in is None),
            f"sub: a norm_in of the ops {', '.join(own)} is for several ops without one in common",
        )

    def _check_streams(self) -> None:
        require(
            self.reads == "hidden" or not self.skip_normed,
            f"sub: skip_normed keeps what the ops read, which is x, not {self.reads!r}",
        )
        require(
            not self.aside or (self.norm_after is None and self.skip_scale == 1),
            "sub: what is left aside is added to nothing: no norm_after and no skip_scale",
        )
        double = [getattr(named.op, "out_width", None) is not None for named in self.ops]
        require(
            all(double) if self.reads == "embedded" else not any(double),
            "sub: ops that read `embedded` need an out_width, the model's, and others have none",
        )

    def width_in(self, width: int) -> int:
        """Width of what the ops read, in a model of width D."""
        return 2 * width if self.reads == "embedded" else width

    @property
    def name(self) -> str:
        """Name of the first op; the norms stand under `<name>_norm`, `_out_norm`, `_after_norm`."""
        return self.ops[0].name

    @property
    def norms(self) -> dict[str, Norm]:
        """The norms present, by the name of their parameters."""
        named = {"norm": self.norm_in, "out_norm": self.norm_out, "after_norm": self.norm_after}
        norms = {f"{self.name}_{key}": norm for key, norm in named.items() if norm is not None}
        own = {f"{o.name}_norm": o.norm_in for o in self.ops if o.norm_in is not None}
        return norms | own


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
        for i, part in enumerate(self.subs):
            require(
                part.reads not in ("aside", "sum") or any(s.aside for s in self.subs[:i]),
                f"block {self.name!r}: {part.name} reads what is aside, and none before leaves any",
            )
