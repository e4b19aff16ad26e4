"""The product with packed integers on a Hopper GPU (JAX_PLATFORMS=cuda,cpu; pytest -m gpu)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.quantized_matmul import grouped_quantized_matmul, quantized_matmul
from pallas_kernels.quantized_matmul.order import kind_of, stored
from tests.kernels.test_quantized_experts import CASES as EXPERTS
from tests.kernels.test_quantized_experts import SIZES, packed, wanted
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


STREAMED = CASES | {
    "groups of 32": {"count": 64, "group": 32},
    "tiles of rows": {"count": 300},
    "whole tiles": {"count": 128, "out_dtype": "bfloat16"},
    "17 rows": {"count": 17, "out_dtype": "bfloat16"},
    "32 rows, groups of 64": {"count": 32, "group": 64, "out_dtype": "bfloat16"},
    "33 rows, offset": {"count": 33, "kind": "uint4", "offset": True},
    "64 rows, offset, groups of 64": {"count": 64, "kind": "uint4", "offset": True, "group": 64},
    "64 rows, uint4": {"count": 64, "kind": "uint4"},
    "64 rows, int8": {"count": 64, "kind": "int8", "group": 4096},
    "40 rows, int8, groups of 256": {"count": 40, "kind": "int8", "group": 256},
    "24 rows, fp8": {"count": 24, "kind": "float8_e4m3fn"},
    "32 rows, nf4": {"count": 32, "kind": "uint4", "table": TABLES["nf4"], "group": 64},
    "65 rows, offset": {"count": 65, "kind": "uint4", "offset": True},
    "127 rows": {"count": 127, "out_dtype": "bfloat16"},
    "129 rows, offset, halved": {
        "count": 129,
        "kind": "uint4",
        "offset": True,
        "out_dtype": "bfloat16",
    },
    "256 rows": {"count": 256, "out_dtype": "bfloat16"},
    "256 rows, groups of 32": {"count": 256, "group": 32, "out_dtype": "bfloat16"},
    "300 rows, int8": {"count": 300, "kind": "int8", "group": 4096, "out_dtype": "bfloat16"},
    "384 rows, fp8": {"count": 384, "kind": "float8_e4m3fn", "out_dtype": "bfloat16"},
    "512 rows and nf4": {
        "count": 512,
        "kind": "uint4",
        "table": TABLES["nf4"],
        "group": 64,
        "out_dtype": "bfloat16",
    },
    "512 rows": {"count": 512, "out_dtype": "bfloat16"},
    "1100 rows": {"count": 1100, "out_dtype": "bfloat16"},
    "fp8": {"count": 8, "kind": "float8_e4m3fn"},
    "nf4": {"count": 1, "kind": "uint4", "table": TABLES["nf4"], "group": 64},
    "mxfp4": {
        "count": 16,
        "kind": "uint4",
        "table": TABLES["e2m1"],
        "group": 32,
        "exponents": True,
    },
}


# Whole tiles of 128 outputs; of 192 and shares of the rest; and a rest of nearly as many.
WHOLE = [(13056, 1024), (26112, 1024), (50560, 1024)]


@pytest.mark.parametrize("sizes", WHOLE)
@pytest.mark.parametrize("name", [name for name in STREAMED if "rows," in name or name[:2] == "17"])
def test_streamed_whole_tiles(name, sizes):
    test_streamed(name, sizes, "uint4" in name)


@pytest.mark.parametrize("arranged", [False, True])
@pytest.mark.parametrize("sizes", [(512, 4096), (2112, 4096)])
@pytest.mark.parametrize("name", STREAMED)
def test_streamed(name, sizes, arranged):
    """At most twice the error of the product in bfloat16, and the same twice."""
    options = dict(STREAMED[name])
    options["group"] = min(options.get("group", 128), sizes[1])
    more = {key: options.pop(key) for key in ("table", "out_dtype") if key in options}
    x, values, scale, offset = draw(options.pop("count"), *sizes, **options)
    table = more.get("table", ())
    wanted = exact(x, values, scale, offset, table)
    plain = quantized_matmul(x, values, scale, offset, **more)
    if arranged:
        values = stored(values, kind_of(values.dtype, table))
    named = {"implementation": "mosaic_gpu_streamed", "arranged": arranged}
    call = jax.jit(lambda *a: quantized_matmul(*a, **named, **more))
    found, again = call(x, values, scale, offset), call(x, values, scale, offset)
    error, allowed = (np.abs(np.asarray(y, np.float64) - wanted).max() for y in (found, plain))
    assert error <= 2 * allowed
    np.testing.assert_array_equal(np.asarray(found), np.asarray(again))
    assert found.dtype == more.get("out_dtype", jnp.float32)


@pytest.mark.parametrize("name", EXPERTS)
def test_experts(name):
    """At most twice the error of the unpacked product beside a rounding; the same twice."""
    options = {"table": (), "arranged": False, "out_dtype": "float32"} | EXPERTS[name]
    table, arranged, out_dtype = (options.pop(k) for k in ("table", "arranged", "out_dtype"))
    x, given = packed(512, 2048, **options)
    want, held = wanted(x, given, SIZES, table), given
    if arranged:
        held = (stored(given[0], kind_of(given[0].dtype, table)), *given[1:])
    how = {"table": table, "out_dtype": out_dtype, "arranged": arranged}
    call = jax.jit(lambda *a: grouped_quantized_matmul(*a, implementation="mosaic_gpu", **how))
    arguments = x, held, jnp.asarray(SIZES)
    found, again = call(*arguments), call(*arguments)
    plain = grouped_quantized_matmul(*arguments, **how)
    error, allowed = (np.abs(np.asarray(y, np.float64) - want).max() for y in (found, plain))
    assert error <= 2 * allowed + (2**-8 * np.abs(want).max() if out_dtype == "bfloat16" else 0)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(again))
