"""Eight-bit floats with scales in blocks on a Hopper GPU (JAX_PLATFORMS=cuda; pytest -m gpu)."""

import jax
import numpy as np
import pytest

from pallas_kernels.scaled_matmul import scaled_matmul
from tests.kernels.test_scaled_matmul import draw, exact

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a CUDA device"),
]


@pytest.mark.parametrize("out_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", [(1, 2048, 256), (130, 512, 4224), (300, 7168, 2048)])
def test_cases_are_near_the_exact_sums_and_the_same_twice(sizes, out_dtype):
    """Within a block of 128 the tensor cores keep about 14 bits."""
    arguments = draw(*sizes)
    call = jax.jit(lambda *a: scaled_matmul(*a, out_dtype=out_dtype, implementation="mosaic_gpu"))
    found, again, wanted = call(*arguments), call(*arguments), exact(*arguments)
    bound = 2**-8 if out_dtype == "bfloat16" else 2**-11
    assert np.abs(np.asarray(found, np.float64) - wanted).max() < bound * np.abs(wanted).max()
    np.testing.assert_array_equal(np.asarray(found), np.asarray(again))
