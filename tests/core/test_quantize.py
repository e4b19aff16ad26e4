"""Formats of quantized leaves: error bounds, tables against their sources, layouts, rows."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxllm.core import qarray
from jaxllm.core.layouts import as_planes, as_values
from jaxllm.core.qarray import CODES, QArray, dequantize_rows, scales
from jaxllm.core.qrows import join_rows, take_rows
from jaxllm.core.quantize import Scheme, quantize_jit
from jaxllm.errors import ConfigError, ShapeError, UnsupportedError

quantize = quantize_jit
dequantize = jax.jit(qarray.dequantize, static_argnums=1)
LEVELS = {"int8": 127, "int4": 7}
values = st.floats(-1e3, 1e3, width=32).map(lambda x: 0.0 if abs(x) < 1e-3 else x)


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


EVERY = {
    "int8 row": Scheme(format="int8"),
    "int8 group": Scheme(format="int8", group=32),
    "int8 offset": Scheme(format="int8", group=32, symmetric=False),
    "int4 128": Scheme(format="int4"),
    "int4 32": Scheme(format="int4", group=32),
    "int4 offset": Scheme(format="int4", group=64, symmetric=False),
    "nf4": Scheme(format="nf4"),
    "nf4 single": Scheme(format="nf4", double=False),
    "fp4": Scheme(format="fp4"),
    "mxfp4": Scheme(format="mxfp4"),
    "fp8 tensor": Scheme(format="fp8", rows=0),
    "fp8 row": Scheme(format="fp8"),
    "fp8 blocks": Scheme(format="fp8", rows=128, group=128),
}


@settings(max_examples=40, deadline=None)
@given(
    w=hnp.arrays(np.float32, (4, 6), elements=values),
    format=st.sampled_from(["int8", "int4"]),
    group=st.sampled_from([0, 2, 4]),
    symmetric=st.booleans(),
)
def test_error_is_half_a_step(w, format, group, symmetric):
    """One step is (range of the group) / (levels - 1); rounding errs by half of it at most."""
    q = quantize(jnp.asarray(w), Scheme(format=format, group=group, symmetric=symmetric))
    high = LEVELS[format]
    rows = w.T.astype(np.float64).reshape(6, -1, group or 4)
    spread = rows.max(-1) - rows.min(-1)
    step = np.abs(rows).max(-1) / high if symmetric else spread / (2 * high + 1)
    slack = 1e-5 * np.abs(rows).max(-1) + 1e-12
    error = np.abs(np.asarray(dequantize(q, jnp.float32)).T.reshape(rows.shape) - rows)
    assert (error <= (step / 2 + slack)[..., None]).all()
    assert (q.offset is None) == symmetric
    assert q.scale.shape == (6, 4 // (group or 4))


@pytest.mark.parametrize("name", EVERY)
def test_formats(name):
    """Relative error and bits a value of normal weights, as the formats promise."""
    q = quantize(draw(256, 8, 32), EVERY[name])
    error = float(jnp.sqrt(jnp.mean((dequantize(q, jnp.float32) - draw(256, 8, 32)) ** 2)))
    bits = q.nbytes * 8 / q.values.size
    wide = name.startswith(("int8", "fp8"))
    assert error < (0.03 if wide else 0.125), (error, bits)
    assert bits < (10.1 if wide else 5.1)
    assert bits < 4.2 if name == "nf4" else True
    assert dequantize(q, jnp.bfloat16).dtype == jnp.bfloat16
    assert q.lead == ()
    assert (q.num_inputs, q.num_outputs) == (256, 256)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("value", [0.0, 3.5, -700.0])
def test_groups_of_one_value_come_back(name, value):
    """All but the formats whose scale is a power of two, or quantized itself."""
    if name in ("mxfp4", "nf4", "fp4") and value:
        return
    w = jnp.full((256, 128), value, jnp.float32)
    q = quantize(w, EVERY[name])
    assert np.allclose(dequantize(q, jnp.float32), w, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", EVERY)
def test_a_stacked_leaf_is_the_stack_of_its_layers(name):
    w = draw(2, 128, 4, 64)
    whole = quantize(w, EVERY[name], lead=1)
    layers = [quantize(x, EVERY[name]) for x in w]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    assert jax.tree.structure(whole) == jax.tree.structure(stacked)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(stacked), strict=True):
        assert np.allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-6)
    one = jax.tree.map(lambda x: x[1], whole)
    assert np.array_equal(dequantize(whole, jnp.float32)[1], dequantize(one, jnp.float32))


@pytest.mark.parametrize("name", EVERY)
def test_rows_are_cut_and_joined_exactly(name):
    """Projections of one input as one matrix, and out of it again, whatever their heights."""
    leaves = [quantize(draw(256, n, seed=n), EVERY[name]) for n in (128, 64)]
    joined = join_rows(leaves, (256, 192), 1)
    wanted = jnp.concatenate([dequantize(q, jnp.float32) for q in leaves], axis=1)
    assert np.array_equal(dequantize(joined, jnp.float32), wanted)
    cut = take_rows(joined, slice(128, 192))
    assert np.array_equal(dequantize(cut, jnp.float32), dequantize(leaves[1], jnp.float32))
    mixed = np.r_[5:9, 140:130:-2]
    assert np.array_equal(dequantize(take_rows(joined, mixed), jnp.float32), wanted[:, mixed])


def test_leaves_of_different_kinds_are_not_joined():
    one, other = (quantize(draw(64, 8), Scheme(format="int8", group=g)) for g in (16, 32))
    with pytest.raises(UnsupportedError, match="fused=False"):
        join_rows([one, other], (64, 16), 1)
    order = np.random.default_rng(0).permutation(64).astype(np.int32)[None][0]
    ordered = dataclasses.replace(one, order=jnp.asarray(order))
    with pytest.raises(UnsupportedError, match="fused=False"):
        join_rows([ordered, one], (64, 16), 1)
    both = join_rows([ordered, ordered], (64, 16), 1)
    assert np.array_equal(both.order, order)


def test_scattered_inputs_come_back_in_order():
    q = quantize(draw(64, 8), Scheme(format="int4", group=16))
    order = np.random.default_rng(0).permutation(64).astype(np.int32)
    ordered = dataclasses.replace(q, order=jnp.asarray(order))
    found, held = dequantize_rows(ordered), dequantize_rows(q)
    assert np.array_equal(np.asarray(found)[:, order], held)


@pytest.mark.parametrize("name", [n for n in EVERY if "8" not in n.split()[0]])
def test_planes_hold_the_same_numbers(name):
    for w in (draw(2, 256, 16),):
        q = quantize(w, EVERY[name], lead=w.ndim - 2)
        planes = as_planes(q)
        assert planes.version == 2
        assert planes.values.shape == (*q.values.shape[:-1], 128)
        assert np.array_equal(dequantize(planes, jnp.float32), dequantize(q, jnp.float32))
        back = as_values(planes)
        assert back.values.dtype == q.values.dtype
        assert np.array_equal(np.asarray(back.values, np.int32), np.asarray(q.values, np.int32))
    host = jax.tree.map(np.asarray, q)
    assert isinstance(as_planes(host).values, np.ndarray)


def test_what_has_no_planes_stays():
    """Eight-bit formats, and halves that would cut a group."""
    for scheme, width in ((EVERY["int8 row"], 64), (EVERY["int4 32"], 96)):
        q = quantize(draw(width, 8), scheme)
        assert as_planes(q) is q


def test_tables_are_those_of_their_sources():
    """FP4 and MXFP4 as ml_dtypes has E2M1; NF4 as quantiles, scaled, of which 0 and 1 are two."""
    codes = np.arange(16, dtype=np.uint8).view(np.uint8)
    e2m1 = codes.astype(np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert np.array_equal(np.abs(CODES["fp4"]), np.abs(e2m1))
    assert np.array_equal(np.signbit(CODES["mxfp4"]), np.signbit(e2m1))
    quantile = lambda p: math.sqrt(2) * float(jax.scipy.special.erfinv(2 * p - 1))  # noqa: E731
    offset = 0.9677083
    high = [quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    low = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    wanted = np.sort([*high, 0.0, *low]) / max(high)
    assert np.abs(np.asarray(CODES["nf4"]) - wanted).max() < 1e-5
    dynamic = np.asarray(CODES["dynamic8"])
    assert (len(dynamic), dynamic.max(), 0.0 in dynamic) == (256, 1.0, True)
    assert (np.diff(dynamic) > 0).all()


def test_double_quantization_costs_little():
    w = draw(256, 64)
    single, double = (quantize(w, Scheme(format="nf4", double=d)) for d in (False, True))
    assert isinstance(double.scale, QArray)
    assert np.abs(scales(double) / scales(single) - 1).max() < 0.02
    assert double.nbytes < single.nbytes
    # 4 scales a row: 64 rows share one scale of scales.
    assert double.scale.scale.shape == (1, 1)


def test_extremes_reach_the_ends():
    q = quantize(jnp.asarray([[-7.0], [0.0], [1.0], [7.0]]), Scheme(format="int4", group=4))
    assert q.values.dtype == jnp.int4
    assert np.array_equal(np.asarray(q.values, np.int32), [[-7, 0, 1, 7]])


def test_low_precision_weights_quantize_too():
    w = draw(8, 8).astype(jnp.bfloat16)
    q = quantize(w, Scheme(format="int8", group=4))
    assert q.scale.dtype == jnp.float32
    assert np.abs(dequantize(q, jnp.float32) - np.asarray(w, np.float32)).max() < 0.02


def test_wrong_requests_are_errors():
    with pytest.raises(ConfigError, match="did you mean 'int4'"):
        Scheme(format="int44")
    for wrong in (
        {"format": "int4", "group": -1},
        {"format": "nf4", "symmetric": False},
        {"format": "mxfp4", "group": 64},
        {"format": "fp8", "double": True},
        {"format": "int8", "rows": -2},
    ):
        with pytest.raises(ConfigError):
            Scheme(**wrong)
    with pytest.raises(ShapeError, match="group of 3 does not divide the 4 inputs"):
        quantize(jnp.zeros((4, 6)), Scheme(format="int8", group=3))
    with pytest.raises(ShapeError, match="group of 128"):
        quantize(jnp.zeros((64, 6)), "int4")
