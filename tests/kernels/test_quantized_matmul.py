"""The product with packed integers: reference, interpreted kernel, lowering, gradient, refusals."""

import functools
import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.errors import ShapeError, UnsupportedError
from pallas_kernels.quantized_matmul import quantized_matmul
from pallas_kernels.quantized_matmul.api import Plan, product, tiles_for
from pallas_kernels.quantized_matmul.mosaic_gpu import Share, Tiles
from pallas_kernels.quantized_matmul.order import BLOCK, natural, order, stored
from pallas_kernels.quantized_matmul.shapes import CASES as TIMED
from pallas_kernels.target import targeting
from tests.kernels.compile_grouped_tpu import ENVIRONMENT, TYPES

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
    "rows, tiles in parts": {"count": 5, "steps": 3},
    "tiles of rows": {"count": 21, "steps": 6, "rows": 16},
    "turned": {"count": 8, "steps": 8, "out_dtype": "bfloat16"},
    "offset": {"count": 3, "kind": "uint4", "offset": True},
    "int8": {"count": 8, "kind": "int8", "warpgroups": 2},
    "fp8": {"count": 8, "kind": "float8_e4m3fn"},
    "groups of 32": {"count": 8, "group": 32},
    "groups of 64": {"count": 8, "group": 64, "steps": 3},
    "large groups": {"count": 8, "group": 256},
    "nf4": {"count": 2, "kind": "uint4", "table": TABLES["nf4"], "group": 64},
    "mxfp4": {
        "count": 2,
        "kind": "uint4",
        "table": TABLES["e2m1"],
        "group": 32,
        "exponents": True,
    },
}


@pytest.mark.parametrize("name", CASES)
def test_interpreted(name):
    """At most twice the error of the product in bfloat16; integers are multiplied unrounded."""
    options = {"rows": 8, "table": (), "out_dtype": "float32"} | CASES[name]
    cut = {key: options.pop(key) for key in ("steps", "warpgroups") if key in options}
    rows, table, out_dtype = (options.pop(key) for key in ("rows", "table", "out_dtype"))
    arguments = draw(options.pop("count"), 128, 512, **options)
    tiles = Tiles(**({"stages": 2, "steps": 4, "warpgroups": 1, "rows": rows} | cut))
    plan = Plan(
        implementation="mosaic_gpu", tiles=tiles, table=table, out_dtype=out_dtype, interpret=True
    )
    found = product(*arguments, plan)
    wanted = exact(*arguments, table)
    plain = quantized_matmul(*arguments, table=table)
    assert found.dtype == out_dtype
    error, allowed = (np.abs(np.asarray(y, np.float64) - wanted).max() for y in (found, plain))
    largest = np.abs(wanted).max()
    assert error <= 2 * allowed + (2**-8 * largest if out_dtype == "bfloat16" else 0)
    if out_dtype == "float32" and not table:
        assert error < 1e-5 * largest


@pytest.mark.parametrize("name", [*CASES, "64 rows", "200 rows", "whole row"])
def test_lowering(name):
    more = {
        "64 rows": {"count": 64},
        "200 rows": {"count": 200},
        "whole row": {"count": 8, "group": 2048, "kind": "int8"},
    }
    options = {"count": 8, "out_dtype": "float32", "table": ()} | (CASES | more)[name]
    for key in ("steps", "rows", "warpgroups"):
        options.pop(key, None)
    table, out_dtype = options.pop("table"), options.pop("out_dtype")
    arguments = draw(options.pop("count"), 256, 2048, **options)
    call = functools.partial(
        quantized_matmul, table=table, out_dtype=out_dtype, implementation="mosaic_gpu"
    )
    with targeting("gpu"):
        lowered = jax.jit(call).trace(*arguments).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


def test_shares():
    """Every step of every tile is one program's, and the parts are found where they were put."""
    for tiles, steps, each in ((3, 4, 4), (3, 4, 3), (5, 7, 11), (2, 9, 2), (4, 4, 8)):
        share = Share(tiles, steps, each)
        places, there = share.parts()
        wanted = [set() for _ in range(tiles)]
        for here in range(tiles * steps):
            program, tile = here // each, here // steps
            wanted[tile].add(program * share.slots + tile - program * each // steps)
        assert [set(p[t > 0]) for p, t in zip(places, there, strict=True)] == wanted
        assert share.whole == (there.sum(1) == 1).all()
        assert places.max() < share.programs * share.slots


@pytest.mark.parametrize("options", [{"count": 3}, {"count": 20, "kind": "int8", "group": 512}])
def test_interpreted_for_a_tpu(options):
    options = dict(options)
    arguments = draw(options.pop("count"), 256, 2048, **options)
    with targeting("interpreter"):
        found = quantized_matmul(*arguments, implementation="mosaic_tpu")
    wanted = exact(*arguments)
    assert np.abs(np.asarray(found) - wanted).max() < 1e-5 * np.abs(wanted).max()


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs the package libtpu")
@pytest.mark.parametrize("topology", TYPES)
def test_every_timed_case_compiles_for_a_tpu(topology):
    command = [sys.executable, "-m", "tests.kernels.compile_quantized_tpu", topology]
    env = os.environ | ENVIRONMENT | {"TPU_ACCELERATOR_TYPE": TYPES[topology]}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    held = [case for case in TIMED.values() if case.kind in ("int4", "int8") and case.group >= 128]
    assert done.stdout.count("1 kernels") == len(held)


@pytest.mark.parametrize("kind", ["int4", "int8", "table"])
def test_orders(kind):
    """A place of its own for each input of a block, and the way back."""
    assert sorted(order(kind)) == list(range(BLOCK))
    x = np.arange(3 * 64).reshape(3, 64)
    assert np.array_equal(natural(stored(x, kind), kind), x)
    # A thread's four pairs: inputs 2 q and 2 q + 1 of each eight, from the eight that it read.
    pairs = order(kind).reshape(4, 4, 2)
    for thread in range(4):
        assert sorted(pairs[:, thread].ravel()) == list(range(8 * thread, 8 * thread + 8))


@pytest.mark.parametrize("offset", [False, True])
def test_gradient(offset):
    """With respect to x, from the packed values; the rest is constant."""
    arguments = draw(4, 64, 256, kind="uint4", offset=offset)
    x = arguments[0].astype(jnp.float32)
    dy = jnp.asarray(np.random.default_rng(1).standard_normal((4, 64)), jnp.float32)
    loss = lambda x: jnp.sum(quantized_matmul(x, *arguments[1:]) * dy)  # noqa: E731
    identity = exact(jnp.eye(256), *arguments[1:])
    assert np.abs(jax.grad(loss)(x) - np.asarray(dy, np.float64) @ identity.T).max() < 1e-3


def test_refusals():
    x, values, scale, _ = draw(4, 128, 256)
    with pytest.raises(UnsupportedError, match="did you mean 'mosaic_gpu'"):
        quantized_matmul(x, values, scale, implementation="mosaic_gp")
    named = functools.partial(quantized_matmul, implementation="mosaic_gpu")
    with pytest.raises(UnsupportedError, match="needs a CUDA device, this is cpu"):
        named(x, values, scale)
    with pytest.raises(UnsupportedError, match="needs a TPU, this is cpu"):
        quantized_matmul(x, values, scale, implementation="mosaic_tpu")
    with targeting("gpu"):
        with pytest.raises(UnsupportedError, match="bfloat16 and float16 for int4, not float32"):
            named(x.astype(jnp.float32), values, scale)
        with pytest.raises(UnsupportedError, match="1 to 512 rows, not 513"):
            named(jnp.zeros((513, 256), jnp.bfloat16), values, scale)
        with pytest.raises(UnsupportedError, match="groups of 16"):
            named(x, values, jnp.ones((128, 16)))
    with pytest.raises(UnsupportedError, match="float8_e4m3fn, not int32"):
        quantized_matmul(x, values.astype(jnp.int32), scale)
    with pytest.raises(ShapeError, match=r"x \[M, K\]"):
        quantized_matmul(x[:, :128], values, scale)
    with pytest.raises(ShapeError, match="groups that divide"):
        quantized_matmul(x, values, scale[:64])
    with pytest.raises(ShapeError, match="16 numbers for values in uint4, found 3"):
        quantized_matmul(x, values, scale, table=(1.0, 2.0, 3.0))
    with pytest.raises(ShapeError, match="offsets like"):
        quantized_matmul(x, values, scale, scale[:1])


def test_tiles():
    """No more programs than processors, and all of them busy where there is work."""
    for count, inputs, outputs in (
        (1, 8192, 28672),
        (64, 4096, 14336),
        (3, 2048, 2048),
        (1, 576, 960),
    ):
        tiles = tiles_for(count, inputs, outputs)
        share = Share(outputs // tiles.outputs, inputs // tiles.inputs, tiles.steps)
        assert share.programs <= 132
        assert share.programs * tiles.steps < 132 * (tiles.steps + 1)
        assert share.programs > 66
