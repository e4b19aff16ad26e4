"""Block-sparse attention on a Hopper GPU (JAX_PLATFORMS=cuda,cpu; pytest -m gpu tests/device)."""

import jax
import jax.numpy as jnp
import pytest

from tests.kernels.block_sparse import CASES, compare

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_the_references(name: str, dtype: str) -> None:
    compare(CASES[name], jnp.dtype(dtype))
