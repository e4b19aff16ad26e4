"""The product with packed integers on a Hopper GPU (JAX_PLATFORMS=cuda,cpu; pytest -m gpu)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.quantized_matmul import quantized_matmul
from tests.kernels.test_quantized_matmul import draw, exact

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a CUDA device"),
]
CASES = {
    "one row": {"count": 1},
    "64 rows": {"count": 64},
    "odd rows": {"count": 13},
    "offset": {"count": 3, "kind": "uint4", "offset": True},
    "int8": {"count": 8, "kind": "int8"},
    "small groups": {"count": 5, "group": 64},
    "one scale a row": {"count": 2, "group": 4096, "kind": "int8"},
}


@pytest.mark.parametrize("sizes", [(512, 4096), (2112, 4096)])
@pytest.mark.parametrize("name", CASES)
def test_cases_are_exact_to_a_rounding_and_the_same_twice(name, sizes):
    options = dict(CASES[name])
    x, values, scale, offset = draw(options.pop("count"), *sizes, **options)
    call = jax.jit(lambda *a: quantized_matmul(*a, implementation="mosaic_gpu"))
    found, again = call(x, values, scale, offset), call(x, values, scale, offset)
    wanted = exact(x, values, scale, offset)
    assert np.abs(np.asarray(found) - wanted).max() < 1e-5 * np.abs(wanted).max()
    np.testing.assert_array_equal(np.asarray(found), np.asarray(again))
    assert found.dtype == jnp.float32
