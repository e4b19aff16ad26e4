"""The ops of a block: one small frozen dataclass a kind, a tagged union over them."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from jaxllm.core.config import require
from jaxllm.spec.activation import Activation
from jaxllm.spec.latent import LatentAttention
from jaxllm.spec.linear_attention import LinearAttention
from jaxllm.spec.mask import And, Blocks, Causal, Chunk, Full, Global, Mask, parts
from jaxllm.spec.memory import Memory
from jaxllm.spec.mlp import MLP, Linear
from jaxllm.spec.moe import MoE, Router
from jaxllm.spec.rope import Rope
from jaxllm.spec.state_space import Convolution, SelectiveScan, StateSpaceDual

__all__ = [
    "MLP",
    "Activation",
    "Attention",
    "Convolution",
    "InfiniAttention",
    "LatentAttention",
    "LengthProjection",
    "Linear",
    "LinearAttention",
    "Memory",
    "MoE",
    "Norm",
    "Op",
    "QKNorm",
    "Router",
    "SelectiveScan",
    "StateSpaceDual",
    "Temperature",
]


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
class QKNorm:
    """RMSNorm (or LayerNorm without a bias) of queries and keys, before or after rope.

    `over` says which values share statistics and scale: `head` norms each head with one scale for
    all heads [H], `heads` each head with a scale of its own [N, H], `full` all heads together
    [N, H]. Without `scale` the values are divided by their root mean square alone (L2 norm times
    the root of the width). Source: arXiv 2010.04245, 2302.05442.
    """

    type: Literal["rms", "layer"] = "rms"
    over: Literal["head", "heads", "full"] = "head"
    eps: float = 1e-6
    offset: float = 0.0
    scale: bool = True
    after_rope: bool = False

    def __post_init__(self) -> None:
        require(self.eps > 0, f"qk norm: eps is positive, found {self.eps}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LengthProjection:
    """Keys and values of up to `length` tokens become `rows` weighted sums of them (Linformer).

    Source: arXiv 2006.04768.
    """

    length: int
    rows: int

    def __post_init__(self) -> None:
        require(
            1 <= self.rows <= self.length,
            f"length projection: rows are 1 to length, found {self.rows} of {self.length}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Temperature:
    """Queries far along are multiplied by 1 + scale ln(1 + floor((position + 1) / period)).

    Source: arXiv 2501.19399.

    Attributes:
      scale: strength.
      period: tokens after which the factor grows.
    """

    scale: float
    period: float

    def __post_init__(self) -> None:
        require(self.period > 0, f"temperature: period is positive, found {self.period}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention:
    """Softmax attention: MHA (kv_heads = heads), GQA, MQA (kv_heads = 1).

    Attributes:
      heads: N.
      kv_heads: K.
      head_dim: H.
      qkv_bias: on the three input projections.
      out_bias: on the output projection.
      scale: factor on the scores; H^-1/2 by default.
      qk_norm: of queries and keys.
      softcap: scores become softcap * tanh(scores / softcap).
      sinks: a learned logit a head that takes its share of the softmax and gives nothing.
      gate: the heads' outputs are multiplied by sigmoid(x W_gate).
      temperature: factor on queries by their position; None for none.
      rope: rotation of queries and keys; None for none.
      mask: which keys a query sees.
      global_projections: queries that a `Global` mask makes global use query, key and value
        projections of their own, over all keys (Longformer).
      length_projection: keys and values are summed over the length; for a `Full` mask alone.
      out_width: of the output, where it is not that of the input.
      adapter_rank: of the product of two matrices that is added to each of the projections in, and
        that each layer has for itself where layers share the rest; None for none.
    """

    kind: ClassVar[str] = "attention"
    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False
    scale: float | None = None
    qk_norm: QKNorm | None = None
    softcap: float | None = None
    sinks: bool = False
    gate: bool = False
    temperature: Temperature | None = None
    rope: Rope | None = Rope()
    mask: Mask = Causal()
    global_projections: bool = False
    length_projection: LengthProjection | None = None
    out_width: int | None = None
    adapter_rank: int | None = None

    def __post_init__(self) -> None:
        for name in ("out_width", "adapter_rank"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"attention: {name} is positive, found {value}")
        require(
            min(self.heads, self.kv_heads, self.head_dim) >= 1,
            f"attention: heads, kv_heads and head_dim are positive, found {self}",
        )
        require(
            self.heads % self.kv_heads == 0,
            f"attention: heads {self.heads} is no multiple of kv_heads {self.kv_heads}",
        )
        require(
            self.softcap is None or self.softcap > 0,
            f"attention: softcap is positive, found {self.softcap}",
        )
        if self.rope is not None:
            self.rope.check(self.head_dim)
        if self.global_projections:
            self._check_global()
        require(
            self.length_projection is None or self.mask == Full(),
            "attention: a length_projection mixes all positions; its mask must be Full",
        )

    def _check_global(self) -> None:
        nested = {p for b in parts(self.mask) if isinstance(b, Blocks) for p in parts(b.mask)}
        plain = [p for p in parts(self.mask) if isinstance(p, Global) and p not in nested]
        require(
            bool(plain) and self.rope is None and self.qk_norm is None and not self.sinks,
            "attention: global_projections need a mask with Global positions outside of Blocks, "
            "and no rope, qk_norm or sinks",
        )

    @property
    def query_scale(self) -> float:
        """Factor on the scores; H^-1/2 unless the spec says otherwise."""
        return self.head_dim**-0.5 if self.scale is None else self.scale


@dataclasses.dataclass(frozen=True, kw_only=True)
class InfiniAttention:
    """Attention within segments, beside a memory of those before. Source: arXiv 2404.07143.

    With s(x) = elu(x) + 1 of queries and keys that are not rotated, a key head's memory of closed
    segments is M = sum s(k) v and z = sum s(k). A query finds s(q) M / s(q) z there, and an output
    is the local one and this one in the proportion of a learned logit a head. A published
    replication found quality to fall as more segments are compressed.

    Attributes:
      local: attention of which the mask is causal and in chunks, the segments.
      delta: what the memory already says of a key is subtracted from its value before it is added.
    """

    kind: ClassVar[str] = "infini_attention"
    local: Attention
    delta: bool = True

    def __post_init__(self) -> None:
        local = self.local
        match local.mask:
            case And(first=Causal(), second=Chunk()):
                pass
            case _:
                require(False, f"infini attention: a mask is causal in chunks, found {local.mask}")
        plain = not (local.qk_norm or local.sinks or local.gate or local.temperature)
        plain = plain and local.out_width is None and local.adapter_rank is None
        require(
            plain, "infini attention: no qk_norm, sinks, gate, temperature, adapters, out_width"
        )

    @property
    def segment(self) -> int:
        """Tokens of a segment."""
        assert isinstance(self.local.mask, And) and isinstance(self.local.mask.second, Chunk)
        return self.local.mask.second.size

    @property
    def mask(self) -> Mask:
        """Of the local attention; the memory has what is before the segment."""
        return self.local.mask

    @property
    def rope(self) -> Rope | None:
        """Of the local attention."""
        return self.local.rope

    @property
    def state_values(self) -> int:
        """Values that a sequence's memory takes: closed segments and the open one."""
        return 2 * self.local.kv_heads * self.local.head_dim * (self.local.head_dim + 1)

    @property
    def tail_values(self) -> int:
        """None: there is no convolution."""
        return 0

    @property
    def recurrence_flops(self) -> int:
        """Multiply-adds x 2 a token: each query reads, each key is added and with delta read."""
        heads, keys = self.local.heads, self.local.kv_heads * (2 if self.delta else 1)
        return 2 * (heads + keys) * self.local.head_dim * (self.local.head_dim + 1)


Op = (
    Attention
    | LatentAttention
    | InfiniAttention
    | MLP
    | Linear
    | MoE
    | LinearAttention
    | SelectiveScan
    | StateSpaceDual
    | Convolution
    | Memory
)
