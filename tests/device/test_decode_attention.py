"""One new token's attention on a Hopper GPU (JAX_PLATFORMS=cuda; pytest -m gpu)."""

import functools

import jax
import numpy as np
import pytest

from pallas_kernels.decode_attention.mosaic_gpu import Tiles, attend
from tests.kernels.test_decode_attention import (
    CASES,
    PAGES,
    check,
    check_pages,
    draw,
    draw_pages,
    exact,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a CUDA device"),
]
LONG = {
    "long": (32, 8, 64, 4096, (4095, 2000), {}),
    "long, wide": (32, 8, 128, 2048, (1023, 1024, 2047), {}),
    "eights in no eights": (8, 1, 64, 256, (200,), {"softcap": 20.0}),
    "long, window": (16, 2, 128, 4096, (4000,), {"window": 1023}),
}


@pytest.mark.parametrize(("keys", "parts"), [(64, 1), (128, 2), (64, 4), (128, 8), (64, 8)])
@pytest.mark.parametrize("case", [*CASES, *LONG])
def test_parts_of_a_cluster_find_what_is_exact_and_the_same_twice(case, keys, parts):
    arrays, turns, problem = draw((CASES | LONG)[case])
    tiles = Tiles(keys=keys, stages=2, parts=parts)
    call = jax.jit(functools.partial(attend, problem=problem, tiles=tiles))
    found, again = call(*arrays, turns), call(*arrays, turns)
    check(found, exact(arrays, turns, problem))
    for one, other in zip(found, again, strict=True):
        one, other = (np.asarray(x, np.float32) for x in (one, other))
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("keys", "parts"), [(64, 1), (128, 1), (128, 2), (128, 8)])
@pytest.mark.parametrize("case", PAGES)
def test_pages_are_read_and_written_where_the_table_says(case, keys, parts):
    arrays, turns, pages, problem = draw_pages(case)
    tiles = Tiles(keys=keys, stages=2, parts=parts)
    call = jax.jit(functools.partial(attend, problem=problem, tiles=tiles))
    found, again = call(*arrays, turns, pages), call(*arrays, turns, pages)
    check_pages(found, arrays, turns, pages, problem)
    np.testing.assert_array_equal(*(np.asarray(x[0], np.float32) for x in (found, again)))
