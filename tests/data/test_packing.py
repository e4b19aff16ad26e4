"""Packing: each token predicted once, no row overflows, first-fit."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.data.packing import cut_documents, first_fit, pack

SIZES = st.lists(st.integers(0, 70), max_size=120)


def slow_first_fit(sizes, length, open_rows):
    """Row by row over a list."""
    room, numbers, out, opened = [0] * open_rows, [0] * open_rows, [], 0
    for size in sizes:
        fitting = [i for i in range(open_rows) if room[i] >= size]
        if fitting:
            place = fitting[0]
        else:
            place = opened % open_rows
            room[place], numbers[place] = length, opened
            opened += 1
        room[place] -= size
        out.append(numbers[place])
    return out


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 32), max_size=200), st.sampled_from([1, 2, 8, 64]))
def test_first_fit_against_a_slow_one(sizes, open_rows):
    found = first_fit(np.array(sizes, np.int32), 32, open_rows)
    assert found.tolist() == slow_first_fit(sizes, 32, open_rows)


@settings(max_examples=200, deadline=None)
@given(SIZES, st.integers(1, 40), st.integers(0, 1000))
def test_every_prediction_stands_in_one_row_once(sizes, length, begin):
    begins = begin + np.append(0, np.cumsum(np.array(sizes, np.int64)))
    found = pack(begins, length)
    predicted = []
    for row in range(found.count):
        pieces = range(found.rows[row], found.rows[row + 1])
        assert 1 <= sum(found.lengths[p] for p in pieces) <= length
        for p in pieces:
            start, stop = int(found.starts[p]), int(found.starts[p] + found.lengths[p])
            document = int(np.searchsorted(begins, start, side="right")) - 1
            assert stop <= begins[document + 1]
            assert found.closes[p] == (stop == begins[document + 1])
            predicted += range(start + 1, stop + (0 if found.closes[p] else 1))
    wanted = [t for b, e in itertools.pairwise(begins) for t in range(b + 1, e)]
    assert sorted(predicted) == wanted
    assert found.rows[0] == 0 and found.rows[-1] == len(found.starts)


@settings(max_examples=50, deadline=None)
@given(SIZES, st.integers(1, 40))
def test_documents_are_cut_into_rows(sizes, length):
    begins = np.append(0, np.cumsum(np.array(sizes, np.int64)))
    starts, lengths, closes = cut_documents(begins, length)
    assert (np.diff(starts) > 0).all() if len(starts) else True
    assert (lengths[~closes] == length).all()


def test_short_documents_share_rows():
    found = pack(np.array([0, 3, 9, 12, 14, 30]), 8)
    rows = [found.lengths[a:b].tolist() for a, b in zip(found.rows, found.rows[1:], strict=False)]
    assert rows == [[3, 3, 2], [6], [8], [8]]
