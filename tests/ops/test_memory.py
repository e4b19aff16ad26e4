"""The best pairs of half-keys are the best of all pairs."""

import jax
import numpy as np
import pytest

from jaxllm.ops.memory import best_pairs


@pytest.mark.parametrize(("count", "active"), [(1, 1), (5, 1), (5, 3), (7, 7), (4, 9), (4, 16)])
def test_the_best_pairs_are_exactly_those_of_brute_force(count, active):
    scores = np.random.default_rng(count).standard_normal((6, 3, 2, count)).astype(np.float32)
    found, pairs = best_pairs(jax.numpy.asarray(scores), active)
    every = (scores[..., 0, :, None] + scores[..., 1, None, :]).reshape(6, 3, -1)
    order = np.argsort(-every, axis=-1)[..., :active]
    assert np.array_equal(pairs, order)
    assert np.array_equal(found, np.take_along_axis(every, order, axis=-1))


def test_equal_scores_give_pairs_that_are_apart():
    """Keys that cannot be told apart are each read once."""
    _, pairs = best_pairs(jax.numpy.zeros((2, 4)), 16)
    assert sorted(pairs.tolist()) == list(range(16))
