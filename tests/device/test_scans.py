"""The delta rule, decays a channel and the selective scan on a Hopper GPU: JAX_PLATFORMS=cuda,cpu
python -m pytest -m gpu tests/device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.linear_attention import explain
from pallas_kernels.linear_attention.shapes import CASES as TIMED
from pallas_kernels.selective_scan import selective_scan
from tests.kernels.linear_attention import CASES, Case, arguments, exact, failures, named, results

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a CUDA device"),
]


def check(case: Case) -> None:
    given = arguments(case)

    def call(*arrays, ids):
        return named("mosaic_gpu")(*arrays, ids)

    run = jax.jit(lambda *z: results(call, case, z, jnp.bfloat16))
    found, again = run(*given), run(*given)
    assert failures(found, exact(case, given)) == {}
    for name, x in found.items():
        np.testing.assert_array_equal(np.asarray(x), np.asarray(again[name]))


@pytest.mark.parametrize("name", CASES)
def test_cases_err_by_few_roundings_and_are_the_same_twice(name: str) -> None:
    check(CASES[name])


@pytest.mark.parametrize("length", [63, 64, 65, 500, 1024])
@pytest.mark.parametrize("decay", ["head", "channel"])
def test_lengths(length: int, decay: str) -> None:
    check(Case(length=length, heads=8, key_heads=4, state=128, width=128, batch=2, decay=decay))


def test_many_sequences_in_a_row() -> None:
    starts = tuple(range(0, 512, 13))
    check(Case(length=512, heads=4, state=128, width=128, batch=2, starts=starts))


def test_auto_takes_the_kernel_for_every_timed_case() -> None:
    for one in TIMED.values():
        v = jax.ShapeDtypeStruct((one.batch, one.length, one.heads, one.width), jnp.bfloat16)
        k = jax.ShapeDtypeStruct((one.batch, one.length, one.key_heads, one.state), jnp.bfloat16)
        kind = {"delta": one.delta, "channels": one.channels}
        assert explain(v, k, **kind).name == "mosaic_gpu"


@pytest.mark.parametrize("state", [8, 16, 32])
@pytest.mark.parametrize("length", [1, 64, 200, 1000])
def test_selective_scan(state: int, length: int) -> None:
    random = np.random.default_rng(0)

    def of(*shape):
        return jnp.asarray(random.standard_normal(shape).astype(np.float32))

    x, dt = of(2, length, 256).astype(jnp.bfloat16), jax.nn.softplus(of(2, length, 256) - 2)
    a, b, c = -jnp.exp(of(256, state)), of(2, length, state), of(2, length, state)
    initial, dy, dfinal = of(2, 256, state), of(2, length, 256), of(2, 256, state)
    marks = np.zeros((2, length), np.int32)
    marks[:, 3::70] = 1
    ids = jnp.asarray(np.cumsum(marks, axis=1, dtype=np.int32))

    def both(how, x):
        def run(*z):
            return selective_scan(*z[:5], initial=z[5], segment_ids=ids, implementation=how)

        out, back = jax.vjp(run, x, dt, a, b, c, initial)
        pull = dy.astype(jnp.bfloat16).astype(out[0].dtype)
        return (*out, *back((pull, dfinal)))

    found = jax.jit(lambda x: both("mosaic_gpu", x))(x)
    want = jax.jit(lambda x: both("reference", x))(x.astype(jnp.float32))
    for got, true in zip(found, want, strict=True):
        got, true = (np.asarray(z, np.float64) for z in (got, true))
        assert np.sqrt(np.mean((got - true) ** 2)) <= 2**-8 * np.sqrt(np.mean(true**2)) + 1e-6
