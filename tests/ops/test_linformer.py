"""Keys and values summed over the length: the identity is full attention; padding; too many."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.errors import ShapeError
from jaxllm.ops.attention import Scores, reference
from jaxllm.ops.linformer import project_length
from jaxllm.ops.mask import Visibility
from jaxllm.spec.mask import Full
from tests.ops.test_attention import oracle

B, T, N, K, H, ROWS = 2, 7, 4, 2, 6, 3
random = np.random.default_rng(0)
Q, KEYS, VALUES = (
    random.standard_normal((B, T, heads, H)).astype(np.float32) for heads in (N, K, K)
)
SUMS = random.standard_normal((9, ROWS)).astype(np.float32)  # for rows of up to 9 tokens


def attend(q, k, v, sums, lengths=None):
    """Attention over summed keys and values."""
    k, v = (project_length(x, sums, lengths) for x in (k, v))
    places = jnp.broadcast_to(jnp.arange(q.shape[1]), q.shape[:2])
    see = Visibility(places, jnp.zeros((q.shape[0], k.shape[1]), jnp.int32), mask=Full())
    return reference(q, k, v, see, scores=Scores(scale=0.7))


def by_hand(q, k, v, sums):
    """The same in float64."""
    k, v = (np.einsum("btkh,tr->brkh", x, sums[: x.shape[1]]) for x in (k, v))
    seen = np.ones((*q.shape[:2], k.shape[1]), bool)
    return oracle(q, k, v, seen, 0.7)


def test_as_many_rows_as_tokens_and_the_identity_is_full_attention():
    found = attend(*map(jnp.asarray, (Q, KEYS, VALUES)), np.eye(T, dtype=np.float32))
    wanted = oracle(Q, KEYS, VALUES, np.ones((B, T, T), bool), 0.7)
    assert np.abs(found - wanted).max() < 2e-6


def test_values_and_slopes_are_those_of_the_sums():
    arrays = [Q, KEYS, VALUES, SUMS]
    weight = random.standard_normal((B, T, N, H))
    found = attend(*map(jnp.asarray, arrays))
    assert np.abs(found - by_hand(*(x.astype(np.float64) for x in arrays))).max() < 5e-6
    total = lambda *a: jnp.sum(attend(*a) * weight.astype(np.float32))  # noqa: E731
    grads = jax.grad(total, (0, 1, 2, 3))(*map(jnp.asarray, arrays))
    for place, grad in enumerate(grads):
        direction = random.standard_normal(arrays[place].shape)
        ends = []
        for sign in (1, -1):
            moved = [x.astype(np.float64) for x in arrays]
            moved[place] = moved[place] + sign * 1e-5 * direction
            ends.append((by_hand(*moved) * weight).sum())
        slope = (ends[0] - ends[1]) / 2e-5
        assert abs(np.vdot(np.asarray(grad, np.float64), direction) - slope) < 2e-4 * abs(slope)
    assert np.array_equal(np.asarray(grads[3])[T:], np.zeros((9 - T, ROWS)))


def test_padding_is_in_no_sum():
    lengths = np.array([5, 7], np.int32)
    keys, values = KEYS.copy(), VALUES.copy()
    keys[0, 5:], values[0, 5:] = np.nan, np.nan
    found = attend(*map(jnp.asarray, (Q, keys, values)), SUMS, lengths)
    alone = by_hand(Q[:1, :5], KEYS[:1, :5], VALUES[:1, :5], SUMS)
    assert np.abs(found[0, :5] - alone[0]).max() < 5e-6
    assert np.abs(found[1] - by_hand(Q, KEYS, VALUES, SUMS)[1]).max() < 5e-6


def test_more_tokens_than_the_projection_has_are_an_error():
    with pytest.raises(ShapeError, match="7 tokens exceed the 6"):
        project_length(jnp.asarray(KEYS), SUMS[:6], None)
