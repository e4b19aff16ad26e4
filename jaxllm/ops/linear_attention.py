"""Linear attention: a matrix a head that keys write and queries read, with decay and delta rule.

    S_t = diag(exp g_t) S_{t-1} + k_t u_t^T      o_t = S_t^T q_t
    u_t = v_t, or by the delta rule beta_t (v_t - (diag(exp g_t) S_{t-1})^T k_t)

Two forms give the same numbers: token by token (decode, and the reference), and chunk by chunk
(training, prefill), where all within a chunk is matrix products. Sources: arXiv 2006.16236 (linear
transformer), 2307.08621 (RetNet), 2312.06635 (GLA), 2406.06484 (DeltaNet), 2412.06464 (gated
DeltaNet), 2510.26692 (KDA).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxllm.core.choices import took
from jaxllm.core.config import nearest
from jaxllm.core.precision import at_least_float32
from jaxllm.core.sharding import DEFAULT_RULES, Rules, island, shards
from jaxllm.errors import ConfigError, ShapeError, UnsupportedError
from jaxllm.ops.chunks import over_tokens
from jaxllm.ops.linear_chunks import chunked
from jaxllm.typing import AnyArray, Slot
from pallas_kernels.choice import Choice
from pallas_kernels.target import target

__all__ = ["IMPLEMENTATIONS", "Gates", "add_ones", "choose", "divide", "linear_attention"]

_KERNELS = ("mosaic_gpu", "mosaic_tpu")
IMPLEMENTATIONS = ("auto", "reference", "chunked", *_KERNELS)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gates:
    """What the matrix forgets and how strongly it is written.

    Attributes:
      log_decay: [B, T, N] a head or [B, T, N, M] a channel of the keys, 0 or less; None for none.
      beta: [B, T, N], how much of what the key reads is replaced; None without the delta rule.
      starts: [B, T] booleans, tokens before which all is forgotten exactly; None for none.
      real: [B, T] booleans, tokens that are no padding: others leave the matrix; None for all.
    """

    log_decay: Slot | None = None
    beta: Slot | None = None
    starts: Slot | None = None
    real: Slot | None = None


def linear_attention(
    qkv: tuple[Float[Array, "B T K M"], Float[Array, "B T K M"], Float[Array, "B T N H"]],
    *,
    gates: Gates = Gates(),
    state: Float[AnyArray, "B N M H"] | None = None,
    implementation: str = "auto",
    rules: Rules = DEFAULT_RULES,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N M H"]]:
    """The recurrence above, in float32 at least.

    Args:
      qkv: features of queries and keys, and values. Each of K key heads serves N / K heads next to
        each other.
      gates: decays and strengths.
      state: the matrices before; zeros by default.
      implementation: `auto` goes token by token for one token, else by a kernel where it was
        measured to win, else chunk by chunk.
      rules: logical axis -> mesh axes, for kernels, which run on each device's own part.

    Returns:
      (what each query reads, in the dtype of the values; the matrices after).

    Raises:
      ConfigError: an unknown implementation. ShapeError: heads that do not divide.
      UnsupportedError: a kernel that cannot serve the call.
    """
    q, k, v = qkv
    heads, key_heads = v.shape[2], k.shape[2]
    if heads % key_heads:
        raise ShapeError(
            f"linear attention: {heads} heads are no multiple of {key_heads} key heads"
        )
    choice = choose(implementation, qkv, gates, rules)
    free = implementation == "auto" and v.shape[1] > 1
    took("linear attention", choice.name, choice.why if free else None)
    if choice.name in _KERNELS:
        return _kernel(choice.name, qkv, gates, state, rules)
    dtype, wide = v.dtype, at_least_float32(v.dtype)
    q, k, v, log_decay, beta = _prepare((q, k, v), gates, heads // key_heads, wide)
    if state is None:
        state = jnp.zeros((v.shape[0], heads, k.shape[-1], v.shape[-1]), wide)
    state = jnp.asarray(state).astype(wide)
    if choice.name == "reference":
        out, state = reference((q, k, v), log_decay, beta, state)
    else:
        narrow = jnp.dtype(dtype).itemsize < 4
        precision = jax.lax.Precision.DEFAULT if narrow else jax.lax.Precision.HIGHEST
        out, state = chunked((q, k, v), log_decay, beta, state, precision=precision)
    return out.astype(dtype), state


def _unfit(name: str, qkv: tuple[Array, Array, Array], gates: Gates, rules: Rules) -> str | None:
    """Why a kernel cannot serve a call, or None."""
    q, k, v = qkv
    if not q.dtype == k.dtype == v.dtype:
        return f"it takes q, k and v of one dtype, not {q.dtype}, {k.dtype} and {v.dtype}"
    from pallas_kernels.linear_attention import unfit  # Pallas takes a third of a second to import

    split = shards("heads", rules), shards("kv_heads", rules)
    heads = v.shape[2] // split[0], -(-k.shape[2] // split[1])
    widths = v.shape[3], k.shape[3]
    kind = {
        "delta": gates.beta is not None,
        "channels": gates.log_decay is not None and gates.log_decay.ndim > 3,
    }
    return unfit(name, dtype=str(v.dtype), heads=heads, widths=widths, **kind)


def choose(
    implementation: str,
    qkv: tuple[Array, Array, Array],
    gates: Gates,
    rules: Rules = DEFAULT_RULES,
) -> Choice:
    """The implementation for a call, and why; see `linear_attention`.

    Raises:
      ConfigError: unknown name; UnsupportedError: a kernel that cannot serve the call.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ConfigError(
            f"linear attention {implementation!r} is unknown; "
            f"{nearest(implementation, IMPLEMENTATIONS)}"
        )
    if implementation in _KERNELS and (obstacle := _unfit(implementation, qkv, gates, rules)):
        raise UnsupportedError(
            f"linear attention {implementation!r}: {obstacle}; use 'chunked' or 'auto'"
        )
    if implementation in ("auto", "chunked") and qkv[2].shape[1] == 1:
        return Choice("reference", "one token needs no chunks")
    if implementation != "auto":
        return Choice(implementation, "named")
    if target() != "gpu":
        return Choice("chunked", "plain jnp; our kernels have only been timed on a Hopper GPU")
    if obstacle := _unfit("mosaic_gpu", qkv, gates, rules):
        return Choice("chunked", f"plain jnp; not mosaic_gpu: {obstacle}")
    return Choice("mosaic_gpu", "three to nine times as fast forward as plain jnp on Hopper")


def _kernel(
    name: str,
    qkv: tuple[Array, Array, Array],
    gates: Gates,
    state: AnyArray | None,
    rules: Rules,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N M H"]]:
    """By a kernel of `pallas_kernels.linear_attention`, on the rows and heads of each device."""
    from pallas_kernels.linear_attention import linear_attention as kernel

    q, k, v = qkv
    decay, beta, ids = gates.log_decay, gates.beta, None
    if gates.real is not None:
        real = gates.real[..., None]
        k, v = (jnp.where(real[..., None], x, jnp.zeros_like(x)) for x in (k, v))
        beta = None if beta is None else jnp.where(real, beta, jnp.zeros_like(beta))
        if decay is not None:
            decay = jnp.where(_expand(real, decay), decay, jnp.zeros_like(decay))
    if gates.starts is not None:
        ids = jnp.cumsum(gates.starts, axis=1, dtype=jnp.int32)
    decay, beta, before = (
        None if x is None else jnp.asarray(x).astype(jnp.float32) for x in (decay, beta, state)
    )
    groups, split = k.shape[2], shards("kv_heads", rules)
    if groups > 1 and groups % split:  # devices with parts of a group each have it for themselves
        q, k = (jnp.repeat(x, split // math.gcd(groups, split), axis=2) for x in (q, k))
    tokens, shared = ("batch", "length", "heads", None), ("batch", "length", "kv_heads", None)
    given = {
        "q": (q, shared),
        "k": (k, shared),
        "v": (v, tokens),
        "log_decay": (decay, tokens if decay is not None and decay.ndim == 4 else tokens[:3]),
        "beta": (beta, tokens[:3]),
        "initial": (before, ("batch", "heads", None, None)),
        "segment_ids": (ids, tokens[:2]),
    }
    given = {key: pair for key, pair in given.items() if pair[0] is not None}
    arrays, axes = ({key: pair[i] for key, pair in given.items()} for i in (0, 1))

    def one(arrays: dict[str, Array]) -> tuple[Array, Array]:
        return kernel(**arrays, implementation=name)

    final = (v.shape[0], v.shape[2], k.shape[3], v.shape[3])
    out = [(v.shape, tokens), (final, ("batch", "heads", None, None))]
    return island(one, (arrays,), (axes,), out=out, rules=rules)


def _prepare(
    qkv: tuple[Array, Array, Array], gates: Gates, group: int, wide: np.dtype
) -> tuple[Array, Array, Array, Array | None, Array | None]:
    """Wide arrays with a key head a head; padding writes nothing and a start forgets all."""
    q, k, v = (x.astype(wide) for x in qkv)
    if group > 1:
        q, k = (jnp.repeat(x, group, axis=2) for x in (q, k))
    decay, beta = gates.log_decay, gates.beta
    decay = None if decay is None else decay.astype(wide)
    beta = None if beta is None else beta.astype(wide)
    zero = np.zeros((), wide)
    if gates.real is not None:
        real = gates.real[..., None]
        k, v = (jnp.where(real[..., None], x, zero) for x in (k, v))
        beta = None if beta is None else jnp.where(real, beta, zero)
        if decay is not None:
            decay = jnp.where(_expand(real, decay), decay, zero)
    if gates.starts is not None:
        decay = jnp.zeros(v.shape[:3], wide) if decay is None else decay
        decay = jnp.where(_expand(gates.starts[..., None], decay), -np.asarray(np.inf, wide), decay)
    return q, k, v, decay, beta


def _expand(mask: Bool[Array, "B T 1"], like: Array) -> Array:
    return jax.lax.expand_dims(mask, range(3, like.ndim))


def reference(
    qkv: tuple[Float[Array, "B T N M"], Float[Array, "B T N M"], Float[Array, "B T N H"]],
    log_decay: Float[Array, "B T N ..."] | None,
    beta: Float[Array, "B T N"] | None,
    state: Float[Array, "B N M H"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N M H"]]:
    """Token by token."""

    def one(state: Array, token: Any) -> tuple[Array, Array]:
        q, k, v, decay, beta = token
        if decay is not None:
            kept = jnp.exp(decay)
            state = state * jax.lax.expand_dims(kept, range(kept.ndim, 4))
        if beta is not None:
            read = jnp.sum(state * k[..., None], axis=2)
            v = beta[..., None] * (v - read)
        state = state + k[..., None] * v[..., None, :]
        return state, jnp.sum(state * q[..., None], axis=2)

    return over_tokens(one, state, (*qkv, log_decay, beta))


def add_ones(v: Float[Array, "B T N H"]) -> Float[Array, "B T N h"]:
    """Values with a last column of ones, under which the matrix sums up the keys."""
    return jnp.concatenate([v, jnp.ones((*v.shape[:3], 1), v.dtype)], axis=-1)


def divide(out: Float[Array, "B T N h"], least: float) -> Float[Array, "B T N H"]:
    """The reads of values over that of the ones, which is `least` at least.

    Weights phi(q) phi(k) then sum to 1 wherever their sum is no less.
    """
    return out[..., :-1] / jnp.maximum(out[..., -1:], np.asarray(least, out.dtype))
