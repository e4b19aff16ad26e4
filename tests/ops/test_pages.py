"""New tokens in pages: each where its sequence's table says, padding nowhere that counts."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.ops.flat import Flat
from jaxllm.ops.pages import PageTable, Pool, write_coded, write_pages

PAGES, SIZE = 5, 4
# Counts and starts of two rows, tokens of the batch; the rest is padding.
STEPS = {
    "one token": ((1,), (6,), 1),
    "one of padding": ((0,), (6,), 1),
    "two rows and padding": ((3, 1), (2, 9), 6),
}
TABLE = np.array([[1, 3, 7], [2, 0, 4]], np.int32)  # 7: past the end


def step(name):
    counts, starts, length = STEPS[name]
    rows = len(counts)
    flat = Flat(jnp.asarray(counts), jnp.asarray(starts), jnp.arange(rows), 4)
    table = PageTable(jnp.asarray(TABLE[:rows]), jnp.zeros((rows,), jnp.int32))
    where, token = {}, 0
    for row, (count, start) in enumerate(zip(counts, starts, strict=True)):
        for at in range(start, start + count):
            where[TABLE[row, at // SIZE], at % SIZE] = token
            token += 1
    return table, flat, length, where


@pytest.mark.parametrize("spare", [False, True])
@pytest.mark.parametrize("name", STEPS)
def test_tokens_lie_where_the_table_says(name, spare):
    table, flat, length, where = step(name)
    table = dataclasses.replace(table, spare=spare)
    pool = jnp.full((PAGES + spare, SIZE, 2, 3), -1.0)
    new = jnp.arange(length * 6.0).reshape(1, length, 2, 3)
    found = np.asarray(write_pages(pool, new, table, flat))
    for at in np.ndindex(PAGES, SIZE):
        wanted = new[0, where[at]] if at in where else pool[at]
        np.testing.assert_array_equal(found[at], wanted)


@pytest.mark.parametrize("spare", [False, True])
@pytest.mark.parametrize("name", STEPS)
def test_numbers_of_eight_bits_and_their_scales(name, spare):
    table, flat, length, where = step(name)
    table = dataclasses.replace(table, spare=spare)
    shape = (PAGES + spare, SIZE, 2, 3)
    scales = jnp.full((PAGES + spare, 2, 2, SIZE), -1.0)
    pool = Pool(jnp.full(shape, 99, jnp.int8), jnp.full(shape, 99, jnp.int8), scales)
    k = 1 + jnp.arange(length * 6.0).reshape(1, length, 2, 3)
    found = write_coded(pool, (k, 2 * k), table, flat)
    for at in np.ndindex(PAGES, SIZE):
        page, place = at
        if at not in where:
            assert (np.asarray(found.k[at]) == 99).all() and (np.asarray(found.v[at]) == 99).all()
            assert (np.asarray(found.scales[page, :, :, place]) == -1).all()
            continue
        for codes, part, wanted in ((found.k, 0, k), (found.v, 1, 2 * k)):
            scale = np.asarray(found.scales)[page, :, part, place, None]
            one = np.asarray(wanted[0, where[at]])
            np.testing.assert_allclose(np.asarray(codes[at]) * scale, one, rtol=0.01)


def test_what_has_no_page_never_reaches_another():
    """A real token past its table's pages, which a step must not have, is dropped or wasted too."""
    table, flat, _, _ = step("one token")
    beyond = dataclasses.replace(flat, starts=jnp.asarray([9]))  # the column that has no page
    for spare in (False, True):
        pool = jnp.zeros((PAGES + spare, SIZE, 2, 3))
        given = dataclasses.replace(table, spare=spare)
        found = write_pages(pool, jnp.ones((1, 1, 2, 3)), given, beyond)
        assert not np.asarray(found)[:PAGES].any()


def test_one_token_a_row_lies_where_it_would_among_more():
    counts, starts = jnp.asarray([1, 1, 0]), jnp.asarray([6, 9, 3])
    pages = jnp.asarray([[1, 3, 0], [2, 0, 4], [0, 2, 1]])
    pool, new = jnp.full((PAGES + 1, SIZE, 2, 3), -1.0), jnp.arange(18.0).reshape(1, 3, 2, 3)
    table = PageTable(pages, jnp.asarray([0, 0, 0]), spare=True)
    single, more = (Flat(counts, starts, jnp.arange(3), longest) for longest in (1, 2))
    assert single.positions(3)[:2].tolist() == more.positions(3)[:2].tolist() == [6, 9]
    found = [np.asarray(write_pages(pool, new, table, flat))[:PAGES] for flat in (single, more)]
    np.testing.assert_array_equal(found[0], found[1])
    assert (found[0] != -1).sum() == 2 * 6
