"""Products of a decoding step on a Hopper GPU (JAX_PLATFORMS=cuda; pytest -m gpu)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_matmul import decode_matmul
from pallas_kernels.decode_matmul.shapes import CASES
from tests.kernels.test_decode_matmul import draw, error, exact

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a CUDA device"),
]


@pytest.mark.parametrize("name", [name for name in CASES if "head" not in name])
def test_cases_are_near_the_exact_sums_and_the_same_twice(name):
    case = CASES[name]
    form = {"norm": case.norm, "gate": case.gate, "residual": case.residual}
    x, w, options = draw(case.rows, case.inputs, case.outputs, **form)
    fixed = {"gate": case.gate, "eps": options["eps"], "implementation": "mosaic_gpu"}
    call = jax.jit(lambda x, w, o: decode_matmul(x, w, out_dtype=jnp.float32, **fixed, **o))
    rest = {k: v for k, v in options.items() if k not in fixed}
    found, again = call(x, w, rest), call(x, w, rest)
    assert error(found, exact(x, w, **options)) < (4e-3 if case.norm else 1e-5)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(again))
