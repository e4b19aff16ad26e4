"""Full forward = prefill + decode = chunked prefill, ragged rows and padding included."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.policy import Policy
from jaxllm.errors import ShapeError, UnsupportedError
from jaxllm.nn import api
from jaxllm.state.dense import dense_state
from jaxllm.state.step import dense_step, training_step
from tests.contracts.specs import (
    DECODERS,
    SPECS,
    assert_close,
    full,
    params,
    quick,
    runner,
    tokens,
)

LENGTHS = np.array([8, 5, 4, 1], np.int32)
CAPACITY = 13  # slot 12 stays unused in the longest row


@functools.cache
def program(name: str, fresh: bool):
    """(params, state, ids, start, lengths) -> (logits, state)."""
    spec, policy = SPECS[name], Policy()

    def run(weights, state, ids, start, lengths):
        step = dense_step(start, ids.shape[1], fresh=fresh, lengths=lengths)
        hidden, state, _ = api.apply(spec, weights, ids, step, state, policy=policy)
        return api.unembed(spec, weights, hidden, policy=policy), state

    return quick(run)


def empty(name: str, batch: int = len(LENGTHS)):
    return dense_state(SPECS[name], batch, CAPACITY, dtype=np.float32)


def garbled(ids: np.ndarray, start: int, size: int, lengths: np.ndarray) -> np.ndarray:
    """A chunk of the rows; what stands past their lengths is noise."""
    out = np.full((len(ids), size), 63, np.int32)
    for row, length in enumerate(lengths):
        part = ids[row, start : min(start + size, length)]
        out[row, : len(part)] = part
    return out


def check_rows(logits, name: str, start: np.ndarray, count: np.ndarray) -> None:
    """Real positions of a chunk have the logits of the full forward pass."""
    wanted = full(name)
    for row, (first, number) in enumerate(zip(start, count, strict=True)):
        assert_close(logits[row, :number], wanted[row, first : first + number])


def decode_rest(name: str, state, start: np.ndarray) -> None:
    """Feed each row its true next tokens one by one."""
    ids = tokens(name)
    for _ in range(4):
        new = np.take_along_axis(ids, start[:, None], axis=1)
        logits, state = program(name, False)(params(name), state, new, start, None)
        check_rows(logits, name, start, np.ones_like(start))
        start = start + 1


@pytest.mark.parametrize("name", DECODERS)
def test_prefill_then_decode_is_the_full_forward(name):
    ids, zero = garbled(tokens(name), 0, 8, LENGTHS), np.zeros_like(LENGTHS)
    logits, state = program(name, True)(params(name), empty(name), ids, zero, LENGTHS)
    check_rows(logits, name, zero, LENGTHS)
    decode_rest(name, state, LENGTHS)


@pytest.mark.parametrize("name", DECODERS)
def test_chunked_prefill_is_the_full_forward(name):
    ids, state, start = tokens(name), empty(name), np.zeros_like(LENGTHS)
    for first in (0, 4):
        count = np.clip(LENGTHS - first, 0, 4)
        chunk = garbled(ids, first, 4, LENGTHS)
        logits, state = program(name, False)(params(name), state, chunk, start, count)
        check_rows(logits, name, start, count)
        start = start + count
    decode_rest(name, state, start)


def test_one_row_takes_slice_updates_and_agrees():
    """A batch of one is aligned: its keys are written by one slice update."""
    name = "gqa"
    ids, state = tokens(name)[:1], empty(name, 1)
    for first, size in ((0, 8), (8, 1), (9, 1), (10, 1)):
        start = np.array([first], np.int32)
        chunk = ids[:, first : first + size]
        logits, state = program(name, False)(params(name), state, chunk, start, None)
        check_rows(logits, name, start, np.array([size]))


def test_poisoned_slots_never_leak():
    """NaN in slots past each row's sequence, as a reused cache may hold, changes nothing."""
    name = "gqa"
    ids, zero = garbled(tokens(name), 0, 8, LENGTHS), np.zeros_like(LENGTHS)
    _, state = program(name, True)(params(name), empty(name), ids, zero, LENGTHS)
    free = jnp.arange(CAPACITY)[None] >= LENGTHS[:, None]
    poison = lambda x: jnp.where(free[..., None, None], jnp.nan, x)  # noqa: E731
    decode_rest(name, jax.tree.map(poison, state), LENGTHS)


def test_packed_documents_see_their_own_only():
    """Two documents in one row, by segments and positions, are the two alone."""
    name = "gqa"
    ids, wanted = tokens(name), full(name)
    packed = np.concatenate([ids[0, :5], ids[1, :7]])[None]
    places = np.concatenate([np.arange(5), np.arange(7)])[None].astype(np.int32)
    segments = np.array([[1] * 5 + [2] * 7], np.int32)
    step = training_step(1, 12, segment_ids=segments, positions=places)
    logits, _ = runner(name)(params(name), packed, step)
    assert_close(logits[0, :5], wanted[0, :5])
    assert_close(logits[0, 5:], wanted[1, :7])


def test_a_prefix_is_taken_in_at_once_and_then_decoded():
    """Rows of at least its length: its tokens see each other, those after it see back alone."""
    name, lengths = "prefix", np.array([8, 5, 4, 4], np.int32)
    ids, zero = garbled(tokens(name), 0, 8, lengths), np.zeros_like(lengths)
    logits, state = program(name, True)(params(name), empty(name), ids, zero, lengths)
    check_rows(logits, name, zero, lengths)
    decode_rest(name, state, lengths)


@pytest.mark.parametrize("name", ["bigbird", "linformer"])
def test_masks_of_whole_rows_take_no_state(name):
    ids, zero = tokens(name), np.zeros_like(LENGTHS)
    with pytest.raises(UnsupportedError, match="whole rows"):
        program(name, True)(params(name), empty(name), ids, zero, None)
    with pytest.raises(UnsupportedError, match="do not pack"):
        runner(name)(params(name), ids, training_step(*ids.shape, segment_ids=np.ones_like(ids)))


@pytest.mark.parametrize("name", ["bert", "modernbert", "longformer", "linformer"])
def test_padding_of_an_encoder_changes_nothing(name):
    """Noise past each row's length is seen by none of its tokens."""
    spec, lengths = SPECS[name], np.array([12, 7, 5, 3], np.int32)
    noisy = garbled(tokens(name), 0, 12, lengths)
    step = dataclasses.replace(training_step(4, 12), lengths=lengths)
    logits, _ = runner(name)(params(name), noisy, step)
    for row, length in enumerate(lengths):
        alone, _ = runner(name)(params(name), tokens(name)[row : row + 1, :length])
        assert_close(logits[row, :length], alone[0])
    assert not spec.decodes


def test_token_types_that_a_model_does_not_know_are_an_error():
    name = "mha"
    ids, types = tokens(name), np.zeros_like(tokens(name))
    with pytest.raises(ShapeError, match="no token types"):
        runner(name)(params(name), api.Inputs(ids, types=types))
