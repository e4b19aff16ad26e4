"""Leaves: logical shapes, adapters by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.weights import (
    AdaptedWeight,
    OutputsFirst,
    QArray,
    Scheme,
    attach,
    is_leaf,
    logical_shape,
    merge_adapter,
    plain,
    quantize,
)


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
    q = quantize(w, Scheme(format="int4", group=4))
    held = OutputsFirst(w.transpose(1, 2, 0), inputs=1)
    leaves = [w, q, held, attach(q, jax.random.key(0), rank=2, inputs=1, alpha=1.0)]
    leaves.append(attach(held, jax.random.key(0), rank=2, inputs=1, alpha=1.0))
    for leaf in leaves:
        assert logical_shape(leaf) == (8, 2, 4)
        assert is_leaf(leaf) == (leaf is not w)
    assert plain(held).shape == (8, 2, 4)


def test_statics_are_part_of_the_structure():
    w = jnp.ones((4, 4))
    one, other = (quantize(w, Scheme(format="int8", group=g)) for g in (2, 4))
    assert jax.tree.structure(one) != jax.tree.structure(other)
    assert isinstance(jax.tree.map(lambda x: x, one), QArray)
