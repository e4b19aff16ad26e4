"""Routing: which experts a token goes to, with what weight, and how evenly; all in float32."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxllm.spec.moe import MoE, Router
from jaxllm.typing import AnyArray, Slot

__all__ = [
    "Routing",
    "balance_step",
    "load_balance",
    "load_entropy",
    "loads",
    "max_violation",
    "route",
    "router_z",
]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """Who goes where.

    Attributes:
      experts: [B, T, A] int32, the chosen experts.
      weights: [B, T, A] float32.
      shares: [B, T, E] float32, scores that sum to 1 over the experts: what balance losses move.
    """

    experts: Slot
    weights: Slot
    shares: Slot


def route(
    logits: Float[Array, "B T E"], op: MoE, balance_bias: Float[AnyArray, "E"] | None = None
) -> Routing:
    """Choose A experts a token by score plus bias, and weigh them by score alone.

    Args:
      logits: of the router, float32.
      op: how to choose and weigh.
      balance_bias: moves the choice and has no gradient.
    """
    router = op.router
    if router.score == "sigmoid":
        scores = jax.nn.sigmoid(logits)
        shares = scores / jnp.maximum(jnp.sum(scores, axis=-1, keepdims=True), 1e-20)
    else:
        scores = shares = jax.nn.softmax(logits, axis=-1)
    choice = logits if router.over_chosen else scores
    if balance_bias is not None:
        choice = choice + jax.lax.expand_dims(balance_bias.astype(jnp.float32), (0, 1))
    choice = jax.lax.stop_gradient(choice)
    if router.groups > 1:
        choice = _among_best_groups(choice, router)
    _, experts = jax.lax.top_k(choice, op.active)
    weights = jnp.take_along_axis(logits if router.over_chosen else scores, experts, axis=-1)
    if router.over_chosen:
        weights = jax.nn.softmax(weights, axis=-1)
    if router.renormalize:
        weights = weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1e-20)
    return Routing(experts, weights * router.scale, shares)


def _among_best_groups(choice: Float[Array, "B T E"], router: Router) -> Float[Array, "B T E"]:
    """-inf for experts outside of the best groups."""
    grouped = choice.reshape(*choice.shape[:2], router.groups, -1)
    best, _ = jax.lax.top_k(grouped, 2 if router.group_score == "two" else 1)
    _, kept = jax.lax.top_k(jnp.sum(best, axis=-1), router.groups_kept)
    member = jnp.any(jax.nn.one_hot(kept, router.groups, dtype=bool), axis=-2)
    return jnp.where(member[..., None], grouped, -jnp.inf).reshape(choice.shape)


def loads(
    experts: Int[Array, "B T A"], count: int, real: Bool[Array, "B T"] | None = None
) -> Float[Array, "B E"]:
    """How many of a row's real tokens chose each expert."""
    chosen = jnp.sum(jax.nn.one_hot(experts, count, dtype=jnp.float32), axis=2)
    if real is not None:
        chosen = jnp.where(real[..., None], chosen, 0.0)
    return jnp.sum(chosen, axis=1)


def load_balance(
    routing: Routing, real: Bool[Array, "B T"] | None = None, *, by_row: bool = False
) -> Float[Array, ""]:
    """E sum_e f_e p_e over the tokens of the batch. Source: arXiv 2101.03961, eq. 4.

    f_e is the share of all choices that fell on expert e (they sum to 1, whatever A is) and p_e the
    mean share of its scores; only p_e has a gradient. Perfect balance gives 1, one expert for all
    E. The public Mixtral code counts f_e a token and so has A times this number.

    Args:
      routing: of one layer.
      real: which tokens count; all by default.
      by_row: the mean over rows of each row's own number, which asks for balance within a sequence
        (arXiv 2412.19437, eq. 17).
    """
    batch, length, count = routing.shares.shape
    ones = jnp.ones((batch, length), jnp.float32) if real is None else real.astype(jnp.float32)
    chosen = loads(routing.experts, count, real)
    shares, tokens = jnp.sum(routing.shares * ones[..., None], axis=1), jnp.sum(ones, axis=1)
    if not by_row:
        chosen, shares, tokens = (
            jnp.sum(x, axis=0, keepdims=True) for x in (chosen, shares, tokens)
        )
    some = jnp.maximum(tokens, 1.0)
    active = routing.experts.shape[-1]
    each = count * jnp.sum(chosen * shares, axis=-1) / (active * some * some)
    rows = jnp.maximum(jnp.sum(tokens > 0), 1).astype(jnp.float32)
    return jnp.sum(each) / rows


def router_z(
    logits: Float[Array, "B T E"], real: Bool[Array, "B T"] | None = None
) -> Float[Array, ""]:
    """Mean over tokens of (log sum_e exp logit_e)^2, which keeps logits small.

    Source: arXiv 2202.08906, eq. 5.
    """
    each = jnp.square(jax.nn.logsumexp(logits, axis=-1))
    ones = jnp.ones(each.shape, jnp.float32) if real is None else real.astype(jnp.float32)
    return jnp.sum(each * ones) / jnp.maximum(jnp.sum(ones), 1.0)


def load_entropy(load: Float[Array, "*layers E"]) -> Float[Array, "*layers"]:
    """Entropy, in nats, of how choices fall on experts; log E is perfect balance."""
    share = load / jnp.maximum(jnp.sum(load, axis=-1, keepdims=True), 1.0)
    return -jnp.sum(share * jnp.log(jnp.where(share > 0, share, 1.0)), axis=-1)


def max_violation(load: Float[Array, "*layers E"]) -> Float[Array, "*layers"]:
    """By how much the fullest expert exceeds the mean load, as a share of it; 0 is balance."""
    mean = jnp.mean(load, axis=-1)
    return jnp.max(load, axis=-1) / jnp.where(mean > 0, mean, 1.0) - 1.0


def balance_step(
    bias: Float[AnyArray, "*layers E"], load: Float[Array, "*layers E"], rate: float
) -> Float[Array, "*layers E"]:
    """The balance bias after a step: + rate for experts below the mean load, - rate above it.

    Source: arXiv 2408.15664.
    """
    error = jnp.mean(load, axis=-1, keepdims=True) - load
    moved = jnp.asarray(bias).astype(jnp.float32) + rate * jnp.sign(error)
    return moved.astype(bias.dtype)
