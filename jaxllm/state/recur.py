"""Recurrent state: the one place that dispatches on how inputs and matrices are carried on.

An op with a recurrence reads what came before by `convolve` and `initial`, and hands on what comes
after by `convolve` and `carry`; `recurrence` is the two around a scan. In training the state is
None and every row begins from zero. With a state a row whose first token has position 0 begins from
zero whatever the state holds (a reused place may hold NaN), and one without real tokens keeps it.

In a flat batch the rows of the state are slots; the tokens of each sequence become a row, and its
slot is read and written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxllm.errors import UnsupportedError
from jaxllm.ops.conv import causal_conv, next_tail
from jaxllm.ops.flat import Flat, from_rows, to_rows
from jaxllm.state.step import Step, dense_step, real_tokens
from jaxllm.typing import AnyArray, Slot

__all__ = [
    "ConvTail",
    "Recurrence",
    "carry",
    "convolve",
    "in_rows",
    "initial",
    "recurrence",
    "resets",
    "sequence_starts",
]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ConvTail:
    """The last W - 1 inputs [B, W-1, *C] of a causal convolution, zeros before a sequence."""

    inputs: Slot


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Recurrence:
    """The matrix (or whatever is carried) of a recurrence [B, ...], in float32."""

    values: Slot


def _real(step: Step) -> Bool[Array, "B T"]:
    real = real_tokens(step)
    return jnp.ones(step.positions.shape, bool) if real is None else real


def sequence_starts(step: Step) -> Bool[Array, "B T"]:
    """Which real tokens begin a sequence: a first token of position 0, and every new segment."""
    first = jnp.asarray(step.positions)[:, :1] == 0
    if step.segment_ids is None:
        rest = jnp.zeros((first.shape[0], step.positions.shape[1] - 1), bool)
    else:
        ids = jnp.asarray(step.segment_ids)
        rest = ids[:, 1:] != ids[:, :-1]
    return jnp.concatenate([first, rest], axis=1) & _real(step)


def resets(step: Step) -> Bool[Array, "B T"] | None:
    """The starts that a recurrence must look at within the row, or None if there can be none.

    That a row may begin at its first token is up to `initial`.
    """
    return None if step.segment_ids is None else sequence_starts(step)


def initial(state: Any, step: Step) -> Float[Array, "B ..."] | None:
    """What a recurrence begins from, in float32; None stands for zeros.

    Raises:
      UnsupportedError: the state is of another kind.
    """
    _check(state, Recurrence)
    if state is None or step.fresh:
        return None
    return _unless_begun(state.values, step).astype(jnp.float32)


def carry(state: Any, final: Float[Array, "B ..."]) -> Recurrence | None:
    """The state after the step, from what the recurrence ended with; None in training."""
    return None if state is None else Recurrence(final.astype(state.values.dtype))


def in_rows(
    state: Any, tokens: Any, run: Callable[[Any, Any, Step], tuple[Array, Any]], *, step: Step
) -> tuple[Array, Any]:
    """run(tokens, state, step), with a row for each sequence where the step has one row for all.

    Args:
      state: None (training) or a tree of `ConvTail` and `Recurrence`.
      tokens: a tree of arrays [B, T, ...].
      run: (tokens, state, step) -> (y [B, T, ...], the new state, a tree like the old one).
      step: where the tokens stand.
    """
    if state is None or step.flat is None:
        return run(tokens, state, step)
    flat = step.flat
    held = jax.tree.map(lambda x: _read(x, flat), state)
    y, new = run(jax.tree.map(lambda x: to_rows(x, flat), tokens), held, _row_step(flat))
    new = jax.tree.map(lambda old, x: _write(old, x, flat), state, new)
    return from_rows(y, flat, step.positions.shape[1]), new


def recurrence(
    state: Any, tokens: Any, run: Callable[..., tuple[Array, Array]], *, step: Step
) -> tuple[Array, Recurrence | None]:
    """A scan between what is remembered before the step and after it.

    Args:
      state: None (training) or the op's `Recurrence`.
      tokens: a tree of arrays [B, T, ...] that the scan reads token by token; zeros leave its state
        as it is.
      run: (tokens, initial state or None, starts or None) -> (y [B, T, ...], final state).
      step: where the tokens stand.

    Returns:
      (y, the new state).

    Raises:
      UnsupportedError: the state is of another kind.
    """

    def one(tokens: Any, held: Any, step: Step) -> tuple[Array, Recurrence | None]:
        y, final = run(tokens, initial(held, step), resets(step))
        return y, carry(held, final)

    _check(state, Recurrence)
    return in_rows(state, tokens, one, step=step)


def _row_step(flat: Flat) -> Step:
    return dense_step(flat.starts, flat.longest, lengths=flat.counts)


def _read(values: AnyArray, flat: Flat) -> Array:
    return jnp.take(jnp.asarray(values), flat.slots, axis=0, mode="clip")


def _write(values: AnyArray, new: Array, flat: Flat) -> Array:
    values = jnp.asarray(values)
    return values.at[flat.slots].set(new.astype(values.dtype), mode="drop", unique_indices=True)


def convolve(
    state: Any,
    x: Float[Array, "B T *C"],
    kernel: Float[AnyArray, "W *C"],
    bias: Float[AnyArray, "*C"] | None = None,
    *,
    step: Step,
) -> tuple[Float[Array, "B T *C"], ConvTail | None]:
    """Causal depthwise convolution over what is remembered and the new tokens.

    Args:
      state: None (training) or the convolution's tail.
      x: the new tokens' inputs.
      kernel: its last row is that of the token itself.
      bias: of every channel.
      step: where the tokens stand.

    Returns:
      (the convolution, the new tail).

    Raises:
      UnsupportedError: the state is of another kind.
    """
    _check(state, ConvTail)
    if state is None:
        return causal_conv(x, kernel, bias, starts=resets(step)), None
    if step.flat is not None:
        one = lambda x, held, rows: convolve(held, x, kernel, bias, step=rows)  # noqa: E731
        return in_rows(state, x, one, step=step)
    tail = jnp.zeros_like(state.inputs) if step.fresh else state.inputs
    starts = resets(step) if step.fresh else sequence_starts(step)
    y = causal_conv(x, kernel, bias, tail=tail, starts=starts)
    new = next_tail(x, tail, starts=starts, lengths=step.lengths)
    return y, ConvTail(new)


def _unless_begun(values: AnyArray, step: Step) -> Array:
    """Zeros in the rows whose first token begins a sequence."""
    values = jnp.asarray(values)
    begun = jax.lax.expand_dims(sequence_starts(step)[:, 0], range(1, values.ndim))
    return jnp.where(begun, np.zeros((), values.dtype), values)


def _check(state: Any, kind: type) -> None:
    if state is not None and not isinstance(state, kind):
        raise UnsupportedError(
            f"this recurrence reads a {kind.__name__}, not a {type(state).__name__}; use a dense "
            "state"
        )
