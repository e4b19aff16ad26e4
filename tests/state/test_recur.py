"""Recurrent state: where sequences begin, what padding leaves alone, what a reused place holds."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.errors import UnsupportedError
from jaxllm.state.recur import (
    ConvTail,
    Recurrence,
    carry,
    convolve,
    initial,
    real_tokens,
    resets,
    sequence_starts,
)
from jaxllm.state.step import dense_step, training_step
from tests.contracts.specs import assert_close

random = np.random.default_rng(0)
START, REAL = np.array([0, 7, 0], np.int32), np.array([2, 1, 0], np.int32)


def draw(*shape):
    return random.standard_normal(shape).astype(np.float32)


def test_where_sequences_begin():
    assert sequence_starts(training_step(1, 3)).tolist() == [[True, False, False]]
    assert resets(training_step(1, 3)) is None
    segments = np.array([[1, 1, 2, 2, 0]], np.int32)
    places = np.array([[3, 4, 0, 1, 0]], np.int32)
    step = training_step(1, 5, segment_ids=segments, positions=places)
    wanted = [[False, False, True, False, False]]  # 0 is padding
    assert sequence_starts(step).tolist() == resets(step).tolist() == wanted
    step = dense_step(START, 3, lengths=REAL)
    assert sequence_starts(step)[:, 0].tolist() == [True, False, False]  # the last has no token
    assert not sequence_starts(step)[:, 1:].any()
    assert real_tokens(step).sum(1).tolist() == REAL.tolist()
    assert real_tokens(dense_step(START, 3)) is None


def test_a_row_at_position_zero_begins_from_zero_whatever_is_held():
    held = draw(3, 4, 2)
    held[0] = np.nan
    found = initial(Recurrence(held), dense_step(START, 3, lengths=REAL))
    assert np.array_equal(found, np.stack([0 * held[1], held[1], held[2]]))
    assert initial(None, training_step(3, 3)) is None
    assert initial(Recurrence(held), dense_step(0 * START, 3, fresh=True)) is None
    assert initial(Recurrence(held.astype(jnp.bfloat16)), dense_step(START, 1)).dtype == jnp.float32


def test_what_is_carried_keeps_its_dtype():
    assert carry(None, jnp.ones((3, 2))) is None
    after = carry(Recurrence(np.zeros((3, 2), np.float32)), jnp.ones((3, 2)))
    assert after.values.dtype == jnp.float32


@pytest.mark.parametrize("fresh", [True, False])
def test_a_convolution_starts_anew_and_ends_at_the_last_real_token(fresh):
    x, kernel, bias = jnp.asarray(draw(3, 5, 2)), draw(4, 2), draw(2)
    poison = ConvTail(np.full((3, 3, 2), np.nan, np.float32))
    lengths = np.array([5, 3, 1], np.int32)
    step = dense_step(jnp.zeros((3,), jnp.int32), 5, fresh=fresh, lengths=lengths)
    alone, none = convolve(None, x, kernel, bias, step=training_step(3, 5))
    assert none is None
    found, tail = convolve(poison, x, kernel, bias, step=step)
    for row, length in enumerate(lengths):
        assert_close(found[row, :length], alone[row, :length])
    step = dense_step(jnp.asarray(lengths), 1)
    new = jnp.asarray(draw(3, 1, 2))
    found, _ = convolve(tail, new, kernel, bias, step=step)
    for row, length in enumerate(lengths):
        whole = jnp.concatenate([x[row : row + 1, :length], new[row : row + 1]], axis=1)
        wanted, _ = convolve(None, whole, kernel, bias, step=training_step(1, int(length) + 1))
        assert_close(found[row], wanted[0, -1:])


def test_a_row_without_real_tokens_keeps_its_tail():
    x, held = jnp.asarray(draw(3, 2, 2)), draw(3, 3, 2)
    _, tail = convolve(ConvTail(held), x, draw(4, 2), step=dense_step(START, 2, lengths=REAL))
    assert np.array_equal(tail.inputs[2], held[2])
    assert np.array_equal(tail.inputs[1], np.concatenate([held[1, 1:], x[1, :1]]))
    assert np.array_equal(tail.inputs[0], np.concatenate([0 * held[0, :1], x[0]]))


def test_packed_documents_do_not_mix():
    x, kernel = jnp.asarray(draw(1, 7, 2)), draw(4, 2)
    segments = np.array([[1, 1, 1, 2, 2, 2, 2]], np.int32)
    places = np.array([[0, 1, 2, 0, 1, 2, 3]], np.int32)
    packed = training_step(1, 7, segment_ids=segments, positions=places)
    found, _ = convolve(None, x, kernel, step=packed)
    for a, b in ((0, 3), (3, 7)):
        wanted, _ = convolve(None, x[:, a:b], kernel, step=training_step(1, b - a))
        assert_close(found[:, a:b], wanted)
    held = ConvTail(draw(1, 3, 2))
    _, tail = convolve(held, x[:, :4], kernel, step=packed_part(packed, 4))
    assert np.array_equal(tail.inputs[0, :2], np.zeros((2, 2)))
    assert np.array_equal(tail.inputs[0, 2], x[0, 3])


def packed_part(step, length):
    """The beginning of a packed step."""
    return training_step(
        1, length, segment_ids=step.segment_ids[:, :length], positions=step.positions[:, :length]
    )


def test_a_state_of_another_kind_is_refused():
    step, x = training_step(1, 1), jnp.zeros((1, 1, 2))
    with pytest.raises(UnsupportedError, match="ConvTail, not a Recurrence"):
        convolve(Recurrence(x), x, np.ones((4, 2), np.float32), step=step)
    with pytest.raises(UnsupportedError, match="Recurrence, not a dict"):
        initial({}, step)
