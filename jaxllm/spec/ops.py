"""The ops of a block: one small frozen dataclass a kind, a tagged union over them."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from jaxllm.core.config import require
from jaxllm.spec.mask import Causal, Mask
from jaxllm.spec.rope import Rope

__all__ = ["MLP", "Activation", "Attention", "Norm", "Op"]

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Norm:
    """RMSNorm or LayerNorm with float32 statistics; the weight acts as `offset + scale`."""

    type: Literal["rms", "layer"] = "rms"
    eps: float = 1e-5
    offset: float = 0.0
    bias: bool = False

    def __post_init__(self) -> None:
        require(self.eps > 0, f"norm: eps is positive, found {self.eps}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention:
    """Softmax attention: MHA (kv_heads = heads), GQA, MQA (kv_heads = 1)."""

    kind: ClassVar[str] = "attention"
    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False
    scale: float | None = None
    rope: Rope | None = Rope()
    mask: Mask = Causal()

    def __post_init__(self) -> None:
        require(
            min(self.heads, self.kv_heads, self.head_dim) >= 1,
            f"attention: heads, kv_heads and head_dim are positive, found {self}",
        )
        require(
            self.heads % self.kv_heads == 0,
            f"attention: heads {self.heads} is no multiple of kv_heads {self.kv_heads}",
        )
        if self.rope is not None:
            self.rope.check(self.head_dim)

    @property
    def query_scale(self) -> float:
        """Factor on the scores; H^-1/2 unless the spec says otherwise."""
        return self.head_dim**-0.5 if self.scale is None else self.scale


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLP:
    """Feed-forward: `down(act(gate x) * up x)` when gated, else `down(act(up x))`."""

    kind: ClassVar[str] = "mlp"
    width: int
    activation: Activation = "silu"
    gated: bool = True
    bias: bool = False

    def __post_init__(self) -> None:
        require(self.width >= 1, f"mlp: width is positive, found {self.width}")


Op = Attention | MLP
