"""The product with packed integers on a Hopper GPU (JAX_PLATFORMS=cuda,cpu; pytest -m gpu)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.quantized_matmul import quantized_matmul
from tests.kernels.test_quantized_matmul import TABLES, draw, exact

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
    "groups of 32": {"count": 64, "group": 32},
    "tiles of rows": {"count": 300},
    "whole tiles": {"count": 128, "out_dtype": "bfloat16"},
    "fp8": {"count": 8, "kind": "float8_e4m3fn"},
    "nf4": {"count": 1, "kind": "uint4", "table": TABLES["nf4"], "group": 64},
    "mxfp4": {
        "count": 16,
        "kind": "uint4",
        "table": TABLES["e2m1"],
        "group": 32,
        "exponents": True,
    },
    "one scale a row": {"count": 2, "group": 4096, "kind": "int8"},
}


@pytest.mark.parametrize("sizes", [(512, 4096), (2112, 4096)])
@pytest.mark.parametrize("name", CASES)
def test_cases_are_exact_to_a_rounding_and_the_same_twice(name, sizes):
    options = dict(CASES[name])
    more = {key: options.pop(key) for key in ("table", "out_dtype") if key in options}
    arguments = draw(options.pop("count"), *sizes, **options)
    call = jax.jit(lambda *a: quantized_matmul(*a, implementation="mosaic_gpu", **more))
    found, again = call(*arguments), call(*arguments)
    table = more.get("table", ())
    wanted = exact(*arguments, table)
    plain = quantized_matmul(*arguments, table=table, out_dtype=more.get("out_dtype", "float32"))
    error, allowed = (np.abs(np.asarray(y, np.float64) - wanted).max() for y in (found, plain))
    assert error <= 2 * allowed
    if not more:
        assert error < 1e-5 * np.abs(wanted).max()
    np.testing.assert_array_equal(np.asarray(found), np.asarray(again))
    assert found.dtype == more.get("out_dtype", jnp.float32)
