"""State space ops: the selective scan (version 1), its dual form (version 2), short convolution."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

from jaxllm.core.config import require
from jaxllm.spec.activation import Activation

__all__ = ["Convolution", "GatedNorm", "SelectiveScan", "StateSpaceDual"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectiveScan:
    """A state a channel that decays by what the token says (Mamba-1).

    x, z = W x; x <- act(conv(x)); dt = softplus(W W' x + bias); b, c = W x;
    h <- exp(-exp(a_log) dt) h + dt b x; out = W (silu(z) (c . h + d x)).
    Source: arXiv 2312.00752.

    Attributes:
      channels: I, the inner width.
      state: M, values that a channel remembers.
      dt_rank: R, the rank of the step sizes' projection.
      conv: W, inputs that the convolution sees.
      conv_bias: of the convolution.
      in_bias: of the projections to x and z.
      out_bias: of the projection out.
      inner_eps: dt (before its second projection), b and c pass an RMSNorm of this epsilon.
      activation: after the convolution.
    """

    kind: ClassVar[str] = "selective_scan"
    channels: int
    state: int
    dt_rank: int
    conv: int = 4
    conv_bias: bool = True
    in_bias: bool = False
    out_bias: bool = False
    inner_eps: float | None = None
    activation: Activation = "silu"

    def __post_init__(self) -> None:
        require(
            min(self.channels, self.state, self.dt_rank, self.conv) >= 1,
            f"selective scan: channels, state, dt_rank and conv are positive, found {self}",
        )
        require(
            self.inner_eps is None or self.inner_eps > 0,
            f"selective scan: inner_eps is positive, found {self.inner_eps}",
        )

    @property
    def recurrence_flops(self) -> int:
        """Multiply-adds x 2 a token beside the matrices: the state's decay, input and output, and
        the convolution."""
        return 6 * self.state_values + 2 * self.conv * self.channels

    @property
    def state_values(self) -> int:
        """Values of a sequence's state."""
        return self.channels * self.state

    @property
    def tail_values(self) -> int:
        """Values of a sequence's convolution tail."""
        return (self.conv - 1) * self.channels


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedNorm:
    """RMSNorm of a head's outputs y, gated by silu(z), in groups of channels.

    norm(y silu(z)), or norm(y) silu(z) with `before_gate`.
    """

    eps: float = 1e-5
    groups: int = 1
    before_gate: bool = False

    def __post_init__(self) -> None:
        require(
            self.eps > 0 and self.groups >= 1, f"gated norm: eps and groups are positive: {self}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateSpaceDual:
    """Heads of a matrix state with one decay each (Mamba-2, SSD).

    z, x, b, c, dt = scales * (W x); x, b, c <- act(conv(.)); dt = clip(softplus(dt + dt_bias));
    S <- exp(-exp(a_log) dt) S + dt x b^T; y = S c + d x; out = W norm(y, z).
    Source: arXiv 2405.21060.

    Attributes:
      heads: N.
      head_dim: H, channels of a head.
      state: M, the width of the state.
      groups: K, in how many groups heads share b and c.
      conv: W, inputs that the convolutions see.
      conv_bias: of the convolutions.
      in_bias: of the projections in.
      out_bias: of the projection out.
      norm: of the gated output; None gates it alone.
      dt_min: least step size.
      dt_max: greatest step size; None for no limit.
      scales: factors on the projections z, x, b, c and dt, their biases included.
      activation: after the convolutions.
    """

    kind: ClassVar[str] = "state_space_dual"
    heads: int
    head_dim: int
    state: int
    groups: int = 1
    conv: int = 4
    conv_bias: bool = True
    in_bias: bool = False
    out_bias: bool = False
    norm: GatedNorm | None = GatedNorm()
    dt_min: float = 0.0
    dt_max: float | None = None
    scales: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0, 1.0)
    activation: Activation = "silu"

    def __post_init__(self) -> None:
        sizes = (self.heads, self.head_dim, self.state, self.groups, self.conv)
        require(min(sizes) >= 1, f"state space: sizes are positive, found {self}")
        require(
            self.heads % self.groups == 0,
            f"state space: heads {self.heads} is no multiple of groups {self.groups}",
        )
        require(
            self.norm is None or self.heads * self.head_dim % self.norm.groups == 0,
            f"state space: {self.heads} x {self.head_dim} channels do not fall into the norm's "
            f"groups: {self.norm}",
        )
        limit = math.inf if self.dt_max is None else self.dt_max
        require(
            0 <= self.dt_min <= limit,
            f"state space: 0 <= dt_min <= dt_max, found {self.dt_min} and {self.dt_max}",
        )
        require(len(self.scales) == 5, f"state space: scales are five, found {self.scales}")

    @property
    def recurrence_flops(self) -> int:
        """Multiply-adds x 2 a token beside the matrices: the state's decay, input and output, and
        the convolution."""
        return 6 * self.state_values + 2 * self.conv * self.convolved

    @property
    def state_values(self) -> int:
        """Values of a sequence's state."""
        return self.heads * self.head_dim * self.state

    @property
    def tail_values(self) -> int:
        """Values of a sequence's convolution tails."""
        return (self.conv - 1) * self.convolved

    @property
    def convolved(self) -> int:
        """Channels of the convolutions: x, b and c."""
        return self.heads * self.head_dim + 2 * self.groups * self.state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convolution:
    """Gated short convolution: out = W (c conv(b x)) with b, c, x linear in the input.

    Attributes:
      channels: I, of b, c and x.
      conv: W, inputs that it sees.
      bias: of the projections and of the convolution.
    """

    kind: ClassVar[str] = "convolution"
    channels: int
    conv: int = 3
    bias: bool = False

    def __post_init__(self) -> None:
        require(
            min(self.channels, self.conv) >= 1,
            f"convolution: channels and conv are positive, found {self}",
        )

    @property
    def recurrence_flops(self) -> int:
        """Multiply-adds x 2 a token beside the matrices: the convolution."""
        return 2 * self.conv * self.channels

    @property
    def state_values(self) -> int:
        """Values of a sequence's state: none beside the tail."""
        return 0

    @property
    def tail_values(self) -> int:
        """Values of a sequence's convolution tail."""
        return (self.conv - 1) * self.channels
