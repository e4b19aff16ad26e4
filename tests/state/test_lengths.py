"""How long the sequences of a step are, and models that turn by it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.policy import Policy
from jaxllm.nn import api
from jaxllm.spec.rope import DynamicScaling, LongRopeScaling, Rope
from jaxllm.state.dense import dense_state
from jaxllm.state.step import dense_step, sequence_lengths, training_step
from tests.contracts.specs import MLP48, assert_close, forward, heads, model, pre, quick, redraw

ORIGINAL, CAPACITY = 8, 16
SCALINGS = {
    "dynamic": DynamicScaling(factor=3.0, original_context=ORIGINAL),
    "longrope": LongRopeScaling(
        short_factor=(1.0, 1.1, 1.2, 1.3),
        long_factor=(1.5, 2.0, 4.0, 8.0),
        factor=2.0,
        original_context=ORIGINAL,
    ),
}
SPECS = {
    name: model(pre("G", heads(4, 2, rope=Rope(theta=100.0, scaling=s)), MLP48), layers="G")
    for name, s in SCALINGS.items()
}
ids = np.random.default_rng(3).integers(0, 64, (2, 12), dtype=np.int32)


def test_lengths_of_whole_rows_and_of_chunks():
    assert sequence_lengths(training_step(2, 5)).tolist() == [[5], [5]]
    start, real = jnp.array([0, 7], jnp.int32), jnp.array([3, 1], jnp.int32)
    assert sequence_lengths(dense_step(start, 4)).tolist() == [[4], [11]]
    assert sequence_lengths(dense_step(start, 4, lengths=real)).tolist() == [[3], [8]]


def test_lengths_of_packed_documents():
    segments = jnp.array([[1, 1, 1, 2, 3, 3, 0, 0], [5] * 8], jnp.int32)
    places = jnp.array([[0, 1, 2, 0, 0, 1, 0, 1], [*range(4, 12)]], jnp.int32)
    step = training_step(2, 8, segment_ids=segments, positions=places)
    found = jax.jit(sequence_lengths)(step)
    assert found.dtype == jnp.int32
    assert found.tolist() == [[3, 3, 3, 1, 2, 2, 2, 2], [12] * 8]


@functools.cache
def weights(name):
    return redraw(SPECS[name])


@functools.cache
def program(name):
    """(params, state, ids, start, lengths) -> (logits, state)."""
    spec, policy = SPECS[name], Policy()

    def run(params, state, new, start, lengths):
        step = dense_step(start, new.shape[1], lengths=lengths)
        hidden, state, _ = api.apply(spec, params, new, step, state, policy=policy)
        return api.unembed(spec, params, hidden, policy=policy), state

    return quick(run)


def whole(name, row, length):
    """Logits of the beginning of a row in one pass."""
    logits, _ = quick(forward(SPECS[name]))(weights(name), ids[row : row + 1, :length])
    return logits[0]


def run(name, state, new, *, start, lengths):
    arrays = (np.asarray(start, np.int32), np.asarray(lengths, np.int32))
    return program(name)(weights(name), state, new, *arrays)


@pytest.mark.parametrize("name", SPECS)
def test_up_to_the_original_context_all_ways_agree(name):
    """One pass, chunks with padding, and decode: none has a sequence beyond it."""
    state = dense_state(SPECS[name], 2, CAPACITY, dtype=np.float32)
    first, state = run(name, state, ids[:, :5], start=[0, 0], lengths=[5, 3])
    wanted = [whole(name, row, ORIGINAL) for row in (0, 1)]
    assert_close(first[0], wanted[0][:5])
    assert_close(first[1, :3], wanted[1][:3])
    second = np.stack([ids[0, 5:7], ids[1, 3:5]])
    chunk, state = run(name, state, second, start=[5, 3], lengths=[2, 2])
    assert_close(chunk[0], wanted[0][5:7])
    assert_close(chunk[1], wanted[1][3:5])
    last = np.stack([ids[0, 7:8], ids[1, 5:6]])
    token, _ = run(name, state, last, start=[7, 5], lengths=[1, 1])
    assert_close(token[0, 0], wanted[0][7])
    assert_close(token[1, 0], wanted[1][5])


@pytest.mark.parametrize("name", SPECS)
def test_beyond_it_a_row_counts_its_own_tokens(name):
    """Padding and other rows count for nothing; one prefill is one pass at every length."""
    state = dense_state(SPECS[name], 2, CAPACITY, dtype=np.float32)
    padded, _ = run(name, state, ids, start=[0, 0], lengths=[10, 6])
    assert_close(padded[0, :10], whole(name, 0, 10))
    assert_close(padded[1, :6], whole(name, 1, 6))
    shorter = np.asarray(whole(name, 0, ORIGINAL))
    assert np.abs(np.asarray(padded[0, :ORIGINAL]) - shorter).max() > 1e-2


@pytest.mark.parametrize("name", SPECS)
def test_beyond_it_keys_keep_the_base_of_their_step(name):
    """What the docstrings of the scalings say: decode past the context is not one pass."""
    state = dense_state(SPECS[name], 2, CAPACITY, dtype=np.float32)
    _, state = run(name, state, ids[:, :ORIGINAL], start=[0, 0], lengths=[ORIGINAL] * 2)
    held = [np.asarray(x) for x in jax.tree.leaves(state)]
    token, state = run(name, state, ids[:, 8:9], start=[8, 8], lengths=[1, 1])
    for before, after in zip(held, jax.tree.leaves(state), strict=True):
        assert np.array_equal(before[..., :ORIGINAL, :, :], np.asarray(after)[..., :ORIGINAL, :, :])
    moved = np.abs(np.asarray(token[0, 0]) - np.asarray(whole(name, 0, 9)[8])).max()
    assert moved > 1e-3


@pytest.mark.parametrize("name", SPECS)
def test_packed_documents_are_those_alone(name):
    packed = np.concatenate([ids[0, :3], ids[1, :9]])[None]
    places = np.concatenate([np.arange(3), np.arange(9)])[None].astype(np.int32)
    segments = np.array([[1] * 3 + [2] * 9], np.int32)
    step = training_step(1, 12, segment_ids=segments, positions=places)
    logits, _ = quick(forward(SPECS[name]))(weights(name), packed, step)
    assert_close(logits[0, :3], whole(name, 0, 3))
    assert_close(logits[0, 3:], whole(name, 1, 9))
