"""The grouped product of experts: which implementation, and models that run on the kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.errors import ConfigError, UnsupportedError
from jaxllm.ops.grouped import choose, grouped_product
from pallas_kernels.target import targeting

FITS = {"platform": "gpu", "dtype": "bfloat16", "sides": (2048, 1408)}


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({}, "mosaic_gpu"),
        ({"dtype": "float16"}, "mosaic_gpu"),
        ({"dtype": "float32"}, "ragged_dot"),
        ({"sides": (2048, 100)}, "ragged_dot"),
        ({"platform": "tpu"}, "ragged_dot"),
        ({"platform": "cpu"}, "blocked"),
        ({"platform": "interpreter"}, "blocked"),
    ],
)
def test_auto_takes_the_fastest_that_can_serve(changed: dict, name: str) -> None:
    assert choose("auto", **(FITS | changed)).name == name


def test_names_are_kept_or_refused() -> None:
    for name in ("blocked", "ragged_dot", "mosaic_gpu"):
        assert choose(name, **FITS).name == name
    with pytest.raises(ConfigError, match="ragged_dot"):
        choose("raged_dot", **FITS)
    with pytest.raises(UnsupportedError, match=r"multiples of 64.*use 'ragged_dot'"):
        choose("mosaic_gpu", **(FITS | {"sides": (80, 64)}))
    assert choose("mosaic_tpu", **(FITS | {"platform": "tpu"})).name == "mosaic_tpu"
    with pytest.raises(UnsupportedError, match="needs a TPU"):
        choose("mosaic_tpu", **FITS)
    with pytest.raises(UnsupportedError, match="needs a CUDA device"):
        choose("mosaic_gpu", **(FITS | {"platform": "cpu"}))


def values(implementation: str, x, w, sizes) -> list[np.ndarray]:
    """Result, and gradients of its sum of squares."""

    def run(x, w):
        y = grouped_product(x, w, sizes, precision="default", implementation=implementation)
        return jnp.sum(y.astype(jnp.float32) ** 2), y

    (_, y), grads = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)(x, w)
    return [np.asarray(a, np.float32) for a in (y, *grads)]


@pytest.fixture
def _loose():
    """The interpreter's own products mix dtypes, in threads that a context does not reach."""
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    yield
    jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.mark.slow
@pytest.mark.usefixtures("_loose")
def test_all_implementations_give_the_same() -> None:
    random = np.random.default_rng(0)
    x, w = (jnp.asarray(random.standard_normal(s), jnp.bfloat16) for s in ((40, 64), (3, 64, 128)))
    sizes = jnp.asarray([11, 0, 20], jnp.int32)
    wanted = values("ragged_dot", x, w, sizes)
    with targeting("interpreter"):
        kernel = values("mosaic_gpu", x, w, sizes)
    for found in (kernel, values("blocked", x, w, sizes)):
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-2, atol=2e-2 * np.abs(b).max())
