"""The function behind a serving step: feed a flat batch, draw a token for every row or place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxllm.infer.programs import Setup
from jaxllm.nn import api
from jaxllm.ops.flat import Flat
from jaxllm.ops.fused import fused
from jaxllm.ops.pages import PageTable
from jaxllm.ops.sampling import History, penalize, sample
from jaxllm.serve.programs import TOP, Carry, Drawn, Memory, Options, Shape, unpack
from jaxllm.state.step import Step, flat_step

__all__ = ["serve_step"]

Setups = tuple[Setup, Setup | None]


@dataclasses.dataclass(frozen=True)
class _Places:
    """Where tokens are drawn: at the end of every row, or after every token.

    Attributes:
      slots: [P] int32.
      used: [P] booleans.
      positions: [P] int32, of the token that is drawn.
      offsets: [P] int32, tokens of the row before this one, or None at the ends of rows.
    """

    slots: Array
    used: Array
    positions: Array
    offsets: Array | None = None


def _places(flat: Flat, shape: Shape) -> _Places:
    if not shape.every:
        return _Places(flat.slots, flat.counts > 0, flat.starts + flat.counts)
    owner = flat.owners(shape.tokens)
    row = jnp.minimum(owner, shape.rows - 1)
    offsets = jnp.arange(shape.tokens, dtype=jnp.int32) - jnp.take(flat.firsts, row)
    return _Places(
        jnp.take(flat.slots, row),
        owner < shape.rows,
        jnp.take(flat.starts, row) + offsets + 1,
        offsets,
    )


def _before(x: Array, count: int) -> Array:
    """What stands `count` places before each; anything at the first ones."""
    return jnp.roll(x, count)


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
    asked = flat.positions(length) < jnp.take(new["prompts"], row)
    ids, place = new["ids"], jnp.take(slot, row)
    prompt = prompt.at[jnp.where(real & asked, place, slots), ids].set(True, mode="drop")
    answer = answer.at[jnp.where(real & ~asked, place, slots), ids].add(1, mode="drop")
    return History(prompt, answer)


def _drafted(answer: Array, ids: Array, offsets: Array, longest: int) -> Array:
    """Answer counts [P, V] with each place's token and those of its row before it."""
    places = jnp.arange(ids.shape[0])
    for back in range(longest):
        inside = (offsets >= back).astype(answer.dtype)
        answer = answer.at[places, _before(ids, back)].add(inside)
    return answer


def _accepted(tokens: Array, ids: Array, places: _Places, longest: int) -> Array:
    """Whether each place's token [P] is one that stays: a row's first, or a draft that was drawn
    at the place before, after others that were."""
    offsets = places.offsets
    assert offsets is not None
    right = (offsets == 0) | (_before(tokens, 1) == ids)
    stays = right & places.used
    for back in range(1, longest):
        stays = stays & ((offsets < back) | _before(right, back))
    return stays


def _allowed(logits: Array, masks: Array, masked: Array) -> Array:
    """Logits [P, V] with -inf where a masked place's bit of masks [P, words] is 0."""
    bits = masks[:, :, None] >> jnp.arange(32, dtype=jnp.int32)[None, None]
    may = (bits.reshape(bits.shape[0], -1)[:, : logits.shape[-1]] & 1) > 0
    return jnp.where(may | ~masked[:, None], logits, -jnp.inf)


def _draw(
    logits: Array,
    options: Options,
    places: _Places,
    masks: tuple[Array, Array],
    seen: Callable[[], History],
) -> Drawn:
    """A token for each place of logits [P, V]; what no place asks for is not computed."""
    take = lambda x: jnp.take(x, places.slots, axis=0, mode="clip")  # noqa: E731
    used = places.used
    rows = jax.tree.map(take, options.rows)
    penalized, wanted = take(options.penalized) & used, take(options.logprobs) & used
    ids, bias = take(options.bias_ids), take(options.bias)

    def biased(x: Array) -> Array:
        return x.at[jnp.arange(x.shape[0])[:, None], ids].add(bias, mode="drop")

    def punished(x: Array) -> Array:
        return jnp.where(penalized[:, None], penalize(x, rows, seen()), x)

    def altered(x: Array) -> Array:
        x = jax.lax.cond(jnp.any(penalized), punished, lambda x: x, biased(x))
        return _allowed(x, *masks)

    # One choice for all three: where it is not taken, a GPU copies the logits.
    has_bias = jnp.any(ids < logits.shape[-1], axis=-1) & used
    asked = jnp.any(has_bias | penalized | masks[1])
    changed = jax.lax.cond(asked, altered, lambda x: x, logits)
    tokens = _chosen(changed, rows, places.positions, False, used)

    def scored(x: Array) -> Drawn:
        logs = jax.nn.log_softmax(x, axis=-1)
        top, found = jax.lax.top_k(logs, min(TOP, x.shape[-1]))
        short = ((0, 0), (0, TOP - top.shape[-1]))
        own = jnp.take_along_axis(logs, tokens[:, None], axis=-1)[:, 0]
        return Drawn(tokens, own, jnp.pad(found.astype(jnp.int32), short), jnp.pad(top, short))

    return jax.lax.cond(jnp.any(wanted), scored, lambda _: _unscored(tokens), logits)


def _unscored(tokens: Array) -> Drawn:
    """Tokens whose log probabilities nobody wants."""
    none = jnp.zeros((tokens.shape[0], TOP), jnp.float32)
    return Drawn(tokens, none[:, 0], jnp.zeros(none.shape, jnp.int32), none)


def _tables(memory: Memory, new: dict[str, Array]) -> dict[str, PageTable]:
    """Page tables of a step's integers, as arrays of their own: XLA would have every kernel that
    reads them cut them out again, in a CUDA graph inside the step's, and outside before CUDA 12.9.
    """
    own = jax.lax.optimization_barrier
    return {
        group: PageTable(own(new[f"pages:{group}"]), own(new[f"firsts:{group}"]), spare=True)
        for group in memory.windows
    }


def _logits(setups: Setups, shape: Shape, params: Any, state: Any, batch: Any) -> tuple[Array, Any]:
    """(float32 logits of what is drawn, state) of a batch: (ids, flat, table).

    A draft model takes in the same tokens, so that its pages hold what the model's do.
    """
    (setup, draft), (params, others), (state, other) = setups, params, state
    ids, flat, table = batch
    step = flat_step(flat, shape.tokens, table)
    if draft is not None and not shape.drafts:
        _, other, _ = api.apply(draft.spec, others, ids[None], step, other, policy=draft.policy)

    def answer(params: Any, state: Any, ids: Array, step: Step) -> tuple[Array, Any]:
        hidden, state, _ = api.apply(
            setup.spec, params, ids[None], step, state, policy=setup.policy
        )
        if shape.longest > 1 and not shape.every:
            ends = jnp.clip(flat.firsts + flat.counts - 1, 0, shape.tokens - 1)
            hidden = hidden[:, ends]
        return api.unembed(setup.spec, params, hidden, policy=setup.policy)[0], state

    forward = fused(answer, policy=setup.policy, rows=shape.tokens)
    logits, state = forward(params, state, ids, step)
    return logits.astype(jnp.float32), (state, other)


def serve_step(setups: Setups, memory: Memory, shape: Shape) -> Callable[..., Any]:
    """See `programs.step`; setups are those of the model and of the draft model or None."""
    parts = shape.parts(memory)
    make = _several if shape.steps > 1 else _guessed if shape.drafts else _once
    body = make(setups, memory, shape)

    def run(params: Any, state: Any, carry: Carry, options: Any, packed: Any, masks: Any) -> Any:
        return body((params, state, carry), options, unpack(packed, parts), masks)

    return run


def _several(setups: Setups, memory: Memory, shape: Shape) -> Callable[..., Any]:
    """Steps of greedy decoding, each row in as many as its count."""

    def run(held: Any, options: Options, new: dict[str, Array], masks: Array) -> Any:
        del options, masks
        params, state, carry = held
        counts, starts, slots = new["counts"], new["starts"], new["slots"]
        table = _tables(memory, new)
        last = jnp.take(carry.last, slots, mode="clip")
        last = jnp.where(new["unread"] > 0, last, new["ids"])

        def one(held: Any, i: Array) -> Any:
            state, last = held
            going = i < counts
            flat = Flat(going.astype(jnp.int32), starts + i, slots, 1)
            logits, state = _logits(setups, shape, params, state, (last, flat, table))
            last = jnp.where(going, jnp.argmax(logits, axis=-1).astype(jnp.int32), last)
            return (state, last), last

        count = jnp.arange(shape.steps, dtype=jnp.int32)
        (state, last), tokens = jax.lax.scan(one, (state, last), count)
        after = carry.last.at[slots].set(last, mode="drop")
        return state, Carry(after, carry.history), _unscored(tokens.T.reshape(-1))

    return run


def _guessed(setups: Setups, memory: Memory, shape: Shape) -> Callable[..., Any]:
    """The draft model guesses what follows each row's token, by the same noise, and the model
    verifies; the last guess is fed as well, so that the pages of both hold the same tokens."""
    draft, verify = setups[1], _once(setups, memory, shape)
    assert draft is not None

    def run(held: Any, options: Options, new: dict[str, Array], masks: Array) -> Any:
        params, (state, other), carry = held
        counts, starts, slots = new["counts"], new["starts"], new["slots"]
        table, rows = _tables(memory, new), options.rows
        rows = jax.tree.map(lambda x: jnp.take(x, slots, axis=0, mode="clip"), rows)
        last = jnp.take(carry.last, slots, mode="clip")
        last = jnp.where(new["unread"] > 0, last, new["ids"][: shape.rows])
        once = dataclasses.replace(shape, tokens=shape.rows, longest=1, every=False)

        def one(held: Any, i: Array) -> Any:
            other, last = held
            going = i < counts
            flat = Flat(going.astype(jnp.int32), starts + i, slots, 1)
            batch = (last, flat, table)
            logits, (other, _) = _logits(
                (draft, None), once, (params[1], None), (other, None), batch
            )
            guess = _chosen(logits, rows, starts + i + 1, shape.greedy, going)
            return (other, jnp.where(going, guess, last)), last

        places = jnp.arange(1 + shape.drafts, dtype=jnp.int32)
        (other, _), fed = jax.lax.scan(one, (other, last), places)
        flat = Flat(counts, starts, slots, shape.longest)
        row = jnp.minimum(flat.owners(shape.tokens), shape.rows - 1)
        offsets = jnp.arange(shape.tokens, dtype=jnp.int32) - jnp.take(flat.firsts, row)
        ids = fed[jnp.clip(offsets, 0, shape.drafts), row]
        new = new | {"ids": ids, "unread": jnp.zeros_like(counts)}
        return verify((params, (state, other), carry), options, new, masks)

    return run


def _chosen(logits: Array, rows: Any, positions: Array, greedy: bool, used: Array) -> Array:
    """A token of each row of logits [R, V], by temperature and what cuts the tail off."""
    best = lambda x: jnp.argmax(x, axis=-1).astype(jnp.int32)  # noqa: E731
    if greedy:
        return best(logits)
    drawn = jnp.any((rows.temperature > 0) & used)
    return jax.lax.cond(drawn, lambda x: sample(x, rows, positions), best, logits)


def _once(setups: Setups, memory: Memory, shape: Shape) -> Callable[..., Any]:
    """One step of anything."""

    def run(held: Any, options: Options, new: dict[str, Array], masks: Array) -> Any:
        params, state, carry = held
        flat = Flat(new["counts"], new["starts"], new["slots"], shape.longest)
        table = _tables(memory, new)
        row = jnp.minimum(flat.owners(shape.tokens), shape.rows - 1)
        last = jnp.take(carry.last, flat.slots, mode="clip")
        new["ids"] = jnp.where(new["unread"][row] > 0, last[row], new["ids"])
        logits, state = _logits(setups, shape, params, state, (new["ids"], flat, table))
        places, limits = _places(flat, shape), (masks, new["masked"] > 0)
        penalized = jnp.take(options.penalized, places.slots, mode="clip") & places.used
        take = lambda x: jnp.take(x, places.slots, axis=0, mode="clip")  # noqa: E731
        history, offsets, ids = carry.history, places.offsets, new["ids"]

        def seen() -> History:
            answer = take(history.answer)
            if offsets is not None:
                answer = _drafted(answer, ids, offsets, shape.longest)
            return History(take(history.prompt), answer)

        if not (shape.every or shape.greedy):
            history = jax.lax.cond(
                jnp.any(penalized),
                lambda h: _seen(h, new, flat, penalized),
                lambda h: h,
                carry.history,
            )
        if shape.greedy:
            drawn = _unscored(jnp.argmax(logits, axis=-1).astype(jnp.int32))
        else:
            drawn = _draw(logits, options, places, limits, seen)
        if offsets is None:
            tokens = carry.last.at[flat.slots].set(drawn.tokens, mode="drop")
            return state, Carry(tokens, history), drawn
        stays = _accepted(drawn.tokens, ids, places, shape.longest)
        ends = stays & ~(jnp.roll(stays, -1) & (jnp.roll(offsets, -1) > 0))
        last = jnp.where(ends, places.slots, memory.slots)
        tokens = carry.last.at[last].set(drawn.tokens, mode="drop")
        if not shape.greedy:
            kept = jnp.where(stays & penalized, places.slots, memory.slots)
            answer = jax.lax.cond(
                jnp.any(penalized),
                lambda x: x.at[kept, ids].add(1, mode="drop"),
                lambda x: x,
                history.answer,
            )
            history = History(history.prompt, answer)
        if shape.drafts:
            drawn = dataclasses.replace(drawn, tokens=jnp.where(stays, drawn.tokens, -1))
        return state, Carry(tokens, history), drawn

    return run
