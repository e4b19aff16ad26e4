"""Feed-forward as data."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from jaxllm.core.config import require
from jaxllm.spec.activation import Activation

__all__ = ["MLP", "Linear"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLP:
    """Feed-forward: `down(act(gate_scale gate x) * up x)` when gated, else `down(act(up x))`.

    Attributes:
      width: F.
      activation: of the gate, or of `up x` where there is none.
      gated: whether there is a gate.
      bias: on all projections.
      clamp: bound of what goes into the activation (from above) and of a gated `up x` (on both
        sides).
      gate_scale: factor on what the gate's projection gives.
      gain: silu becomes x sigmoid(gain x).
      up_offset: added to a gated `up x` after the clamp.
      out_gate: the update is multiplied by sigmoid(x w), one number a token.
      adapter_rank: of the product of two matrices that is added to gate and up, and that each layer
        has for itself where layers share the rest; the two have the first matrix in common. None
        for none.
    """

    kind: ClassVar[str] = "mlp"
    width: int
    activation: Activation = "silu"
    gated: bool = True
    bias: bool = False
    clamp: float | None = None
    gate_scale: float = 1.0
    gain: float = 1.0
    up_offset: float = 0.0
    out_gate: bool = False
    adapter_rank: int | None = None

    def __post_init__(self) -> None:
        require(self.width >= 1, f"mlp: width is positive, found {self.width}")
        require(self.clamp is None or self.clamp > 0, f"mlp: clamp is positive, found {self.clamp}")
        require(self.gain > 0, f"mlp: gain is positive, found {self.gain}")
        require(
            self.gain == 1 or self.activation == "silu",
            f"mlp: gain {self.gain} is of silu alone, found {self.activation!r}",
        )
        require(
            self.gated or self.up_offset == 0,
            f"mlp: up_offset {self.up_offset} needs a gate; set gated=True",
        )
        require(
            self.adapter_rank is None or self.adapter_rank >= 1,
            f"mlp: adapter_rank is positive, found {self.adapter_rank}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """One matrix, of the model's width on both sides: W x."""

    kind: ClassVar[str] = "linear"
