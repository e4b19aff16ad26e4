"""Products of a decoding step on a Hopper GPU (JAX_PLATFORMS=cuda; pytest -m gpu)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_matmul import Link, decode_chain, decode_matmul
from pallas_kernels.decode_matmul.shapes import CASES
from tests.kernels.test_decode_matmul import draw, error, exact
from tests.kernels.test_decode_packed import packing

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a CUDA device"),
]


def held(case):
    """Whether packed weights find room for x."""
    return case.group is None or case.rows * case.inputs <= 75_000


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if "head" not in n and held(case)])
def test_cases_are_near_the_exact_sums_and_the_same_twice(name):
    case = CASES[name]
    form = {"norm": case.norm, "gate": case.gate, "residual": case.residual}
    x, w, options = draw(case.rows, case.inputs, case.outputs, **form)
    wide = w
    if case.group is not None:
        w, wide = packing(*w.shape)
    fixed = {"gate": case.gate, "eps": options["eps"], "implementation": "mosaic_gpu"}
    call = jax.jit(lambda x, w, o: decode_matmul(x, w, out_dtype=jnp.float32, **fixed, **o))
    rest = {k: v for k, v in options.items() if k not in fixed}
    found, again = call(x, w, rest), call(x, w, rest)
    allowed = (8e-3 if case.gate and case.group else 4e-3) if case.norm else 1e-5
    assert error(found, exact(x, wide, **options)) < allowed
    np.testing.assert_array_equal(np.asarray(found), np.asarray(again))


@pytest.mark.parametrize(("rows", "how"), [(1, {}), (4, {"arranged": True, "group": 64})])
def test_a_chain_of_packed_products_is_near_its_links_one_by_one(rows, how):
    """Sixteen in a row, so that programs which do not wait for each other are found out."""
    w, wides = zip(*(packing(2048, 2048, **how) for _ in range(2)), strict=True)
    x, _, options = draw(rows, 2048, 2048, residual=True)
    residual = options["residual"]

    @jax.jit
    def chains(x, w, residual):
        for _ in range(16):
            links = (Link(w=w[0], residual="given"), Link(w=w[1]))
            *_, x = decode_chain(x, links, residual=residual, implementation="mosaic_gpu")
            x = (x / jnp.max(jnp.abs(x))).astype(jnp.bfloat16)
        return x

    found, wanted = chains(x, w, residual), np.asarray(x, np.float64)
    for _ in range(16):
        wanted = (wanted @ wides[0].T + np.asarray(residual, np.float64)) @ wides[1].T
        wanted /= np.abs(wanted).max()
    assert error(found, wanted) < 0.05
