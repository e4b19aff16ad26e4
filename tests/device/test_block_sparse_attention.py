"""Block-sparse attention on a Hopper GPU (JAX_PLATFORMS=cuda,cpu; pytest -m gpu tests/device)."""

import dataclasses

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


@pytest.mark.parametrize(
    ("name", "width"),
    [
        ("lengths", 64),
        ("window and global", 128),
        ("causal strides", 128),
        ("rows that see nothing", 64),
    ],
)
def test_programs_of_several_tiles(name: str, width: int) -> None:
    """192 tiles, with lists of each consumer's own, joined, and with scores ahead."""
    many = {"queries": 1024, "keys": 1024, "heads": (12, 4)}
    compare(dataclasses.replace(CASES[name], width=width, **many), jnp.bfloat16)
