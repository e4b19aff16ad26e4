"""Packed experts: interpreted, lowered, blocks, gradient, refusals, and `ops.linear.grouped`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.choices import taken
from jaxllm.core.qarray import dequantize
from jaxllm.core.quantize import Scheme, quantize
from jaxllm.ops import linear
from pallas_kernels.errors import ShapeError, UnsupportedError
from pallas_kernels.quantized_matmul import grouped_quantized_matmul
from pallas_kernels.quantized_matmul.experts import blocks, rows_of_block
from pallas_kernels.quantized_matmul.order import kind_of, stored
from pallas_kernels.target import targeting
from tests.kernels.test_quantized_matmul import TABLES, draw, exact

SIZES = (3, 0, 9, 0, 7)  # of 21 rows: two belong to nobody
CASES = {
    "int4": {},
    "offsets": {"kind": "uint4", "offset": True, "out_dtype": "bfloat16"},
    "int8, groups of 64": {"kind": "int8", "group": 64},
    "fp8": {"kind": "float8_e4m3fn", "out_dtype": "bfloat16"},
    "nf4": {"kind": "uint4", "table": TABLES["nf4"], "group": 64},
    "mxfp4": {"kind": "uint4", "table": TABLES["e2m1"], "group": 32, "exponents": True},
    "arranged": {"arranged": True},
    "arranged offsets": {"kind": "uint4", "offset": True, "arranged": True},
}


def packed(outputs, inputs, **options):
    """x [21, K] and [E, …] of values, scales, offsets; no two experts alike."""
    experts = len(SIZES)
    x, values, scale, offset = draw(21, experts * outputs, inputs, **options)
    offset = None if offset is None else offset.reshape(experts, outputs, -1)
    return x, (
        values.reshape(experts, outputs, -1),
        scale.reshape(experts, outputs, -1),
        offset,
    )


def wanted(x, packed, sizes, table=()):
    values, scale, offset = packed
    out, start = np.zeros((x.shape[0], values.shape[1])), 0
    for expert, size in enumerate(sizes):
        one = None if offset is None else offset[expert]
        rows = x[start : start + size]
        out[start : start + size] = exact(rows, values[expert], scale[expert], one, table)
        start += size
    return out


@pytest.mark.parametrize("name", CASES)
def test_interpreted(name):
    """At most twice the error of the unpacked product in bfloat16, beside its rounding."""
    options = {"table": (), "arranged": False, "out_dtype": "float32"} | CASES[name]
    table, arranged, out_dtype = (options.pop(k) for k in ("table", "arranged", "out_dtype"))
    x, given = packed(64, 256, **options)
    want, sizes = wanted(x, given, SIZES, table), jnp.asarray(SIZES)
    held = given
    if arranged:
        held = (stored(given[0], kind_of(given[0].dtype, table)), *given[1:])
    how = {"table": table, "out_dtype": out_dtype, "arranged": arranged}
    with targeting("interpreter"):
        call = functools.partial(grouped_quantized_matmul, implementation="mosaic_gpu", **how)
        found = jax.jit(call)(x, held, sizes)
    plain = grouped_quantized_matmul(x, held, sizes, **how)
    assert found.dtype == plain.dtype == out_dtype
    error, allowed = (np.abs(np.asarray(y, np.float64) - want).max() for y in (found, plain))
    assert error <= 2 * allowed + (2**-8 * np.abs(want).max() if out_dtype == "bfloat16" else 0)
    np.testing.assert_array_equal(np.asarray(found)[sum(SIZES) :], 0)


@pytest.mark.parametrize("name", CASES)
def test_lowering(name):
    options = {"table": (), "arranged": False, "out_dtype": "bfloat16"} | CASES[name]
    table, arranged, out_dtype = (options.pop(k) for k in ("table", "arranged", "out_dtype"))
    x, given = packed(256, 2048, **options)
    how = {"table": table, "out_dtype": out_dtype, "arranged": arranged}
    call = functools.partial(grouped_quantized_matmul, implementation="mosaic_gpu", **how)
    with targeting("gpu"):
        lowered = jax.jit(call).trace(x, given, jnp.asarray(SIZES))
        assert "mosaic_gpu" in lowered.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("sizes", [SIZES, (0, 0, 0), (21,), (1,) * 20, (-2, 30, 5)])
@pytest.mark.parametrize("block", [8, 64])
def test_every_row_stands_in_one_block_of_its_group(sizes, block):
    held = blocks(jnp.asarray(sizes), 21, block)
    owner, row = np.asarray(held.owner), np.asarray(held.row)
    there = row < 21
    assert (there.any(1) == (owner >= 0)).all()
    stops = np.minimum(np.cumsum(np.maximum(sizes, 0)), 21)
    group = np.searchsorted(stops, np.arange(21), side="right")
    np.testing.assert_array_equal(np.sort(row[there]), np.arange(stops[-1]))
    flat, place = row.ravel(), np.asarray(held.place)
    np.testing.assert_array_equal(flat[place[: stops[-1]]], np.arange(stops[-1]))
    assert (place[stops[-1] :] == -1).all()
    for mine, rows in zip(owner, row, strict=True):
        assert (group[rows[rows < 21]] == mine).all()


def test_blocks_have_room_for_what_most_groups_have():
    assert [rows_of_block(r, 64) for r in (1, 64, 512, 2048, 99_999)] == [8, 8, 16, 64, 64]


def test_the_gradient_is_that_of_the_unpacked_matrices():
    x, given = packed(64, 256)
    x, sizes = x.astype(jnp.float32), jnp.asarray(SIZES)
    pull = jnp.asarray(np.random.default_rng(1).standard_normal((21, 64)), jnp.float32)

    def plain(x):
        w = jnp.repeat(given[1], 128, axis=2) * given[0].astype(jnp.float32)
        return jax.lax.ragged_dot(x, w.swapaxes(1, 2), sizes, precision="highest")

    _, back = jax.vjp(lambda x: grouped_quantized_matmul(x, given, sizes), x)
    _, expected = jax.vjp(plain, x)
    np.testing.assert_allclose(back(pull)[0], expected(pull)[0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("scheme", ["int4", "int8", "nf4", "mxfp4"])
def test_experts_of_a_model_take_it_and_agree_with_unpacked_ones(scheme):
    """`ops.linear.grouped` on a quantized leaf; a plain one of the same values takes XLA's form."""
    random = np.random.default_rng(0)
    w = jnp.asarray(random.standard_normal((4, 256, 128)), jnp.float32)
    leaf = quantize(w, Scheme(format=scheme), lead=1)
    x = jnp.asarray(random.standard_normal((24, 256)), jnp.bfloat16)
    sizes, how = jnp.asarray([10, 0, 9, 3]), {"dtype": jnp.bfloat16}
    with targeting("interpreter"), taken() as took:
        found = jax.jit(functools.partial(linear.grouped, **how))(x, leaf, sizes)
    assert took["experts"] == {"packed"}
    with taken() as took:
        plain = linear.grouped(x, dequantize(leaf, jnp.float32), sizes, **how)
    assert took["experts"] == {"blocked"}
    want = np.asarray(plain, np.float64)
    np.testing.assert_allclose(
        np.asarray(found, np.float64), want, atol=2e-2 * np.abs(want).max(), rtol=0
    )


def test_many_rows_are_unpacked_once():
    leaf = quantize(jnp.ones((2, 128, 64)), Scheme(format="int4"), lead=1)
    x = jnp.ones((129, 128), jnp.bfloat16)
    with targeting("interpreter"), taken() as took:
        linear.grouped(x, leaf, jnp.asarray([100, 29]), dtype=jnp.bfloat16)
    assert took["experts"] == {"blocked"}


def test_refusals():
    x, given = packed(64, 256)
    sizes = jnp.asarray(SIZES)
    with pytest.raises(ShapeError, match=r"x \[R, K\], values \[E, O, K\]"):
        grouped_quantized_matmul(x, given, sizes[:3])
    with pytest.raises(ShapeError, match="groups that divide K = 256"):
        grouped_quantized_matmul(x, (given[0], given[1][..., :0], None), sizes)
    with pytest.raises(ShapeError, match="must be integers"):
        grouped_quantized_matmul(x, given, sizes.astype(jnp.float32))
    with pytest.raises(UnsupportedError, match="did you mean 'mosaic_gpu'"):
        grouped_quantized_matmul(x, given, sizes, implementation="mosaicgpu")
    with pytest.raises(UnsupportedError, match="it needs a CUDA device, this is cpu"):
        grouped_quantized_matmul(x, given, sizes, implementation="mosaic_gpu")
    with targeting("gpu"), pytest.raises(UnsupportedError, match="activations in bfloat16"):
        grouped_quantized_matmul(x.astype(jnp.float32), given, sizes, implementation="mosaic_gpu")
