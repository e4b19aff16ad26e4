"""Sampling inside the compiled program: penalties, temperature, top-k, top-p, min-p, a seed a request.

Cuts are thresholds found by bisection over the bits of a float, so that nothing is ever sorted: the
threshold of top-k is the largest t for which at least k logits are >= t, that of top-p the largest t
for which the tokens >= t have at least mass p. Ties at a threshold are all kept.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxllm.typing import Slot

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
      repetition: float32; > 1 makes tokens of the prompt and the answer less likely.
      presence: float32; taken off the logit of each token in the answer.
      frequency: float32; taken off once for each time a token is in the answer.
      seed: uint32.
    """

    temperature: Slot
    top_k: Slot
    top_p: Slot
    min_p: Slot
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


def remember(history: History, tokens: jax.Array) -> History:
    """Count new answer tokens [B]."""
    rows = jnp.arange(tokens.shape[0])
    return History(history.prompt, history.answer.at[rows, tokens].add(1))


def penalize(logits: jax.Array, rows: SamplingRows, history: History) -> jax.Array:
    """Logits [B, V] after repetition, presence and frequency penalties.

    Source: arXiv 1909.05858 for repetition; the other two as in OpenAI's API.
    """
    answered = history.answer > 0
    factor = rows.repetition[:, None]
    repeated = jnp.where(logits > 0, logits / factor, logits * factor)
    logits = jnp.where(history.prompt | answered, repeated, logits)
    count, present = (x.astype(logits.dtype) for x in (history.answer, answered))
    return logits - rows.presence[:, None] * present - rows.frequency[:, None] * count


def _ordered(x: jax.Array) -> jax.Array:
    """Integers in the order of the float32 values."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    negative = bits >> 31 == 1
    return jnp.where(negative, ~bits, bits | jnp.uint32(1 << 31))


def _threshold(keys: jax.Array, mass: jax.Array, least: jax.Array) -> jax.Array:
    """The largest t [B, 1] with sum(mass where keys >= t) >= least; keys and mass [B, V]."""

    def bit(i: jax.Array, found: jax.Array) -> jax.Array:
        trial = found | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        reached = jnp.sum(jnp.where(keys >= trial, mass, 0.0), axis=-1, keepdims=True) >= least
        return jnp.where(reached, trial, found)

    return jax.lax.fori_loop(0, 32, bit, jnp.zeros_like(keys[:, :1]))


def _cut(scaled: jax.Array, rows: SamplingRows) -> jax.Array:
    """Logits [B, V] with everything outside top-k, top-p and min-p at -inf, in this order."""
    keys = _ordered(scaled)

    def by_count(x: jax.Array) -> jax.Array:
        k = jnp.where(rows.top_k > 0, rows.top_k, x.shape[-1])[:, None].astype(jnp.float32)
        return jnp.where(keys >= _threshold(keys, jnp.ones_like(x), k), x, -jnp.inf)

    def by_mass(x: jax.Array) -> jax.Array:
        p = jax.nn.softmax(x, axis=-1)
        floor = _threshold(keys, p, rows.top_p[:, None])
        return jnp.where((keys >= floor) | (rows.top_p[:, None] >= 1), x, -jnp.inf)

    scaled = jax.lax.cond(jnp.any(rows.top_k > 0), by_count, lambda x: x, scaled)
    scaled = jax.lax.cond(jnp.any(rows.top_p < 1), by_mass, lambda x: x, scaled)
    peak = jnp.max(scaled, axis=-1, keepdims=True)
    return jnp.where(scaled - peak >= jnp.log(rows.min_p)[:, None], scaled, -jnp.inf)


def sample(logits: jax.Array, rows: SamplingRows, positions: jax.Array) -> jax.Array:
    """One token a row.

    The draw depends on the row's seed and position alone, whatever else is in the batch.

    Args:
      logits: [B, V] float32, penalised already.
      rows: options.
      positions: [B] integers, the place that the token will take in its sequence.

    Returns:
      [B] int32.
    """
    best = jnp.argmax(logits, axis=-1)
    warm = rows.temperature > 0
    scaled = logits / jnp.where(warm, rows.temperature, 1.0)[:, None]
    scaled = _cut(scaled, rows)

    def noise(seed: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), position)
        return jax.random.gumbel(key, logits.shape[-1:], jnp.float32)

    drawn = jnp.argmax(scaled + jax.vmap(noise)(rows.seed, positions), axis=-1)
    return jnp.where(warm, drawn, best).astype(jnp.int32)
