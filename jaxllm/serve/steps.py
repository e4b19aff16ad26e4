"""The function behind a serving step: feed a flat batch, draw a token for every row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxllm.infer.programs import Setup
from jaxllm.nn import api
from jaxllm.ops.flat import Flat
from jaxllm.ops.paged import PageTable
from jaxllm.ops.sampling import History, penalize, sample
from jaxllm.serve.programs import TOP, Carry, Drawn, Memory, Options, Shape, unpack
from jaxllm.state.step import flat_step

__all__ = ["serve_step"]


def _seen(history: History, new: dict[str, Array], flat: Flat, penalized: Array) -> History:
    """The history of penalised rows with the fed tokens in it; rows that begin forget first.

    A token counts when it is fed, so that one that is computed again after a preemption counts
    again from nothing.
    """
    slots = history.prompt.shape[0]
    slot = jnp.where(penalized, flat.slots, slots)
    begun = jnp.where(new["begins"] > 0, slot, slots)
    prompt = history.prompt.at[begun].set(False, mode="drop")
    answer = history.answer.at[begun].set(0, mode="drop")
    length = new["ids"].shape[0]
    owner = flat.owners(length)
    row = jnp.minimum(owner, slot.shape[0] - 1)
    real = owner < slot.shape[0]
    position = jnp.take(flat.starts - flat.firsts, row) + jnp.arange(length, dtype=jnp.int32)
    asked = position < jnp.take(new["prompts"], row)
    ids, place = new["ids"], jnp.take(slot, row)
    prompt = prompt.at[jnp.where(real & asked, place, slots), ids].set(True, mode="drop")
    answer = answer.at[jnp.where(real & ~asked, place, slots), ids].add(1, mode="drop")
    return History(prompt, answer)


def _draw(logits: Array, options: Options, history: History, flat: Flat, positions: Array) -> Drawn:
    """A token for each row of logits [R, V]; what no row asks for is not computed."""
    take = lambda x: jnp.take(x, flat.slots, axis=0, mode="clip")  # noqa: E731
    used = flat.counts > 0
    rows = jax.tree.map(take, options.rows)
    penalized, wanted = take(options.penalized) & used, take(options.logprobs) & used
    ids, bias = take(options.bias_ids), take(options.bias)

    def biased(x: Array) -> Array:
        return x.at[jnp.arange(x.shape[0])[:, None], ids].add(bias, mode="drop")

    def punished(x: Array) -> Array:
        seen = History(take(history.prompt), take(history.answer))
        return jnp.where(penalized[:, None], penalize(x, rows, seen), x)

    has_bias = jnp.any((ids < logits.shape[-1]) & used[:, None])
    changed = jax.lax.cond(has_bias, biased, lambda x: x, logits)
    changed = jax.lax.cond(jnp.any(penalized), punished, lambda x: x, changed)
    tokens = jax.lax.cond(
        jnp.any((rows.temperature > 0) & used),
        lambda x: sample(x, rows, positions),
        lambda x: jnp.argmax(x, axis=-1).astype(jnp.int32),
        changed,
    )

    def scored(x: Array) -> Drawn:
        logs = jax.nn.log_softmax(x, axis=-1)
        top, places = jax.lax.top_k(logs, min(TOP, x.shape[-1]))
        short = ((0, 0), (0, TOP - top.shape[-1]))
        own = jnp.take_along_axis(logs, tokens[:, None], axis=-1)[:, 0]
        return Drawn(tokens, own, jnp.pad(places.astype(jnp.int32), short), jnp.pad(top, short))

    return jax.lax.cond(jnp.any(wanted), scored, lambda _: _unscored(tokens), logits)


def _unscored(tokens: Array) -> Drawn:
    """Tokens whose log probabilities nobody wants."""
    none = jnp.zeros((tokens.shape[0], TOP), jnp.float32)
    return Drawn(tokens, none[:, 0], jnp.zeros(none.shape, jnp.int32), none)


def serve_step(setup: Setup, memory: Memory, shape: Shape) -> Callable[..., Any]:
    """See `programs.step`."""
    parts = shape.parts(memory)

    def run(params: Any, state: Any, carry: Carry, options: Options, packed: Array) -> Any:
        new = unpack(packed, parts)
        flat = Flat(new["counts"], new["starts"], new["slots"], shape.longest)
        table = {
            group: PageTable(new[f"pages:{group}"], new[f"firsts:{group}"])
            for group in memory.windows
        }
        row = jnp.minimum(flat.owners(shape.tokens), shape.rows - 1)
        last = jnp.take(carry.last, flat.slots, mode="clip")
        new["ids"] = jnp.where(new["unread"][row] > 0, last[row], new["ids"])
        step = flat_step(flat, shape.tokens, table)
        hidden, state, _ = api.apply(
            setup.spec, params, new["ids"][None], step, state, policy=setup.policy
        )
        if shape.longest > 1:
            ends = jnp.clip(flat.firsts + flat.counts - 1, 0, shape.tokens - 1)
            hidden = hidden[:, ends]
        logits = api.unembed(setup.spec, params, hidden, policy=setup.policy)[0]
        if shape.greedy:
            drawn = _unscored(jnp.argmax(logits.astype(jnp.float32), axis=-1).astype(jnp.int32))
            tokens = carry.last.at[flat.slots].set(drawn.tokens, mode="drop")
            return state, Carry(tokens, carry.history), drawn
        penalized = jnp.take(options.penalized, flat.slots, mode="clip") & (flat.counts > 0)
        history = jax.lax.cond(
            jnp.any(penalized),
            lambda h: _seen(h, new, flat, penalized),
            lambda h: h,
            carry.history,
        )
        positions = flat.starts + flat.counts
        drawn = _draw(logits.astype(jnp.float32), options, history, flat, positions)
        tokens = carry.last.at[flat.slots].set(drawn.tokens, mode="drop")
        return state, Carry(tokens, history), drawn

    return run
