"""The mask algebra against brute force."""

import numpy as np
import pytest
from hypothesis import given, settings

from jaxllm.spec.mask import And, Causal, Full, Or, Window, allowed, reach
from tests.spec.test_model import masks

N = 24


def brute(mask, q, k):
    match mask:
        case Causal():
            return k <= q
        case Full():
            return True
        case Window():
            return -mask.left <= k - q <= mask.right
        case And():
            return brute(mask.first, q, k) and brute(mask.second, q, k)
        case Or():
            return brute(mask.first, q, k) or brute(mask.second, q, k)


@settings(max_examples=100, deadline=None)
@given(masks)
def test_allowed_is_the_definition_pair_by_pair(mask):
    query, key = np.arange(N)[:, None], np.arange(N)[None]
    found = np.asarray(allowed(mask, query, key))
    assert found.shape == (N, N)
    assert found.dtype == bool
    wanted = [[brute(mask, q, k) for k in range(N)] for q in range(N)]
    assert np.array_equal(found, wanted)


@settings(max_examples=100, deadline=None)
@given(masks)
def test_reach_bounds_what_is_allowed(mask):
    """No pair beyond the reach; an unbounded side goes to the end of any row."""
    left, right = reach(mask)
    pairs = np.argwhere(np.asarray(allowed(mask, np.arange(N)[:, None], np.arange(N)[None])))
    behind, ahead = pairs[:, 0] - pairs[:, 1], pairs[:, 1] - pairs[:, 0]
    if left is not None:
        assert (behind <= left).all()
    if right is not None:
        assert (ahead <= right).all()


@pytest.mark.parametrize(
    ("mask", "wanted"),
    [
        (Causal(), (None, 0)),
        (Full(), (None, None)),
        (Window(left=3, right=2), (3, 2)),
        (And(first=Causal(), second=Window(left=3, right=2)), (3, 0)),
        (And(first=Full(), second=Full()), (None, None)),
        (Or(first=Causal(), second=Window(left=3, right=2)), (None, 2)),
        (Or(first=Window(left=1), second=Window(left=5, right=4)), (5, 4)),
        (Or(first=Full(), second=Window(left=1)), (None, None)),
    ],
)
def test_reach_is_tight(mask, wanted):
    assert reach(mask) == wanted
