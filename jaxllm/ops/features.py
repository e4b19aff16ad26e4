"""Feature maps of linear attention: softmax's kernel exp(q k) replaced by phi(q) phi(k)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32

from jaxllm.core.precision import at_least_float32
from jaxllm.typing import AnyArray

__all__ = ["FEATURES", "Favor", "favor", "l2_normalize", "projection"]

FEATURES: dict[str, Callable[[Array], Array]] = {
    "identity": lambda x: x,
    "elu1": lambda x: jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0))),
    "relu": jax.nn.relu,
    "softmax": lambda x: jax.nn.softmax(x, axis=-1),
}
"""Maps of queries and keys [..., H] alike, value by value or over a head's width.

Sources: elu1 arXiv 2006.16236, softmax over the features arXiv 2402.04347.
"""


def l2_normalize(x: Float[Array, "*dims H"], eps: float) -> Float[Array, "*dims H"]:
    """x / sqrt(sum x^2 + eps), in float32 at least, cast back to x's dtype."""
    y = x.astype(at_least_float32(x.dtype))
    return (y * jax.lax.rsqrt(jnp.sum(jnp.square(y), axis=-1, keepdims=True) + eps)).astype(x.dtype)


@functools.cache
def projection(features: int, head_dim: int, seed: int) -> Float32[np.ndarray, "m H"]:
    """Rows of FAVOR+'s projection: orthogonal within blocks of H, each as long as a normal draw.

    Every row by itself is N(0, 1); that rows of a block are orthogonal lowers the variance.
    """
    random = np.random.default_rng(seed)
    blocks = []
    for _ in range(0, features, head_dim):
        q, r = np.linalg.qr(random.standard_normal((head_dim, head_dim)))
        blocks.append(q.T * np.sign(np.diag(r))[:, None])
    lengths = np.linalg.norm(random.standard_normal((features, head_dim)), axis=1)
    return (np.concatenate(blocks)[:features] * lengths[:, None]).astype(np.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Favor:
    """What FAVOR+ makes of queries and keys.

    Attributes:
      q: features of the queries [B, T, K, m], each token's over their greatest.
      k: features of the keys [B, T, K, m], each over the greatest so far.
      log_decay: [B, T, K], by how much the scale of earlier keys shrinks; 0 or less.
      peak: [B, K], logarithm of the greatest feature of a key so far.
    """

    q: Array
    k: Array
    log_decay: Array
    peak: Array


def favor(
    q: Float[Array, "B T K H"],
    k: Float[Array, "B T K H"],
    weights: Float[AnyArray, "m H"],
    *,
    before: Float[AnyArray, "B K"] | None = None,
    starts: Bool[AnyArray, "B T"],
    real: Bool[AnyArray, "B T"] | None = None,
) -> Favor:
    """Positive random features exp(w x - |x|^2 / 2) / sqrt(m), whose products mean exp(q k).

    Keys are scaled by the greatest feature of a key *so far*, never by a later one, and what was
    summed before is scaled down as that grows, as a decay. A ratio of such sums is as if nothing
    were scaled. Source: arXiv 2009.14794.

    Args:
      q: queries; the scale of scores is in queries and keys already.
      k: keys.
      weights: of `projection`.
      before: `peak` of the tokens before; zeros by default.
      starts: tokens that begin a sequence.
      real: tokens that are no padding; the features of others are 0. None for all.
    """
    wide = at_least_float32(q.dtype)
    root = len(weights) ** 0.5
    of_q, of_k = (_exponents(x.astype(wide), jnp.asarray(weights, wide)) for x in (q, k))
    of_q = of_q - jax.lax.stop_gradient(of_q.max(axis=-1, keepdims=True))
    top = jax.lax.stop_gradient(of_k.max(axis=-1))
    least = np.asarray(jnp.finfo(wide).min, wide)
    top = top if real is None else jnp.where(real[..., None], top, least)
    first = (
        jnp.zeros((q.shape[0], q.shape[2]), wide) if before is None else jnp.asarray(before, wide)
    )
    peak = jnp.maximum(_running_max(top, first, starts), least)
    earlier = jnp.concatenate([first[:, None], peak[:, :-1]], axis=1)
    shrink = jnp.minimum(earlier - peak, np.zeros((), wide))
    of_k = of_k - peak[..., None]
    if real is not None:
        of_k = jnp.where(real[..., None, None], of_k, np.asarray(-np.inf, wide))
    return Favor(jnp.exp(of_q) / root, jnp.exp(of_k) / root, shrink, peak[:, -1])


def _exponents(x: Float[Array, "B T K H"], weights: Float[Array, "m H"]) -> Array:
    exact = jax.lax.Precision.HIGHEST
    shift = 0.5 * jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return jnp.einsum("BTKH,mH->BTKm", x, weights, precision=exact) - shift


def _running_max(
    x: Float[Array, "B T K"], before: Float[Array, "B K"], starts: Bool[AnyArray, "B T"]
) -> Float[Array, "B T K"]:
    """The greatest x since the last start; where there is none, since ever and `before`."""
    x = jnp.concatenate([before[:, None], x], axis=1)
    begins = jnp.pad(jnp.asarray(starts), ((0, 0), (1, 0)))[..., None]
    begins = jnp.broadcast_to(begins, x.shape)

    def later(a: Any, b: Any) -> Any:
        return a[0] | b[0], jnp.where(b[0], b[1], jnp.maximum(a[1], b[1]))

    return jax.lax.associative_scan(later, (begins, x), axis=1)[1][:, 1:]
