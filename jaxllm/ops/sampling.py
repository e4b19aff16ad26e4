"""Sampling in the compiled program: penalties, temperature, cuts, a seed a request.

Cuts are thresholds found by bisection over the bits of a float, so that nothing is ever sorted: the
threshold of top-k is the largest t for which at least k logits are >= t, that of top-p the largest
t for which the tokens >= t have at least mass p. Ties at a threshold are all kept.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int32, UInt32

from jaxllm.typing import AnyArray, Slot

__all__ = ["History", "SamplingRows", "penalize", "remember", "sample"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingRows:
    """Sampling options of every row of a batch, as data: all [B].

    Attributes:
      temperature: float32; 0 takes the most likely token.
      top_k: int32; 0 keeps all.
      top_p: float32 in (0, 1]; 1 keeps all.
      min_p: float32 in [0, 1); least probability relative to the most likely token.
      typical: float32 in (0, 1]; 1 keeps all.
      repetition: float32; > 1 makes tokens of the prompt and the answer less likely.
      presence: float32; taken off the logit of each token in the answer.
      frequency: float32; taken off once for each time a token is in the answer.
      seed: uint32.
    """

    temperature: Slot
    top_k: Slot
    top_p: Slot
    min_p: Slot
    typical: Slot
    repetition: Slot
    presence: Slot
    frequency: Slot
    seed: Slot


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class History:
    """Which tokens a row has seen: prompt [B, V] booleans, answer [B, V] counts."""

    prompt: Slot
    answer: Slot


def remember(history: History, tokens: Int[AnyArray, "B"]) -> History:
    """Count new answer tokens."""
    rows = jnp.arange(tokens.shape[0])
    return History(history.prompt, history.answer.at[rows, tokens].add(1))


def penalize(
    logits: Float[Array, "B V"], rows: SamplingRows, history: History
) -> Float[Array, "B V"]:
    """Logits after repetition, presence and frequency penalties.

    Source: arXiv 1909.05858 for repetition; the other two as in OpenAI's API.
    """
    answered = history.answer > 0
    factor = rows.repetition[:, None]
    repeated = jnp.where(logits > 0, logits / factor, logits * factor)
    logits = jnp.where(history.prompt | answered, repeated, logits)
    count, present = (x.astype(logits.dtype) for x in (history.answer, answered))
    return logits - rows.presence[:, None] * present - rows.frequency[:, None] * count


def _ordered(x: Float32[Array, "*dims"]) -> UInt32[Array, "*dims"]:
    """Integers in the order of the float32 values."""
    x = jnp.where(x == 0, 0.0, x)  # -0 is no less than 0
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    negative = bits >> 31 == 1
    return jnp.where(negative, ~bits, bits | jnp.uint32(1 << 31))


def _threshold(
    keys: UInt32[Array, "B V"], mass: Float32[Array, "B V"], least: Float32[AnyArray, "B 1"]
) -> UInt32[Array, "B 1"]:
    """The largest t with sum(mass where keys >= t) >= least."""

    def bit(i: Array, found: Array) -> Array:
        trial = found | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        reached = jnp.sum(jnp.where(keys >= trial, mass, 0.0), axis=-1, keepdims=True) >= least
        return jnp.where(reached, trial, found)

    return jax.lax.fori_loop(0, 32, bit, jnp.zeros_like(keys[:, :1]))


def _strangeness(scaled: Float32[Array, "B V"]) -> Float32[Array, "B V"]:
    """How far each token's surprise is from the entropy. Source: arXiv 2202.00666."""
    logs = jax.nn.log_softmax(scaled, axis=-1)
    terms = jnp.where(jnp.isfinite(logs), jnp.exp(logs) * logs, 0.0)
    entropy = -jnp.sum(terms, axis=-1, keepdims=True)
    return jnp.abs(-logs - entropy)


def _cut(scaled: Float32[Array, "B V"], rows: SamplingRows) -> Float32[Array, "B V"]:
    """Logits with what is outside top-k, top-p, typical-p and min-p at -inf, in this order."""
    keys = _ordered(scaled)

    def by_count(x: Array) -> Array:
        k = jnp.where(rows.top_k > 0, rows.top_k, x.shape[-1])[:, None].astype(jnp.float32)
        return jnp.where(keys >= _threshold(keys, jnp.ones_like(x), k), x, -jnp.inf)

    def by_mass(x: Array) -> Array:
        p = jax.nn.softmax(x, axis=-1)
        floor = _threshold(keys, p, rows.top_p[:, None])
        return jnp.where((keys >= floor) | (rows.top_p[:, None] >= 1), x, -jnp.inf)

    def typical(x: Array) -> Array:
        wanted = rows.typical[:, None]
        far = _strangeness(x)
        nearness = _ordered(-far)
        floor = _threshold(nearness, jax.nn.softmax(x, axis=-1), wanted)
        return jnp.where((nearness >= floor) | (wanted >= 1), x, -jnp.inf)

    scaled = jax.lax.cond(jnp.any(rows.top_k > 0), by_count, lambda x: x, scaled)
    scaled = jax.lax.cond(jnp.any(rows.top_p < 1), by_mass, lambda x: x, scaled)
    scaled = jax.lax.cond(jnp.any(rows.typical < 1), typical, lambda x: x, scaled)
    peak = jnp.max(scaled, axis=-1, keepdims=True)
    return jnp.where(scaled - peak >= jnp.log(rows.min_p)[:, None], scaled, -jnp.inf)


def sample(
    logits: Float32[Array, "B V"], rows: SamplingRows, positions: Int[AnyArray, "B"]
) -> Int32[Array, "B"]:
    """One token a row.

    The draw depends on the row's seed and position alone, whatever else is in the batch.

    Args:
      logits: penalised already.
      rows: options.
      positions: the place that the token will take in its sequence.
    """
    best = jnp.argmax(logits, axis=-1)
    warm = rows.temperature > 0
    # From the peak down: no temperature, however small, makes infinities meet.
    above = logits - jnp.max(logits, axis=-1, keepdims=True)
    scaled = _cut(above / jnp.where(warm, rows.temperature, 1.0)[:, None], rows)

    def noise(seed: AnyArray, position: AnyArray) -> Array:
        key = jax.random.fold_in(jax.random.key(seed), position)
        return jax.random.gumbel(key, logits.shape[-1:], jnp.float32)

    drawn = jnp.argmax(scaled + jax.vmap(noise)(rows.seed, positions), axis=-1)
    return jnp.where(warm, drawn, best).astype(jnp.int32)
