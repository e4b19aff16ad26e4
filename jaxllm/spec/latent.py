"""Latent attention as data: keys and values of all heads from one short vector a token."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from jaxllm.core.config import require
from jaxllm.spec.mask import Causal, Mask
from jaxllm.spec.rope import Rope

__all__ = ["LatentAttention"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention. Source: arXiv 2405.04434, 2412.19437.

    A token is remembered as `kv_rank` normed values, from which each head has its keys and values,
    and `rope_dim` rotated ones that the keys of all heads share.

    Attributes:
      heads: N.
      kv_rank: width of the remembered vector.
      q_rank: width of the normed vector that queries come from; None: from x itself.
      nope_dim: dims of a head's queries and keys that are not rotated.
      rope_dim: dims of them that are.
      v_dim: dims of a head's values.
      bias: on the projections from x to short vectors, and on the output.
      eps: of the norms of the short vectors.
      scale: factor on the scores; (nope_dim + rope_dim)^-1/2 by default.
      rope: rotation of the `rope_dim` dims; None for none, so that they are shared keys alone.
      mask: which keys a query sees.
    """

    kind: ClassVar[str] = "latent_attention"
    heads: int
    kv_rank: int
    q_rank: int | None = None
    nope_dim: int
    rope_dim: int
    v_dim: int
    bias: bool = False
    eps: float = 1e-6
    scale: float | None = None
    rope: Rope | None = Rope(layout="interleaved")
    mask: Mask = Causal()

    def __post_init__(self) -> None:
        sizes = (self.heads, self.kv_rank, self.nope_dim, self.rope_dim, self.v_dim)
        require(
            min(sizes) >= 1 and (self.q_rank is None or self.q_rank >= 1),
            f"latent attention: heads, ranks and dims are positive, found {self}",
        )
        require(self.eps > 0, f"latent attention: eps is positive, found {self.eps}")
        if self.rope is not None:
            self.rope.check(self.rope_dim, "latent attention")

    @property
    def query_dim(self) -> int:
        """Dims of a head's queries and keys."""
        return self.nope_dim + self.rope_dim

    @property
    def query_scale(self) -> float:
        """Factor on the scores."""
        return self.query_dim**-0.5 if self.scale is None else self.scale

    def absorbs(self, tokens: int) -> bool:
        """Whether so many new tokens are better attended in the remembered vectors themselves.

        To expand a remembered token's keys and values takes kv_rank (nope_dim + v_dim) products a
        head; a query over its vector takes 2 kv_rank - nope_dim - v_dim more than over those.
        """
        wide = self.nope_dim + self.v_dim
        return tokens * (2 * self.kv_rank - wide) < self.kv_rank * wide
