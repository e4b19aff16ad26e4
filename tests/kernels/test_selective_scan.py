"""The selective scan on the CPU: reference, arguments; its kernel interpreted and lowered."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.errors import ShapeError, UnsupportedError
from pallas_kernels.selective_scan import explain, selective_scan
from pallas_kernels.selective_scan.mosaic_gpu import Tiles, forward
from pallas_kernels.target import targeting


def draw(batch=1, length=12, channels=64, state=16):
    random = np.random.default_rng(0)
    x, dt = random.standard_normal((2, batch, length, channels)).astype(np.float32)
    b, c = random.standard_normal((2, batch, length, state)).astype(np.float32)
    a = -np.exp(random.standard_normal((channels, state))).astype(np.float32)
    initial = random.standard_normal((batch, channels, state)).astype(np.float32)
    dt = np.log1p(np.exp(dt - 2))
    dt[:, ::5] = 0
    return x, dt, a, b, c, initial


def by_hand(x, dt, a, b, c, initial):
    """Token by token in float64."""
    x, dt, a, b, c, h = (np.asarray(z, np.float64) for z in (x, dt, a, b, c, initial))
    y = np.zeros(x.shape)
    for t in range(x.shape[1]):
        h = np.exp(dt[:, t, :, None] * a) * h + (dt[:, t] * x[:, t])[..., None] * b[:, t, None]
        y[:, t] = np.einsum("bim,bm->bi", h, c[:, t])
    return y, h


def test_reference_is_what_the_words_say() -> None:
    given = draw()
    *inputs, initial = (jnp.asarray(z) for z in given)
    found = selective_scan(*inputs, initial=initial, implementation="reference")
    for got, true in zip(found, by_hand(*given), strict=True):
        np.testing.assert_allclose(got, true, atol=1e-5)


def test_kernel_in_the_interpreter() -> None:
    x, *rest = draw(length=16)
    narrow = jnp.asarray(x, jnp.bfloat16)
    tiles = Tiles(tokens=8, unroll=4)
    y, final = forward(narrow, *(jnp.asarray(z) for z in rest), tiles=tiles, interpret=True)
    want = by_hand(narrow.astype(jnp.float32), *rest)
    # The state is in float32, y rounded once.
    np.testing.assert_allclose(np.asarray(final), want[1], atol=1e-5)
    np.testing.assert_allclose(np.asarray(y, np.float32), want[0], rtol=2**-8, atol=1e-5)


def test_lowers_for_cuda() -> None:
    x, dt, a, b, c, initial = (jnp.asarray(z) for z in draw(length=70, channels=128))

    def run(x, dt, a, b, c, initial):
        with targeting("gpu"):
            return selective_scan(x, dt, a, b, c, initial=initial, implementation="mosaic_gpu")

    narrow = x.astype(jnp.bfloat16)
    text = jax.jit(run).trace(narrow, dt, a, b, c, initial).lower(lowering_platforms=("cuda",))
    assert text.as_text().count("mosaic_gpu_v2") == 1


def test_wrong_arguments_are_named() -> None:
    x, dt, a, b, c, initial = (jnp.asarray(z) for z in draw())
    with pytest.raises(ShapeError, match="x and dt"):
        selective_scan(x, dt[:, 1:], a, b, c)
    with pytest.raises(ShapeError, match="b and c"):
        selective_scan(x, dt, a, b[..., 1:], c)
    with pytest.raises(ShapeError, match="initial must be"):
        selective_scan(x, dt, a, b, c, initial=initial[:, 1:])
    with pytest.raises(UnsupportedError, match="needs a CUDA device"):
        selective_scan(x, dt, a, b, c, implementation="mosaic_gpu")
    with targeting("gpu"):
        with pytest.raises(UnsupportedError, match="bfloat16 and float16"):
            selective_scan(x, dt, a, b, c, implementation="mosaic_gpu")
        narrow = x.astype(jnp.bfloat16)
        assert explain(narrow, a).name == "mosaic_gpu"
        assert "multiple of 64 channels" in explain(narrow[..., :60], a[:60]).why
        assert "states a channel" in explain(narrow, a[:, :12]).why
