"""Latent attention through the state: a short vector a token, expanded or attended as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.core.choices import took
from jaxllm.core.policy import Policy
from jaxllm.errors import UnsupportedError
from jaxllm.ops import linear
from jaxllm.ops.attention import Scores
from jaxllm.spec.latent import LatentAttention
from jaxllm.state.attend import over_state, spread
from jaxllm.state.dense import LatentKV, write
from jaxllm.state.paged import PagedLatent, attend_latent_pages
from jaxllm.state.step import Step

__all__ = ["attend_latent"]


def attend_latent(
    state: Any,
    parts: tuple[Float[Array, "B T N Q"], Float[Array, "B T R"], Float[Array, "B T P"]],
    kv_up: Any,
    *,
    step: Step,
    op: LatentAttention,
    policy: Policy,
) -> tuple[Float[Array, "B T N V"], Any]:
    """Remember the new tokens' vectors, and attend over all that is remembered.

    Args:
      state: None (training) or the op's `LatentKV` or `PagedLatent`, which is read absorbed.
      parts: queries [nope, rope], normed vectors and shared keys of the new tokens, rotated.
      kv_up: the weight [R, N, nope + v] from vectors to keys and values.
      step: where the tokens stand.
      op: sizes, scale and mask.
      policy: implementations, and how arrays lie on a mesh.

    Returns:
      (what each query found, the new state).
    """
    q, latent, rotated = parts
    if isinstance(state, PagedLatent):
        return _over_pages(state, parts, kv_up, step=step, op=op)
    if state is not None and not isinstance(state, LatentKV):
        raise UnsupportedError(
            f"latent attention cannot read a {type(state).__name__}; use a dense state"
        )
    one = lambda x: x[:, :, None]  # noqa: E731 - as keys of one head
    if state is not None:
        state = LatentKV(
            write(one(state.latent), one(latent), step.positions, aligned=step.aligned)[:, :, 0],
            write(one(state.rotated), one(rotated), step.positions, aligned=step.aligned)[:, :, 0],
        )
    see, cached = over_state(state, step, op)
    if cached and state is not None:
        latent, rotated = (x.astype(q.dtype) for x in (state.latent, state.rotated))
    scores = Scores(scale=op.query_scale)
    absorbed = policy.latent == "absorbed" or (
        policy.latent == "auto" and cached and op.absorbs(q.shape[1])
    )
    took("latent attention", "absorbed" if absorbed else "plain")
    if not absorbed:
        both = linear.einsum("BSR,RNH->BSNH", latent, kv_up, dtype=q.dtype)
        keys, values = both[..., : op.nope_dim], both[..., op.nope_dim :]
        shape = (*keys.shape[:3], op.rope_dim)
        keys = jnp.concatenate([keys, jnp.broadcast_to(one(rotated), shape)], axis=-1)
        return spread(q, keys, values, see, scores=scores, policy=policy), state
    keys = jnp.concatenate([latent, rotated], axis=-1)
    into, back = _absorb(q, kv_up, op)
    found = spread(into, one(keys), one(latent), see, scores=scores, policy=policy)
    return back(found), state


def _absorb(
    q: Float[Array, "B T N Q"], kv_up: Any, op: LatentAttention
) -> tuple[Array, Callable[[Array], Array]]:
    """(queries that read vectors and shared keys as they are, from what they find to values)."""
    key_up, value_up = linear.absorbed(kv_up, op.nope_dim, dtype=q.dtype)
    exact = linear.precision(q.dtype)
    into = jnp.einsum("BTNH,RNH->BTNR", q[..., : op.nope_dim], key_up, precision=exact)
    into = jnp.concatenate([into, q[..., op.nope_dim :]], axis=-1)
    return into, lambda found: jnp.einsum("BTNR,RNV->BTNV", found, value_up, precision=exact)


def _over_pages(
    state: PagedLatent, parts: Any, kv_up: Any, *, step: Step, op: LatentAttention
) -> tuple[Array, PagedLatent]:
    """Pages are read absorbed whatever the number of new tokens: nothing is expanded."""
    q, latent, rotated = parts
    into, back = _absorb(q, kv_up, op)
    both = jnp.concatenate([latent, rotated], axis=-1)[:, :, None]
    scores = Scores(scale=op.query_scale)
    found, state = attend_latent_pages(state, into, both, step=step, op=op, scores=scores)
    return back(found), state
