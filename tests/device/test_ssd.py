"""The dual state space scan on a Hopper GPU: JAX_PLATFORMS=cuda,cpu python -m pytest -m gpu
tests/device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ssd import explain, ssd
from pallas_kernels.ssd.shapes import CASES as TIMED
from tests.kernels.ssd import CASES, Case, arguments, by_hand, failures, plain, results

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a CUDA device"),
]


def kernel(x, dt, a, b, c, initial, ids):
    return ssd(x, dt, a, b, c, initial=initial, segment_ids=ids, implementation="mosaic_gpu")


def check(case: Case) -> None:
    given = arguments(case)
    run = jax.jit(lambda *z: results(kernel, case, z))
    found, again = run(*given), run(*given)
    usual = jax.jit(lambda *z: results(plain, case, z))(*given)
    assert failures(found, usual, by_hand(case, given)) == {}
    for name, x in found.items():
        np.testing.assert_array_equal(np.asarray(x), np.asarray(again[name]))


@pytest.mark.parametrize("name", CASES)
def test_cases_err_no_more_than_plain_jnp_and_are_the_same_twice(name: str) -> None:
    check(CASES[name])


@pytest.mark.parametrize("length", [63, 64, 65, 500, 1024])
def test_lengths(length: int) -> None:
    check(Case(length=length, heads=8, groups=2, state=128, batch=2))


def test_many_sequences_in_a_row() -> None:
    starts = tuple(range(0, 512, 13))
    check(Case(length=512, heads=4, state=128, batch=2, starts=starts))


def test_a_start_forgets_what_is_no_number() -> None:
    case = dataclasses.replace(CASES["a sequence from the first token on"], state=128)
    given = list(arguments(case))
    want = by_hand(case, tuple(given))
    x, dt, a, b, c = (jnp.asarray(z) for z in given[:5])
    x, b, c = (z.astype(jnp.bfloat16) for z in (x, b, c))
    nothing = jnp.full(given[5].shape, jnp.nan)
    y, final = kernel(x, dt, a, b, c, nothing, jnp.asarray(case.segment_ids()))
    assert np.all(np.isfinite(np.asarray(final)))
    np.testing.assert_allclose(np.asarray(y, np.float32), want["y"], atol=0.1, rtol=0.05)


def test_auto_takes_the_kernel_for_every_timed_case() -> None:
    for one in TIMED.values():
        x = jax.ShapeDtypeStruct((one.batch, one.length, one.heads, one.width), jnp.bfloat16)
        b = jax.ShapeDtypeStruct((one.batch, one.length, one.groups, one.state), jnp.bfloat16)
        assert explain(x, b).name == "mosaic_gpu"
