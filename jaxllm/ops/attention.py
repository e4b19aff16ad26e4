"""Softmax attention: a plain reference, and the implementations that may stand in for it.

`implementation` is `auto` (chooses, and says once what and why) or a name; a named choice that
cannot be served raises.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxllm.core.config import nearest
from jaxllm.core.logging import note_once
from jaxllm.errors import ConfigError, ShapeError, UnsupportedError
from jaxllm.ops.mask import Visibility, visible
from jaxllm.spec.mask import Causal

__all__ = ["IMPLEMENTATIONS", "Choice", "attention", "choose", "reference"]


@dataclasses.dataclass(frozen=True)
class Choice:
    """An implementation and why it was taken."""

    name: str
    why: str


def reference(
    q: jax.Array, k: jax.Array, v: jax.Array, see: Visibility, *, scale: float
) -> jax.Array:
    """softmax(scale q kT + mask) v, statistics in float32.

    Args:
      q: [B, T, N, H] queries.
      k: [B, S, K, H] keys.
      v: [B, S, K, H] values.
      see: who sees whom; a row that sees nothing gives zeros.
      scale: factor on the scores.

    Returns:
      [B, T, N, H] in v's dtype.
    """
    groups = q.shape[2] // k.shape[2]
    q = q.reshape(*q.shape[:2], k.shape[2], groups, q.shape[3])
    exact = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    scores = jnp.einsum(
        "BTKGH,BSKH->BKGTS", q, k, precision=exact, preferred_element_type=jnp.float32
    )
    seen = visible(see)[:, None, None]
    scores = jnp.where(seen, scores * scale, -jnp.inf)
    peak = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(peak), peak, 0.0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = (weights / jnp.where(total == 0, 1.0, total)).astype(v.dtype)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", weights, v, precision=exact)
    return out.reshape(*out.shape[:2], -1, v.shape[-1])


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, see: Visibility, *, scale: float) -> jax.Array:
    """cuDNN's fused attention through `jax.nn.dot_product_attention`."""
    plain = see.query_segments is None and see.key_lengths is None
    structural = see.aligned and plain and isinstance(see.mask, Causal)
    mask = None if structural else visible(see)[:, None]
    with jax.numpy_dtype_promotion("standard"):
        return jax.nn.dot_product_attention(
            q, k, v, mask=mask, scale=scale, is_causal=structural, implementation="cudnn"
        )


IMPLEMENTATIONS = {"reference": reference, "cudnn": _cudnn}


def _cudnn_obstacle(platform: str, dtype: str, head_dim: int) -> str | None:
    if platform not in ("gpu", "cuda"):
        return f"cudnn needs a CUDA device, this is {platform}"
    if dtype not in ("bfloat16", "float16"):
        return f"cudnn takes bfloat16 and float16, not {dtype}"
    if head_dim % 8 or head_dim > 256:
        return f"cudnn takes head widths that are multiples of 8 up to 256, not {head_dim}"
    return None


@functools.lru_cache(maxsize=256)
def choose(
    implementation: str, *, platform: str, dtype: str, head_dim: int, queries: int
) -> Choice:
    """The implementation for a shape, and why.

    Args:
      implementation: `auto` or a name.
      platform: `cpu`, `gpu` or `tpu`.
      dtype: name of q's dtype.
      head_dim: H.
      queries: T; decode (few queries over a long cache) is bound by bytes, not by fusion.

    Raises:
      ConfigError: unknown name; UnsupportedError: a named choice that cannot be served.
    """
    if implementation not in ("auto", *IMPLEMENTATIONS):
        raise ConfigError(
            f"attention {implementation!r} is unknown; "
            f"{nearest(implementation, ('auto', *IMPLEMENTATIONS))}"
        )
    obstacle = _cudnn_obstacle(platform, dtype, head_dim)
    if implementation == "cudnn" and obstacle:
        raise UnsupportedError(f"attention 'cudnn': {obstacle}; use 'reference' or 'auto'")
    if implementation != "auto":
        return Choice(implementation, "named")
    if obstacle:
        return Choice("reference", obstacle)
    if queries < 16:
        return Choice("reference", f"{queries} queries a row: bound by reading the cache")
    return Choice("cudnn", "fused on a CUDA device")


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    see: Visibility,
    *,
    scale: float,
    implementation: str = "auto",
) -> jax.Array:
    """Softmax attention of q [B, T, N, H] over k, v [B, S, K, H]; see `reference`."""
    if q.shape[2] % k.shape[2] or k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0]:
        raise ShapeError(f"attention: q {q.shape}, k {k.shape} and v {v.shape} do not fit")
    choice = choose(
        implementation,
        platform=jax.default_backend(),
        dtype=str(q.dtype),
        head_dim=q.shape[-1],
        queries=q.shape[1],
    )
    if implementation == "auto":
        note_once(f"attention: {choice.name} ({choice.why})")
    return IMPLEMENTATIONS[choice.name](q, k, v, see, scale=scale)
