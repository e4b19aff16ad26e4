"""By-products of a forward pass, collected layer by layer."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.typing import Slot

__all__ = ["Aux", "LayerAux"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Aux:
    """By-products of a forward pass.

    Attributes:
      losses: name -> scalar, summed over the layers that have it; a loss adds them by weight.
      stats: path -> array, router statistics and the like, one entry a layer.
      taps: path -> inputs of that matrix, or their Gram matrix.
    """

    losses: dict[str, Slot] = dataclasses.field(default_factory=dict)
    stats: dict[str, Slot] = dataclasses.field(default_factory=dict)
    taps: dict[str, Slot] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class LayerAux:
    """What one layer leaves behind while it is traced.

    Attributes:
      wanted: local names of matrices whose inputs are asked for, such as `mlp.down` or
        `gram:mlp.down`.
      taps: name -> inputs [B, T, ...] or Gram matrices [inputs, inputs] in float32.
      losses: name -> scalar.
      stats: local name, such as `mlp.load`, -> array.
    """

    wanted: frozenset[str] = frozenset()
    taps: dict[str, Float[Array, "..."]] = dataclasses.field(default_factory=dict)
    losses: dict[str, Float[Array, ""]] = dataclasses.field(default_factory=dict)
    stats: dict[str, Float[Array, "..."]] = dataclasses.field(default_factory=dict)

    def tap(self, name: str, x: Float[Array, "B T *inputs"], inputs: int) -> None:
        """Keep x (or the Gram matrix of its last `inputs` dims over tokens) if it is wanted."""
        if name in self.wanted:
            self.taps[name] = x
        if f"gram:{name}" in self.wanted:
            flat = x.reshape(-1, math.prod(x.shape[-inputs:])).astype(jnp.float32)
            exact = jax.lax.Precision.HIGHEST
            self.taps[f"gram:{name}"] = jnp.matmul(flat.T, flat, precision=exact)

    def lose(self, name: str, value: Float[Array, ""]) -> None:
        """Add to a loss of this name."""
        self.losses[name] = self.losses[name] + value if name in self.losses else value

    @property
    def found(self) -> Aux:
        """All of it, as arrays that leave the trace."""
        return Aux(self.losses, self.stats, self.taps)
