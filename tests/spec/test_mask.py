"""The mask algebra against brute force."""

import math

import numpy as np
import pytest
from hypothesis import given, settings

from jaxllm.errors import ConfigError
from jaxllm.spec.draw import drawn_units
from jaxllm.spec.mask import (
    And,
    Blocks,
    Causal,
    Chunk,
    Full,
    Global,
    Or,
    Prefix,
    Random,
    Row,
    Window,
    allowed,
    decodes,
    reach,
)
from tests.spec.test_model import masks

N = 24


def brute(mask, q, k, length=N):
    match mask:
        case Causal():
            return k <= q
        case Full():
            return True
        case Window():
            return -mask.left <= k - q <= mask.right
        case And():
            return brute(mask.first, q, k, length) and brute(mask.second, q, k, length)
        case Or():
            return brute(mask.first, q, k, length) or brute(mask.second, q, k, length)
        case Chunk():
            return q // mask.size == k // mask.size
        case Global():
            return any(x < mask.first or x >= length - mask.last for x in (q, k))
        case Prefix():
            return max(q, k) < mask.first
        case Blocks():
            blocks = math.ceil(length / mask.size)
            return brute(mask.mask, q // mask.size, k // mask.size, blocks)


@settings(max_examples=100, deadline=None)
@given(masks)
def test_allowed_is_the_definition_pair_by_pair(mask):
    query, key = np.arange(N)[:, None], np.arange(N)[None]
    found = np.broadcast_to(allowed(mask, query, key, Row(length=N)), (N, N))
    assert found.shape == (N, N)
    assert found.dtype == bool
    wanted = [[brute(mask, q, k) for k in range(N)] for q in range(N)]
    assert np.array_equal(found, wanted)


@settings(max_examples=100, deadline=None)
@given(masks)
def test_reach_bounds_what_is_allowed(mask):
    """No pair beyond the reach; an unbounded side goes to the end of any row."""
    left, right = reach(mask)
    seen = allowed(mask, np.arange(N)[:, None], np.arange(N)[None], Row(length=N))
    pairs = np.argwhere(np.broadcast_to(seen, (N, N)))
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
        (Prefix(first=4), (3, 3)),
        (Prefix(), (None, None)),
        (Global(first=1), (None, None)),
        (Blocks(size=4, mask=Window(left=1, right=0)), (7, 3)),
        (Blocks(size=4, mask=Causal()), (None, 3)),
        (Random(count=1), (None, None)),
    ],
)
def test_reach_is_tight(mask, wanted):
    assert reach(mask) == wanted


@settings(max_examples=100, deadline=None)
@given(masks)
def test_a_mask_decodes_only_if_no_token_past_a_prefix_is_seen_ahead(mask):
    """Masks of which a later token changes nothing that came before it."""
    if not decodes(mask):
        return
    seen = allowed(mask, np.arange(N)[:, None], np.arange(N)[None], Row(length=N))
    pairs = np.argwhere(np.broadcast_to(seen, (N, N)))
    assert all(k <= q or k < 5 for q, k in pairs)


@pytest.mark.parametrize("mask", [Full(), Chunk(size=2), Global(first=1), Random(count=1)])
def test_encoders_do_not_decode(mask):
    assert not decodes(mask)
    assert not decodes(Or(first=Causal(), second=mask))
    assert decodes(And(first=Causal(), second=mask))


def test_marks_make_tokens_global_or_a_prefix():
    marks = np.arange(N) % 5 == 2
    query, key = np.arange(N)[:, None], np.arange(N)[None]
    row = Row(length=N, marks=(marks[:, None], marks[None]))
    either = marks[:, None] | marks[None]
    assert np.array_equal(allowed(Global(), query, key, row), either)
    assert np.array_equal(allowed(Prefix(), query, key, row), marks[:, None] & marks[None])
    for mask in (Global(), Prefix()):
        assert not np.broadcast_to(allowed(mask, query, key, Row(length=N)), (N, N)).any()


@pytest.mark.parametrize(("count", "units"), [(1, 8), (2, 30), (3, 12)])
def test_draws_are_few_fixed_and_apart_from_what_is_seen_anyway(count, units):
    drawn = drawn_units(count, 5, 4, units)
    places = np.arange(units)
    inner = (places > 0) & (places < units - 1)
    assert np.array_equal(drawn.sum(-1), np.broadcast_to(count * inner, (4, units)))
    near = np.abs(places[:, None] - places[None]) <= 1
    assert not drawn[:, near].any()
    assert not drawn[..., 0].any()
    assert not drawn[..., 2 * count + 4 :].any()
    assert (drawn != drawn[:1]).any()  # heads differ
    again = drawn_units.__wrapped__(count, 5, 4, units)
    assert np.array_equal(drawn, again)
    assert (drawn_units(count, 6, 4, units) != drawn).any()


def test_short_rows_are_seen_whole():
    assert drawn_units(2, 0, 3, 9).all()
    assert not drawn_units(2, 0, 3, 10).all()


@pytest.mark.parametrize(
    "mask", [Random(count=1), Global(last=1), Blocks(size=2, mask=Global(last=1))]
)
def test_masks_that_look_at_the_row_need_it(mask):
    with pytest.raises(ConfigError, match="need"):
        allowed(mask, np.arange(N)[:, None], np.arange(N)[None])
