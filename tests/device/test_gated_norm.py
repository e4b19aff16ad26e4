"""The gated norm on a Hopper GPU (JAX_PLATFORMS=cuda; pytest -m gpu)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gated_norm import gated_norm
from pallas_kernels.timing import errors_of, with_gradients
from tests.kernels.test_gated_norm import draw, narrow

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a CUDA device"),
]


@pytest.mark.parametrize("before_gate", [False, True])
@pytest.mark.parametrize(
    ("rows", "channels", "groups"), [((2, 264), 4096, 1), ((113,), 1536, 1), ((3, 100), 4096, 8)]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_it_errs_as_plain_jnp_and_repeats(rows, channels, groups, before_gate, dtype):
    form = {"eps": 1e-2, "groups": groups, "before_gate": before_gate}
    given = tuple(narrow(draw(rows, channels), jnp.dtype(dtype)))
    exact = functools.partial(gated_norm, implementation="reference", **form)
    kernel = functools.partial(gated_norm, implementation="mosaic_gpu", **form)
    ours, plain = errors_of(kernel, exact, given), errors_of(exact, exact, given)
    assert all(a <= 2 * b + 1e-5 for a, b in zip(ours, plain, strict=True)), (ours, plain)
    twice = [jax.jit(with_gradients(kernel))(*given) for _ in range(2)]
    for one, other in zip(*twice, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
