"""The grouped product on a Hopper GPU: JAX_PLATFORMS=cuda,cpu python -m pytest -m gpu tests/device.

Sizes are data: many patterns of groups run on one compiled kernel.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import explain, grouped_matmul
from pallas_kernels.grouped_matmul.shapes import CASES as TIMED
from tests.kernels.grouped import CASES, arguments, by_hand, case, failures, patterns, results

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a CUDA device"),
]


def compiled(transpose: bool = False):
    def run(lhs, rhs, sizes):
        how = {"transpose_rhs": transpose, "implementation": "mosaic_gpu"}
        return grouped_matmul(lhs, rhs, sizes, **how)

    return jax.jit(lambda *arguments: results(run, *arguments))


def check(one, run, dtype) -> None:
    lhs, rhs, sizes, pull = arguments(one, dtype)
    found, again = run(lhs, rhs, sizes, pull), run(lhs, rhs, sizes, pull)
    assert failures(found, by_hand(one, lhs, rhs, pull), dtype) == {}
    for name, x in found.items():
        np.testing.assert_array_equal(np.asarray(x), np.asarray(again[name]))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_cases_are_exact_to_a_rounding_and_the_same_twice(name: str, dtype: str) -> None:
    check(CASES[name], compiled(CASES[name].transpose), jnp.dtype(dtype))


@pytest.mark.parametrize("rows", [328, 1000])
def test_every_pattern_of_empty_groups(rows: int) -> None:
    run = compiled()
    for sizes in patterns():
        check(case(rows, *sizes), run, jnp.bfloat16)


def test_groups_of_training_size() -> None:
    run = compiled()
    for sizes in ((700, 0, 1300, 47), (0, 0, 2048, 0), (1, 1023, 512, 511)):
        one = case(2048, *sizes, inputs=320, outputs=448)
        check(one, run, jnp.bfloat16)


def test_auto_takes_the_kernel_for_every_timed_case() -> None:
    for one in TIMED.values():
        lhs = jax.ShapeDtypeStruct((one.rows, one.inputs), jnp.bfloat16)
        rhs = jax.ShapeDtypeStruct((one.groups, one.inputs, one.outputs), jnp.bfloat16)
        assert explain(lhs, rhs).name == "mosaic_gpu"
