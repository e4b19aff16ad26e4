"""Eight-bit floats with scales in blocks: reference, interpreted kernel, lowering, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.errors import ShapeError, UnsupportedError
from pallas_kernels.scaled_matmul import explain, rounded, scaled_matmul
from pallas_kernels.scaled_matmul.api import tiles_for
from pallas_kernels.scaled_matmul.mosaic_gpu import Tiles, run
from pallas_kernels.target import targeting


def draw(count, inputs, outputs):
    random = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(random.standard_normal(shape), jnp.float32)  # noqa: E731
    scale = jnp.asarray(random.uniform(0.5, 1.5, (outputs // 128, inputs // 128)), jnp.float32)
    scales = jnp.exp2(jnp.arange(inputs // 128, dtype=jnp.float32))
    x = normal(count, inputs) * jnp.repeat(scales, 128)[None]  # blocks of other sizes
    return *rounded(x), (64 * normal(outputs, inputs)).astype(jnp.float8_e4m3fn), scale


def exact(x, x_scale, values, scale):
    """In float64."""

    def wide(a, s, rows):
        s = np.repeat(np.repeat(np.asarray(s, np.float64), 128, 1), rows, 0)
        return np.asarray(a.astype(jnp.float32), np.float64) * s

    return wide(x, x_scale, 1) @ wide(values, scale, 128).T


FORMS = {
    "two halves of the rows": Tiles(halves=2, piece=32, buffers=3),
    "two halves, outputs in pairs": Tiles(halves=2, shared="x", stages=2),
    "192 outputs in pairs of rows": Tiles(halves=1, parts=(192,), shared="values"),
    "parts, begun together": Tiles(halves=1, parts=(128, 64), stages=5, buffers=2),
    "parts, one ahead": Tiles(halves=1, parts=(96, 96), ahead=2, piece=32),
}


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_of_tiles_give_the_same(form):
    """Edges in both dims: 300 rows and 512 outputs in tiles of 128 or 256, and 128 or 192."""
    arguments = draw(300, 256, 512)
    wanted = exact(*arguments)
    with targeting("interpreter"):
        found = run(*arguments, tiles=FORMS[form], out_dtype="float32")
    assert np.abs(np.asarray(found) - wanted).max() < 1e-6 * np.abs(wanted).max()


def test_tiles():
    """Memory fits by the kernel's own lowering below; here what pairs share."""
    assert not tiles_for(256, 28672).shared and tiles_for(4096, 28672).shared == "values"
    assert tiles_for(3 * 128, 28672).shared == "x"  # rows would come in twos and a half
    assert tiles_for(4096, 1024).outputs == 128


@pytest.mark.parametrize(("count", "outputs"), [(1, 384), (130, 384)])
def test_kernel_and_reference_are_exact_to_a_rounding(count, outputs):
    """One and two tiles of rows."""
    arguments = draw(count, 256, outputs)
    wanted = exact(*arguments)
    with targeting("interpreter"):
        found = scaled_matmul(*arguments, out_dtype="float32")
    plain = scaled_matmul(*arguments, out_dtype="float32", implementation="reference")
    for values in (found, plain):
        assert values.dtype == jnp.float32
        assert np.abs(np.asarray(values) - wanted).max() < 1e-6 * np.abs(wanted).max()


def test_results_in_bfloat16_and_more_tiles_than_programs():
    arguments = draw(70, 128, 512)
    with targeting("interpreter"):
        found = scaled_matmul(*arguments)
    assert found.dtype == jnp.bfloat16
    wanted = exact(*arguments)
    assert np.abs(np.asarray(found, np.float64) - wanted).max() < 2**-8 * np.abs(wanted).max()


def test_rounding_keeps_zeros_and_seven_percent():
    x = jnp.asarray(np.random.default_rng(1).standard_normal((3, 256)), jnp.bfloat16)
    codes, scale = rounded(x.at[1].set(0))
    back = codes.astype(jnp.float32) * jnp.repeat(scale, 128, axis=1)
    assert np.abs(back[1]).max() == 0 and np.isfinite(np.asarray(scale)).all()
    assert np.abs(back - x.at[1].set(0).astype(jnp.float32)).max() < 0.07 * 4


@pytest.mark.parametrize("out_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("count", [5, 130, 4096])
def test_lowers_for_cuda(count, out_dtype):
    kinds = jnp.float8_e4m3fn, jnp.float32, jnp.float8_e4m3fn, jnp.float32
    shapes = (count, 8192), (count, 64), (28672, 8192), (224, 64)
    arguments = [jax.ShapeDtypeStruct(*both) for both in zip(shapes, kinds, strict=True)]
    with targeting("gpu"):
        call = jax.jit(lambda *a: scaled_matmul(*a, out_dtype=out_dtype))
        text = call.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


def test_refusals():
    x, x_scale, values, scale = draw(4, 256, 128)
    with pytest.raises(UnsupportedError, match="needs a CUDA device, this is cpu; use 'auto'"):
        scaled_matmul(x, x_scale, values, scale, implementation="mosaic_gpu")
    assert explain(x).name == "reference" and "not mosaic_gpu" in explain(x).why
    with targeting("gpu"), pytest.raises(UnsupportedError, match="not float8_e4m3fn"):
        explain(x, out_dtype=jnp.float8_e4m3fn, implementation="mosaic_gpu")
    with pytest.raises(ShapeError, match=r"x \[M, K\] and values \[O, K\]"):
        scaled_matmul(x[:, :128], x_scale, values, scale)
    with pytest.raises(ShapeError, match="multiples of 128"):
        scaled_matmul(x, x_scale, values[:100], scale)
    with pytest.raises(ShapeError, match="x_scale"):
        scaled_matmul(x, x_scale[:, :1], values, scale)
    with pytest.raises(ShapeError, match="found int8"):
        scaled_matmul(x.astype(jnp.int8), x_scale, values, scale)
