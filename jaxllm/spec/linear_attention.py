"""Linear attention: one op of three choices, the feature map, the decay and the delta rule."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal

from jaxllm.core.config import require
from jaxllm.spec.activation import Activation
from jaxllm.spec.rope import Rope

__all__ = ["ConstantDecay", "Decay", "Feature", "GatedDecay", "LinearAttention", "OutNorm"]

Feature = Literal["identity", "elu1", "relu", "softmax", "favor"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConstantDecay:
    """Each head forgets at a rate of its own: log decay -|rate|, with no gradient.

    The rates are a leaf, so that layers that differ in them alone stay one stack. They start
    geometrically from 2^(-8/N) to 2^-8 a token.
    """

    kind: ClassVar[str] = "constant"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedDecay:
    """Each token says what is forgotten.

    `softplus`: log decay -exp(a_log) softplus(W x + dt_bias); `sigmoid`: log sigmoid(W x + dt_bias)
    / temperature.

    Attributes:
      over: one decay a head, or one for each channel of the keys.
      form: as above.
      rank: of W as a product of two matrices; None for one matrix.
      temperature: of `sigmoid`.
    """

    kind: ClassVar[str] = "gated"
    over: Literal["head", "channel"] = "head"
    form: Literal["softplus", "sigmoid"] = "softplus"
    rank: int | None = None
    temperature: float = 16.0

    def __post_init__(self) -> None:
        require(self.rank is None or self.rank >= 1, f"decay: rank is positive, found {self.rank}")
        require(self.temperature > 0, f"decay: temperature is positive, found {self.temperature}")


Decay = ConstantDecay | GatedDecay


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutNorm:
    """RMSNorm of what the heads read: each by itself with one scale [H], or all together [N, H]."""

    eps: float = 1e-5
    over: Literal["head", "full"] = "head"

    def __post_init__(self) -> None:
        require(self.eps > 0, f"out norm: eps is positive, found {self.eps}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearAttention:
    """A matrix a head: keys write, queries read, a decay and the delta rule forget.

    q, k, v = act(conv(W x)); q, k = phi(l2(rope(q))), phi(l2(rope(k)));
    S <- diag(decay) S; S <- S + k u^T with u = v, or beta (v - S^T k) by the delta rule;
    out = W (act(gate x) norm(scale S^T q)).

    The rows of this table give the known kinds: elu1 + normalizer the linear transformer
    (arXiv 2006.16236), favor + normalizer Performer (2009.14794), a constant decay RetNet
    (2307.08621) and lightning attention (2401.04658), a gated one GLA (2312.06635), delta DeltaNet
    (2406.06484), both gated DeltaNet (2412.06464), a channel's decay and delta KDA (2510.26692).

    Attributes:
      heads: N, heads of values.
      key_heads: K, heads of queries and keys; each serves N / K heads next to each other.
      key_dim: M, width of a query or key.
      value_dim: H, width of a value.
      feature: map of queries and keys: none, elu(x) + 1, relu, softmax over a head's width, or
        positive random features of exp(q k).
      features: how many random features, for `favor`.
      seed: of the random features' projection.
      decay: what is forgotten; None for nothing.
      delta: a key replaces what it reads, by beta = beta_max sigmoid(W x).
      beta_max: 1, or 2 to allow negative eigenvalues.
      normalizer: reads are divided by the sum of their weights, or by this where the sum is less;
        None for no division.
      scale: of queries; M^-1/2 by default. With `favor` on both, inside of the exponential.
      conv: width of the causal convolutions of q, k and v; None for none.
      activation: of q, k and v, after the convolution.
      l2_eps: queries and keys are brought to length 1, this under the root; None for not.
      rope: rotation of queries and keys; None for none.
      out_norm: of the reads, before the gate.
      gate: the reads are multiplied by this activation of W x.
      gate_rank: of that W as a product of two matrices; None for one matrix.
    """

    kind: ClassVar[str] = "linear_attention"
    heads: int
    key_heads: int
    key_dim: int
    value_dim: int
    feature: Feature = "identity"
    features: int | None = None
    seed: int = 0
    decay: Decay | None = None
    delta: bool = False
    beta_max: float = 1.0
    normalizer: float | None = None
    scale: float | None = None
    conv: int | None = None
    activation: Activation | None = None
    l2_eps: float | None = None
    rope: Rope | None = None
    out_norm: OutNorm | None = None
    gate: Literal["silu", "sigmoid"] | None = None
    gate_rank: int | None = None

    def __post_init__(self) -> None:
        self._check_sizes()
        self._check_choices()
        if self.rope is not None:
            self.rope.check(self.key_dim)

    def _check_sizes(self) -> None:
        sizes = (self.heads, self.key_heads, self.key_dim, self.value_dim)
        require(min(sizes) >= 1, f"linear attention: heads and widths are positive, found {sizes}")
        require(
            self.heads % self.key_heads == 0,
            f"linear attention: heads {self.heads} is no multiple of key_heads {self.key_heads}",
        )
        for name in ("features", "conv", "gate_rank"):
            value = getattr(self, name)
            require(
                value is None or value >= 1, f"linear attention: {name} is positive, found {value}"
            )
        for name in ("normalizer", "l2_eps"):
            value = getattr(self, name)
            require(
                value is None or (value > 0 and math.isfinite(value)),
                f"linear attention: {name} is finite and positive, found {value}",
            )
        require(self.beta_max > 0, f"linear attention: beta_max is positive, found {self.beta_max}")

    def _check_choices(self) -> None:
        favor = self.feature == "favor"
        require(
            favor == (self.features is not None),
            "linear attention: features is the number of random features and goes with feature "
            f"favor, found {self.feature} and {self.features}",
        )
        require(
            not favor or self.normalizer is not None,
            "linear attention: favor means softmax's weights, which a normalizer divides; set one",
        )
        require(
            self.normalizer is None or self.feature != "identity",
            "linear attention: a normalizer needs weights that are not negative; with feature "
            "identity they may be",
        )
        require(
            self.normalizer is None or not self.delta,
            "linear attention: delta leaves no sum of weights that a normalizer could divide by",
        )
        require(
            not favor or not (self.decay is not None and self.decay_over == "channel"),
            "linear attention: a channel's decay has no random feature to act on; take over=head",
        )
        require(
            self.gate_rank is None or self.gate is not None,
            f"linear attention: gate_rank {self.gate_rank} needs a gate",
        )

    @property
    def decay_over(self) -> Literal["head", "channel"]:
        """What has a decay of its own."""
        return self.decay.over if isinstance(self.decay, GatedDecay) else "head"

    @property
    def query_scale(self) -> float:
        """Factor on the scores; M^-1/2 unless the spec says otherwise."""
        return self.key_dim**-0.5 if self.scale is None else self.scale

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """Heads, rows (features of a key), columns (values, and a sum of weights) of the state."""
        rows = self.key_dim if self.features is None else self.features
        return self.heads, rows, self.value_dim + (self.normalizer is not None)

    @property
    def state_values(self) -> int:
        """Values of a sequence's state."""
        peaks = self.key_heads if self.feature == "favor" else 0
        return math.prod(self.state_shape) + peaks

    @property
    def tail_values(self) -> int:
        """Values of a sequence's convolution tails."""
        channels = 2 * self.key_heads * self.key_dim + self.heads * self.value_dim
        return 0 if self.conv is None else (self.conv - 1) * channels

    @property
    def recurrence_flops(self) -> int:
        """Multiply-adds x 2 a token beside the matrices: decay, delta, write and read."""
        decays = self.decay is not None or self.feature == "favor"
        return 2 * math.prod(self.state_shape) * (2 + self.delta + decays)
