"""Causal convolution against a float64 loop: values, gradients, tails, borders, padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.ops.conv import causal_conv, next_tail, since_start
from tests.contracts.specs import assert_close, quick

random = np.random.default_rng(0)
WIDTH, CHANNELS = 4, (3, 2)


def draw(*shape):
    return random.standard_normal(shape).astype(np.float32)


def oracle(x, kernel, bias, tail=None, starts=None):
    """One document after another, one sum a token, in the dtype of its arguments."""
    batch, length, width = *x.shape[:2], kernel.shape[0]
    before = jnp.zeros((batch, width - 1, *x.shape[2:]), x.dtype) if tail is None else tail
    padded, rows = jnp.concatenate([before, x], axis=1), []
    for row in range(batch):
        begin, out = -width, []
        for t in range(length):
            begin = t if starts is not None and starts[row, t] else begin
            y = bias
            for back in range(min(width, t - begin + 1)):
                y = y + kernel[width - 1 - back] * padded[row, width - 1 + t - back]
            out.append(y)
        rows.append(jnp.stack(out))
    return jnp.stack(rows)


def random_starts(batch, length):
    starts = random.random((batch, length)) < 0.25
    starts[0, 0], starts[1, :2] = True, [False, True]
    return starts


@pytest.mark.parametrize("length", [1, 7])
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("held", [False, True])
def test_value_and_gradient_are_those_of_a_loop(length, cut, held):
    x, kernel, bias = draw(3, length, *CHANNELS), draw(WIDTH, *CHANNELS), draw(*CHANNELS)
    tail = draw(3, WIDTH - 1, *CHANNELS) if held else None
    starts = random_starts(3, max(length, 2))[:, :length] if cut else None
    weight = draw(3, length, *CHANNELS)

    def total(function, arguments, given, wide):
        y = function(*arguments[:3], tail=arguments[3] if given else None, starts=starts)
        return (y * wide).sum(), y

    arguments = (x, kernel, bias, tail if held else np.zeros(0, np.float32))
    take = jax.value_and_grad(lambda a: total(causal_conv, a, held, weight), has_aux=True)
    (_, found), grads = quick(take)(arguments)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), arguments)
        slow = jax.value_and_grad(
            lambda a: total(oracle, a, held, jnp.asarray(weight, jnp.float64)), has_aux=True
        )
        (_, wanted), wanted_grads = quick(slow)(wide)
        wanted, wanted_grads = jax.tree.map(np.asarray, (wanted, wanted_grads))
    assert_close(found, wanted, 1e-6)
    assert_close(grads, wanted_grads, 1e-6)


def test_what_stands_before_a_start_may_be_no_number():
    x, kernel = draw(2, 3, 5), draw(WIDTH, 5)
    poison = np.full((2, WIDTH - 1, 5), np.nan, np.float32)
    starts = np.array([[True, False, False], [True, False, True]])
    found = causal_conv(jnp.asarray(x), kernel, tail=poison, starts=starts)
    wanted = oracle(x, kernel, np.zeros(5, np.float32), starts=starts)
    assert_close(found, wanted, 1e-6)
    tail = np.asarray(next_tail(jnp.asarray(x), poison, starts=starts))
    assert np.array_equal(tail[0], x[0])
    assert np.array_equal(tail[1], np.stack([0 * x[1, 0], 0 * x[1, 0], x[1, 2]]))


@pytest.mark.parametrize("lengths", [None, (0, 1, 4, 6)])
def test_the_tail_holds_the_last_real_inputs(lengths):
    x, tail = draw(4, 6, 2), draw(4, WIDTH - 1, 2)
    given = None if lengths is None else np.array(lengths, np.int32)
    found = np.asarray(next_tail(jnp.asarray(x), tail, lengths=given))
    for row, length in enumerate(lengths or (6,) * 4):
        wanted = np.concatenate([tail[row], x[row, :length]])[-(WIDTH - 1) :]
        assert np.array_equal(found[row], wanted)


def test_chunks_of_any_size_are_one_pass():
    x, kernel, bias = draw(2, 11, 3), draw(WIDTH, 3), draw(3)
    whole = causal_conv(jnp.asarray(x), kernel, bias)
    tail, parts, at = jnp.zeros((2, WIDTH - 1, 3)), [], 0
    for size in (1, 2, 5, 1, 2):
        part = jnp.asarray(x[:, at : at + size])
        parts.append(causal_conv(part, kernel, bias, tail=tail))
        tail, at = next_tail(part, tail), at + size
    assert np.array_equal(np.concatenate(parts, axis=1), whole)


def test_a_width_of_one_remembers_nothing():
    x, kernel = jnp.asarray(draw(2, 3, 4)), draw(1, 4)
    tail = jnp.zeros((2, 0, 4))
    assert_close(causal_conv(x, kernel, tail=tail), x * kernel[0][None, None])
    assert next_tail(x, tail, lengths=jnp.array([1, 3], jnp.int32)).shape == (2, 0, 4)


def test_half_precision_sums_in_float32():
    x = jnp.asarray(draw(1, 50, 8), jnp.bfloat16)
    kernel = jnp.ones((WIDTH, 8), jnp.bfloat16)
    found = causal_conv(x, kernel)
    assert found.dtype == jnp.bfloat16
    wanted = causal_conv(x.astype(jnp.float32), kernel.astype(jnp.float32))
    assert np.array_equal(found, wanted.astype(jnp.bfloat16))


def test_counting_from_the_last_start():
    starts = np.array([[False, True, False, False, True], [False] * 5])
    assert since_start(starts, 4).tolist() == [[4, 0, 1, 2, 0], [4, 5, 6, 7, 8]]
