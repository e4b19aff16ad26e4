"""The functions behind the inference programs: each is the one `apply`, T the prompt, 1 or all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.infer.programs import Setup, Tail
from jaxllm.infer.sampling import Mode
from jaxllm.nn import api
from jaxllm.ops.fused import fused
from jaxllm.ops.sampling import History, penalize, remember, sample
from jaxllm.spec.model import Pooling
from jaxllm.state.step import Step, dense_step, training_step

__all__ = ["all_logits", "decode_steps", "next_token_nll", "pooled", "prefill_step"]


def _zeros(abstract: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract)


def _next(
    logits: jax.Array, history: History | None, rows: Any, positions: jax.Array, mode: Mode
) -> Tail:
    """Draw the tokens at `positions` [B] from logits [B, V]."""
    if mode == "greedy":
        return Tail(jnp.argmax(logits, axis=-1).astype(jnp.int32), positions)
    if history is None:
        return Tail(sample(logits, rows, positions), positions)
    tokens = sample(penalize(logits, rows, history), rows, positions)
    return Tail(tokens, positions, remember(history, tokens))


def _forward(setup: Setup, params: Any, ids: jax.Array, step: Step, state: Any) -> Any:
    return api.apply(setup.spec, params, ids, step, state, policy=setup.policy)


def _seen(history: History, ids: jax.Array, lengths: jax.Array) -> History:
    """Mark prompt tokens ids [B, T], those past `lengths` left out; nothing is answered yet."""
    vocab = history.prompt.shape[-1]
    real = jnp.arange(ids.shape[1])[None] < lengths[:, None]
    rows = jnp.arange(ids.shape[0])[:, None]
    prompt = history.prompt.at[rows, jnp.where(real, ids, vocab)].set(True, mode="drop")
    return History(prompt, jnp.zeros_like(history.answer))


def prefill_step(setup: Setup, *, capacity: int, mode: Mode, fresh: bool) -> Callable[..., Any]:
    """See `programs.prefill`; a chunk begins at the tail's place, whose drawn token is dropped."""

    def run(params: Any, state: Any, tail: Tail, ids: Any, lengths: Any, rows: Any) -> Any:
        start = tail.positions
        step = dense_step(start, ids.shape[1], fresh=fresh, lengths=lengths)
        hidden, state, _ = _forward(setup, params, ids, step, state)
        end = jnp.maximum(lengths - 1, 0)[:, None, None]
        last = jnp.take_along_axis(hidden, end, axis=1)
        logits = api.unembed(setup.spec, params, last, policy=setup.policy)[:, 0]
        history = None if tail.history is None else _seen(tail.history, ids, lengths)
        new = _next(logits, history, rows, start + lengths, mode)
        # A row that had ended before this chunk keeps the token drawn at its end, and its history.
        going = lengths > 0
        tokens = jnp.where(going, new.tokens, tail.tokens)
        if tail.history is not None and new.history is not None:
            answer = jnp.where(going[:, None], new.history.answer, tail.history.answer)
            history = History(new.history.prompt, answer)
            return state, dataclasses.replace(new, tokens=tokens, history=history)
        return state, dataclasses.replace(new, tokens=tokens)

    def run_fresh(params: Any, ids: Any, lengths: Any, rows: Any) -> Any:
        batch = ids.shape[0]
        state = _zeros(setup.state(batch, capacity))
        return run(params, state, _zeros(setup.tail(batch, mode)), ids, lengths, rows)

    return run_fresh if fresh else run


def decode_steps(setup: Setup, *, mode: Mode, tokens: int) -> Callable[..., Any]:
    """See `programs.decode`."""

    def answer(params: Any, ids: jax.Array, positions: jax.Array, state: Any) -> Any:
        hidden, state, _ = _forward(setup, params, ids, dense_step(positions, 1), state)
        return api.unembed(setup.spec, params, hidden, policy=setup.policy)[:, 0], state

    def run(params: Any, state: Any, tail: Tail, rows: Any) -> Any:
        def one(carry: Any, _: None) -> Any:
            state, tail = carry
            forward = fused(answer, policy=setup.policy, rows=tail.tokens.shape[0])
            logits, state = forward(params, tail.tokens[:, None], tail.positions, state)
            tail = _next(logits, tail.history, rows, tail.positions + 1, mode)
            return (state, tail), tail.tokens

        (state, tail), out = jax.lax.scan(one, (state, tail), None, length=tokens)
        return state, tail, out.T

    return run


def all_logits(setup: Setup) -> Callable[..., Any]:
    """See `programs.logits`."""

    def run(params: Any, ids: jax.Array, lengths: Any = None) -> jax.Array:
        step = dataclasses.replace(training_step(*ids.shape), lengths=lengths)
        hidden, _, _ = _forward(setup, params, ids, step, None)
        out = api.unembed(setup.spec, params, hidden, policy=setup.policy)
        return out.astype(jnp.float32)

    return run


def pooled(setup: Setup, pooling: Pooling) -> Callable[..., Any]:
    """See `programs.embed`; the mean is over real tokens, in float32."""

    def run(params: Any, ids: jax.Array, lengths: jax.Array) -> jax.Array:
        step = dataclasses.replace(training_step(*ids.shape), lengths=lengths)
        hidden, _, _ = _forward(setup, params, ids, step, None)
        hidden = hidden.astype(jnp.float32)
        if pooling.by == "mean":
            real = jnp.arange(ids.shape[1], dtype=lengths.dtype)[None] < lengths[:, None]
            total = jnp.sum(jnp.where(real[..., None], hidden, 0.0), axis=1)
            out = total / lengths[:, None].astype(jnp.float32)
        else:
            place = jnp.zeros_like(lengths) if pooling.by == "cls" else lengths - 1
            out = jnp.take_along_axis(hidden, place[:, None, None], axis=1)[:, 0]
        if pooling.normalize:
            length = jnp.sqrt(jnp.sum(jnp.square(out), axis=-1, keepdims=True))
            out = out / jnp.maximum(length, 1e-12)
        return out

    return run


def next_token_nll(setup: Setup) -> Callable[..., Any]:
    """See `programs.score`; logits exist for 128 positions at a time."""

    def run(params: Any, ids: jax.Array) -> jax.Array:
        hidden, _, _ = _forward(setup, params, ids, training_step(*ids.shape), None)
        batch, length = ids.shape
        targets = jnp.roll(ids, -1, axis=1)
        chunk = min(128, length)
        pad = -length % chunk
        hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0)))
        targets = jnp.pad(targets, ((0, 0), (0, pad)))

        def some(parts: tuple[jax.Array, jax.Array]) -> jax.Array:
            states, wanted = parts
            out = api.unembed(setup.spec, params, states, policy=setup.policy)
            out = out.astype(jnp.float32)
            picked = jnp.take_along_axis(out, wanted[..., None], axis=-1)[..., 0]
            return jax.nn.logsumexp(out, axis=-1) - picked

        split = lambda x: jnp.moveaxis(x.reshape(batch, -1, chunk, *x.shape[2:]), 1, 0)  # noqa: E731
        nll = jax.lax.map(some, (split(hidden), split(targets)))
        return jnp.moveaxis(nll, 0, 1).reshape(batch, -1)[:, : length - 1]

    return run
