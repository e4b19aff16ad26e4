"""State space recurrences in float32: what models call, one function a kind.

Implementations stand in a literal table a kind, where a kernel takes its place. A token whose step
size is 0 leaves the state as it was (padding); a start forgets all before it, be it NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxllm.errors import UnsupportedError
from jaxllm.ops.linear import align
from jaxllm.ops.selective import Selective, selective_chunked, selective_loop
from jaxllm.ops.ssd import Dual, dual_chunked, dual_loop
from jaxllm.spec.state_space import GatedNorm
from jaxllm.typing import AnyArray

__all__ = ["DUAL", "SELECTIVE", "Dual", "Selective", "dual_scan", "gated_norm", "selective_scan"]

SELECTIVE: dict[str, Callable[..., Any]] = {
    "reference": selective_loop,
    "chunked": selective_chunked,
}
DUAL: dict[str, Callable[..., Any]] = {"reference": dual_loop, "chunked": dual_chunked}
"""(inputs, initial state, starts or None) -> (y without d x in float32, final state)."""


def _choose(table: dict[str, Callable[..., Any]], name: str, tokens: int) -> Callable[..., Any]:
    """An implementation by name; `auto` takes chunks for anything longer than a token."""
    if name == "auto":
        name = "chunked" if tokens > 1 else "reference"
    if name not in table:
        allowed = ", ".join(sorted(table))
        raise UnsupportedError(f"scan {name!r} is unknown; allowed: auto, {allowed}")
    return table[name]


def _run(
    run: Callable[..., Any], inputs: Any, initial: Array, starts: Any, d: AnyArray
) -> tuple[Array, Array]:
    """(y with d x that passes by the state, in x's dtype; the final state)."""
    x = inputs.x
    y, final = run(inputs, initial, None if starts is None else jnp.asarray(starts))
    skip = x.astype(jnp.float32) * align(d.astype(jnp.float32), x)
    return (y + skip).astype(x.dtype), final


def selective_scan(
    inputs: Selective,
    initial: Float[Array, "B I M"] | None = None,
    *,
    starts: Bool[AnyArray, "B T"] | None = None,
    implementation: str = "auto",
) -> tuple[Float[Array, "B T I"], Float[Array, "B I M"]]:
    """h <- exp(dt a) h + dt b x; y = c . h + d x, token by token. Source: arXiv 2312.00752.

    Args:
      inputs: of the scan.
      initial: the state before; zeros by default.
      starts: tokens before which nothing is remembered; None for none.
      implementation: `auto`, or a name in `SELECTIVE`.

    Returns:
      (y in x's dtype, the state after the last token in float32).

    Raises:
      UnsupportedError: no such implementation.
    """
    x = inputs.x
    if initial is None:
        initial = jnp.zeros((x.shape[0], *inputs.a.shape), jnp.float32)
    run = _choose(SELECTIVE, implementation, x.shape[1])
    return _run(run, inputs, initial, starts, inputs.d)


def dual_scan(
    inputs: Dual,
    initial: Float[Array, "B N H M"] | None = None,
    *,
    starts: Bool[AnyArray, "B T"] | None = None,
    implementation: str = "auto",
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N H M"]]:
    """S <- exp(dt a) S + dt x b^T; y = S c + d x, token by token. Source: arXiv 2405.21060.

    Args:
      inputs: of the scan.
      initial: the state before; zeros by default.
      starts: tokens before which nothing is remembered; None for none.
      implementation: `auto`, or a name in `DUAL`.

    Returns:
      (y in x's dtype, the state after the last token in float32).

    Raises:
      UnsupportedError: no such implementation.
    """
    x = inputs.x
    if initial is None:
        initial = jnp.zeros((x.shape[0], *x.shape[2:], inputs.b.shape[-1]), jnp.float32)
    run = _choose(DUAL, implementation, x.shape[1])
    return _run(run, inputs, initial, starts, inputs.d[:, None])


def gated_norm(
    y: Float[Array, "B T N H"],
    z: Float[Array, "B T N H"],
    scale: Float[AnyArray, "N H"] | None,
    norm: GatedNorm | None,
) -> Float[Array, "B T N H"]:
    """norm(y silu(z)), or norm(y) silu(z), over groups of channels, in float32; y's dtype.

    Args:
      y: what the heads found.
      z: the gate.
      scale: of the norm.
      norm: None for y silu(z).
    """
    wide, gate = y.astype(jnp.float32), jax.nn.silu(z.astype(jnp.float32))
    if norm is None or scale is None:
        return (wide * gate).astype(y.dtype)
    wide = wide if norm.before_gate else wide * gate
    parts = wide.reshape(*y.shape[:2], norm.groups, -1)
    mean = jnp.mean(jnp.square(parts), axis=-1, keepdims=True)
    wide = (parts * jax.lax.rsqrt(mean + norm.eps)).reshape(y.shape)
    wide = wide * align(scale.astype(jnp.float32), wide)
    return (wide * gate if norm.before_gate else wide).astype(y.dtype)
