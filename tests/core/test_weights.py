"""Quantized leaves: error bounds, groups, zero points, constants; adapters by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxllm.core.weights import (
    AdaptedWeight,
    OutputsFirst,
    QArray,
    attach,
    dequantize,
    is_leaf,
    logical_shape,
    merge_adapter,
    plain,
    quantize,
)
from jaxllm.errors import ConfigError, ShapeError

LEVELS = {"int8": 127, "int4": 7}
values = st.floats(-1e3, 1e3, width=32).map(lambda x: 0.0 if abs(x) < 1e-3 else x)


def grouped(w, axis, group):
    """Groups along the last dim."""
    moved = np.moveaxis(np.asarray(w, np.float64), axis, -1)
    return moved.reshape(*moved.shape[:-1], -1, group)


@settings(max_examples=40, deadline=None)
@given(
    w=hnp.arrays(np.float32, (4, 6), elements=values),
    format=st.sampled_from(["int8", "int4"]),
    place=st.sampled_from([(-1, 6), (-1, 3), (-2, 2), (-2, 4)]),
    symmetric=st.booleans(),
)
def test_error_is_half_a_step(w, format, place, symmetric):
    """One step is (range of the group) / (levels - 1); rounding errs by half of it at most."""
    axis, group = place
    q = quantize(jnp.asarray(w), format, axis=axis, group=group, symmetric=symmetric)
    high = LEVELS[format]
    rows = grouped(w, axis, group)
    spread = rows.max(-1) - rows.min(-1)
    step = np.abs(rows).max(-1) / high if symmetric else spread / (2 * high + 1)
    slack = 1e-5 * np.abs(rows).max(-1) + 1e-12
    error = np.abs(grouped(dequantize(q, jnp.float32), axis, group) - rows)
    assert (error <= (step / 2 + slack)[..., None]).all()
    assert q.values.shape == w.shape
    assert (q.zero is None) == symmetric
    shape = list(w.shape)
    shape[axis] //= group
    assert q.scale.shape == tuple(shape)
    assert np.abs(np.asarray(q.values, np.int32)).max() <= high + 1


def test_zero_points_help_where_values_have_one_sign():
    w = jnp.asarray(5 + np.random.default_rng(0).random((16, 32)), jnp.float32)
    errors = []
    for symmetric in (True, False):
        q = quantize(w, "int4", axis=-1, group=16, symmetric=symmetric)
        errors.append(float(jnp.abs(dequantize(q, jnp.float32) - w).max()))
    assert errors[1] < errors[0] / 5


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [0.0, 3.5, -1e-6, -700.0])
def test_groups_of_one_value_come_back(value, symmetric):
    w = jnp.full((2, 8), value, jnp.float32)
    q = quantize(w, "int4", axis=-1, group=4, symmetric=symmetric)
    assert np.allclose(dequantize(q, jnp.float32), w, rtol=1e-6, atol=0)


def test_extremes_reach_the_ends():
    w = jnp.asarray([[-7.0, 0.0, 1.0, 7.0]])
    q = quantize(w, "int4", axis=-1)
    assert q.values.dtype == jnp.int4
    assert np.array_equal(np.asarray(q.values, np.int32), [[-7, 0, 1, 7]])
    assert np.array_equal(dequantize(q, jnp.float32), w)
    assert dequantize(q, jnp.bfloat16).dtype == jnp.bfloat16


def test_low_precision_weights_quantize_too():
    w = jnp.asarray(np.random.default_rng(0).standard_normal((8, 8)), jnp.bfloat16)
    q = quantize(w, "int8", axis=-2, group=4)
    assert q.scale.dtype == jnp.float32
    assert np.abs(dequantize(q, jnp.float32) - np.asarray(w, np.float32)).max() < 0.02


def test_wrong_requests_are_errors():
    w = jnp.zeros((4, 6))
    with pytest.raises(ConfigError, match="did you mean 'int4'"):
        quantize(w, "int44", axis=-1)
    for axis, group in ((-1, 4), (0, 2), (-2, 3)):
        with pytest.raises(ShapeError, match="group"):
            quantize(w, "int8", axis=axis, group=group)


def test_a_stacked_leaf_is_the_stack_of_its_layers():
    """The grouped dim counts from the end: quantizing layer by layer or all at once is the same."""
    w = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4, 6)), jnp.float32)
    whole = quantize(w, "int8", axis=-2, group=2, symmetric=False)
    layers = [quantize(x, "int8", axis=-2, group=2, symmetric=False) for x in w]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(stacked), strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))
    one = jax.tree.map(lambda x: x[1], whole)
    assert np.array_equal(dequantize(one, jnp.float32), dequantize(layers[1], jnp.float32))


def test_a_fresh_adapter():
    w = jnp.asarray(np.random.default_rng(0).standard_normal((64, 2, 16)), jnp.float32)
    leaf = attach(w, jax.random.key(0), rank=8, inputs=1, alpha=16.0)
    assert (leaf.a.shape, leaf.b.shape, leaf.scale) == ((1, 64, 8), (1, 8, 2, 16), 2.0)
    assert not leaf.b.any()
    assert abs(float(leaf.a.std()) - 1 / 8) < 0.02
    assert np.array_equal(merge_adapter(leaf), w)
    again = attach(w, jax.random.key(0), rank=8, inputs=1, alpha=16.0)
    assert np.array_equal(again.a, leaf.a)
    other = attach(w, jax.random.key(1), rank=8, inputs=1, alpha=16.0)
    assert not np.array_equal(other.a, leaf.a)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merging_by_hand(dtype):
    random = np.random.default_rng(0)
    w, a, b = (random.standard_normal(s) for s in ((4, 6), (2, 4, 3), (2, 3, 6)))
    leaf = AdaptedWeight(*(jnp.asarray(x, dtype) for x in (w, a, b)), scale=0.25)
    for number in (0, 1):
        merged = merge_adapter(leaf, number)
        assert merged.dtype == dtype
        wanted = w + 0.25 * a[number] @ b[number]
        assert np.abs(np.asarray(merged, np.float64) - wanted).max() < (
            1e-6 if dtype == "float32" else 0.05
        )


def test_logical_shapes():
    w = jnp.zeros((8, 2, 4))
    q = quantize(w, "int4", axis=-3, group=4)
    held = OutputsFirst(w.transpose(1, 2, 0), inputs=1)
    leaves = [w, q, held, attach(q, jax.random.key(0), rank=2, inputs=1, alpha=1.0)]
    leaves.append(attach(held, jax.random.key(0), rank=2, inputs=1, alpha=1.0))
    for leaf in leaves:
        assert logical_shape(leaf) == (8, 2, 4)
        assert is_leaf(leaf) == (leaf is not w)
    assert plain(held).shape == (8, 2, 4)


def test_statics_are_part_of_the_structure():
    w = jnp.ones((4, 4))
    one, other = (quantize(w, "int8", axis=-1, group=g) for g in (2, 4))
    assert jax.tree.structure(one) != jax.tree.structure(other)
    assert isinstance(jax.tree.map(lambda x: x, one), QArray)
