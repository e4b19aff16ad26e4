"""The product with packed integers: reference, interpreted kernel, lowering, gradient, refusals."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.errors import ShapeError, UnsupportedError
from pallas_kernels.quantized_matmul import quantized_matmul
from pallas_kernels.quantized_matmul.api import Plan, product, tiles_for
from pallas_kernels.quantized_matmul.mosaic_gpu import Tiles, run
from pallas_kernels.quantized_matmul.order import stored
from pallas_kernels.target import targeting

LIMITS = {"int4": (-8, 8), "uint4": (0, 16), "int8": (-127, 128)}
TABLES = {
    "nf4": tuple(float(x) for x in np.linspace(-1, 1, 16) ** 3),  # any numbers do
    "e2m1": tuple(sign * x for sign in (1, -1) for x in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)),
}


def draw(count, outputs, inputs, *, group=128, kind="int4", offset=False, exponents=False):
    random = np.random.default_rng(0)
    x = jnp.asarray(random.standard_normal((count, inputs)), jnp.bfloat16)
    if kind == "float8_e4m3fn":
        values = jnp.asarray(64 * random.standard_normal((outputs, inputs)), jnp.float32)
    else:
        values = jnp.asarray(random.integers(*LIMITS[kind], (outputs, inputs)))
    values = values.astype(kind)
    scale = jnp.asarray(random.uniform(0.5, 1.5, (outputs, inputs // group)), jnp.float32)
    if exponents:
        scale = jnp.exp2(jnp.floor(4 * scale)).astype(jnp.float8_e8m0fnu)
    return x, values, scale, jnp.asarray(-3 * scale) if offset else None


def exact(x, values, scale, offset, table=()):
    """In float64, of the unpacked values as they are."""
    group = values.shape[1] // scale.shape[1]
    w = np.asarray(values.astype(jnp.float32), np.float64)
    w = np.asarray(table, np.float64)[w.astype(int)] if table else w
    w = w * np.repeat(np.asarray(scale.astype(jnp.float32), np.float64), group, 1)
    if offset is not None:
        w = w + np.repeat(np.asarray(offset, np.float64), group, 1)
    return np.asarray(x.astype(jnp.float32), np.float64) @ w.T


CASES = {
    "one row": {"count": 1},
    "rows and splits": {"count": 5, "splits": 2},
    "offset": {"count": 3, "kind": "uint4", "offset": True},
    "int8": {"count": 8, "kind": "int8"},
    "small groups": {"count": 8, "group": 64},
    "large groups": {"count": 8, "group": 256},
}


@pytest.mark.parametrize("name", CASES)
def test_interpreted(name):
    """At most twice the error of the product in bfloat16; the codes are multiplied unrounded."""
    options = {"count": 8, "splits": 1} | CASES[name]
    splits = options.pop("splits")
    arguments = draw(options.pop("count"), 128, 512, **options)
    group = 512 // arguments[2].shape[1]
    tiles = Tiles(inputs=min(group, 128), stages=2, splits=splits)
    plan = Plan(implementation="mosaic_gpu", tiles=tiles, interpret=True)
    found = product(*arguments, plan)
    wanted = exact(*arguments)
    plain = quantized_matmul(*arguments)
    assert found.dtype == plain.dtype == jnp.float32
    error, allowed = (np.abs(np.asarray(y) - wanted).max() for y in (found, plain))
    assert error <= 2 * allowed
    assert error < 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("name", [*CASES, "64 rows", "whole row"])
def test_lowering(name):
    more = {"64 rows": {"count": 64}, "whole row": {"count": 8, "group": 2048, "kind": "int8"}}
    options = {"count": 8, "splits": 4} | (CASES | more)[name]
    options.pop("splits")
    x, values, scale, _ = draw(-(-options.pop("count") // 8) * 8, 256, 2048, **options)
    tiles = tiles_for(2048, 256, 2048 // scale.shape[1])
    assert tiles.splits > 1 or tiles.inputs == 2048
    lowered = (
        jax.jit(lambda *a: run(*a, tiles=tiles))
        .trace(x, values, scale)
        .lower(lowering_platforms=("cuda",))
    )
    assert "mosaic_gpu" in lowered.as_text()


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("arranged", [False, True])
def test_gradient(offset, arranged):
    """With respect to x, from the packed values; the rest is constant."""
    arguments = draw(4, 64, 256, kind="uint4", offset=offset)
    x = arguments[0].astype(jnp.float32)
    dy = jnp.asarray(np.random.default_rng(1).standard_normal((4, 64)), jnp.float32)
    held = (stored(arguments[1], "uint4") if arranged else arguments[1], *arguments[2:])
    loss = lambda x: jnp.sum(quantized_matmul(x, *held, arranged=arranged) * dy)  # noqa: E731
    identity = exact(jnp.eye(256), *arguments[1:])
    assert np.abs(jax.grad(loss)(x) - np.asarray(dy, np.float64) @ identity.T).max() < 1e-3


def test_refusals():
    x, values, scale, _ = draw(4, 128, 256)
    with pytest.raises(UnsupportedError, match="did you mean 'mosaic_gpu'"):
        quantized_matmul(x, values, scale, implementation="mosaic_gp")
    named = functools.partial(quantized_matmul, implementation="mosaic_gpu")
    with pytest.raises(UnsupportedError, match="needs a CUDA device, this is cpu"):
        named(x, values, scale)
    with targeting("gpu"):
        with pytest.raises(UnsupportedError, match="bfloat16 and float16, not float32"):
            named(x.astype(jnp.float32), values, scale)
        with pytest.raises(UnsupportedError, match="1 to 64 rows, not 65"):
            named(jnp.zeros((65, 256), jnp.bfloat16), values, scale)
        with pytest.raises(UnsupportedError, match="groups of 64"):
            named(x, values, jnp.ones((128, 8)))
        with pytest.raises(UnsupportedError, match="natural order"):
            named(x, values, scale, arranged=True)
    with pytest.raises(UnsupportedError, match="needs a TPU, this is cpu"):
        quantized_matmul(x, values, scale, implementation="mosaic_tpu")
    with pytest.raises(ShapeError, match="16 numbers for values in uint4, found 3"):
        quantized_matmul(x, values, scale, table=(1.0, 2.0, 3.0))
    with pytest.raises(UnsupportedError, match="float8_e4m3fn, not int32"):
        quantized_matmul(x, values.astype(jnp.int32), scale)
    with pytest.raises(ShapeError, match=r"x \[M, K\]"):
        quantized_matmul(x[:, :128], values, scale)
    with pytest.raises(ShapeError, match="groups that divide"):
        quantized_matmul(x, values, scale[:64])
    with pytest.raises(ShapeError, match="offsets like"):
        quantized_matmul(x, values, scale, scale[:1])


def test_tiles():
    """Every processor has programs enough, and every program steps enough."""
    for inputs, outputs in ((8192, 28672), (4096, 14336), (2048, 2048), (576, 960)):
        tiles = tiles_for(inputs, outputs, 64)
        steps = inputs // tiles.inputs
        assert steps % tiles.splits == 0
        assert steps // tiles.splits >= min(8, steps)
    assert dataclasses.replace(Tiles(), splits=2).inputs == 128
