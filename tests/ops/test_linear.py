"""Products over every kind of weight against the dense product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.weights import (
    AdaptedWeight,
    OutputsFirst,
    QArray,
    Scheme,
    dequantize,
    merge_adapter,
    quantize,
)
from jaxllm.core.weights import plain as plain_of
from jaxllm.errors import ShapeError
from jaxllm.ops import linear

random = np.random.default_rng(0)
# Equation, shape of x, shape of the weight, number of contracted dims.
CASES = {
    "ffn": ("BTD,DF->BTF", (3, 5, 8), (8, 12), 1),
    "heads": ("BTD,DNH->BTNH", (3, 5, 8), (8, 2, 4), 1),
    "out": ("BTNH,NHD->BTD", (3, 5, 2, 4), (2, 4, 12), 2),
    "one row": ("BTD,DF->BTF", (1, 1, 8), (8, 12), 1),
}


def draw(*shape):
    return jnp.asarray(random.standard_normal(shape), jnp.float32)


def leaf(kind, shape, inputs):
    """A leaf of a kind and the plain weight that it stands for."""
    w = draw(*shape)
    match kind:
        case "plain":
            return w, w
        case "outputs first":
            dims = range(len(shape))
            return OutputsFirst(w.transpose(*dims[inputs:], *dims[:inputs]), inputs=inputs), w
        case "int8" | "int4":
            q = quantize(w, Scheme(format=kind, group=2, symmetric=kind == "int8"), inputs=inputs)
            return q, dequantize(q, jnp.float32)
        case _:
            base, plain = leaf(kind.removeprefix("adapted "), shape, inputs)
            a, b = draw(1, *shape[:inputs], 3), draw(1, 3, *shape[inputs:])
            update = np.tensordot(np.asarray(a[0], np.float64), np.asarray(b[0], np.float64), 1)
            return AdaptedWeight(base, a, b, scale=0.5), plain + 0.5 * update.astype(np.float32)


KINDS = ["plain", "outputs first", "int8", "int4"]
KINDS += [f"adapted {kind}" for kind in KINDS]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_einsum(case, kind):
    equation, x_shape, w_shape, inputs = CASES[case]
    w, plain = leaf(kind, w_shape, inputs)
    x = draw(*x_shape)
    wanted = np.einsum(equation, np.asarray(x, np.float64), np.asarray(plain, np.float64))
    found = linear.einsum(equation, x, w, dtype="float32")
    assert found.dtype == jnp.float32
    assert np.abs(found - wanted).max() < 1e-5
    if case == "heads":
        low = linear.einsum(equation, x, w, dtype="bfloat16", out_dtype="float32")
        assert low.dtype == jnp.float32
        assert np.abs(low - wanted).max() < 0.5
        assert linear.einsum(equation, x, w, dtype="bfloat16").dtype == jnp.bfloat16


@pytest.mark.parametrize("case", ["ffn", "out"])
def test_merged_adapters_are_the_same_weight(case):
    equation, x_shape, w_shape, inputs = CASES[case]
    for kind in KINDS[4:]:
        w, plain = leaf(kind, w_shape, inputs)
        assert np.abs(merge_adapter(w) - plain).max() < 1e-5
        x = draw(*x_shape)
        attached = linear.einsum(equation, x, w, dtype="float32")
        merged = linear.einsum(equation, x, merge_adapter(w), dtype="float32")
        assert np.abs(attached - merged).max() < 1e-5


@pytest.mark.parametrize("case", ["ffn", "heads", "out"])
def test_adapter_ids(case):
    equation, x_shape, w_shape, inputs = CASES[case]
    w, a, b = draw(*w_shape), draw(2, *w_shape[:inputs], 3), draw(2, 3, *w_shape[inputs:])
    x = draw(*x_shape)
    ids = jnp.array([2, 0, 1], jnp.int32)
    both = AdaptedWeight(w, a, b, scale=2.0)
    found = linear.einsum(equation, x, both, dtype="float32", adapter_ids=ids)
    plain = linear.einsum(equation, x, w, dtype="float32")
    assert np.array_equal(found[1], plain[1])
    for row, number in ((0, 1), (2, 0)):
        merged = merge_adapter(both, number)
        wanted = linear.einsum(equation, x, merged, dtype="float32")[row]
        assert np.abs(found[row] - wanted).max() < 1e-5
    # A stray row of NaN in an adapter that a row does not use must not reach it.
    poisoned = AdaptedWeight(w, a.at[0].set(jnp.nan), b, scale=2.0)
    calm = linear.einsum(equation, x, poisoned, dtype="float32", adapter_ids=ids)
    assert np.array_equal(calm[:2], found[:2])


def table(kind, rows=10, width=8):
    w = draw(rows, width)
    if kind == "plain":
        return w, w
    if kind == "turned":
        return OutputsFirst(w.T, inputs=1), w
    if kind.startswith("adapted"):
        base, _ = table(kind.removeprefix("adapted").strip() or "plain")
        leaf = AdaptedWeight(base, draw(2, rows, 3), draw(2, 3, width), scale=0.5)
        return leaf, merge_adapter(leaf)
    q = quantize(w, Scheme(format=kind, group=4, symmetric=kind == "int8"), inputs=0)
    return q, dequantize(q, jnp.float32)


@pytest.mark.parametrize(
    "kind", ["plain", "turned", "int8", "int4", "adapted", "adapted turned", "adapted int8"]
)
def test_take_and_unembed(kind):
    leaf, plain = table(kind)
    ids = jnp.array([[0, 9, 3], [3, 3, 1]], jnp.int32)
    assert np.abs(linear.take(leaf, ids, dtype="float32") - plain[ids]).max() < 1e-5
    assert linear.take(leaf, ids, dtype="bfloat16").dtype == jnp.bfloat16
    x = draw(2, 3, 8)
    wanted = np.einsum("BTD,VD->BTV", x, plain)
    options = {"dtype": "float32", "out_dtype": "float32"}
    assert np.abs(linear.unembed(x, leaf, tied=True, **options) - wanted).max() < 1e-5
    head = jnp.asarray(plain).T
    assert np.abs(linear.unembed(x, head, tied=False, **options) - wanted).max() < 1e-5
    low = linear.unembed(x, leaf, tied=True, dtype="bfloat16", out_dtype="float32")
    assert low.dtype == jnp.float32


@pytest.mark.parametrize("kind", ["adapted", "adapted turned"])
def test_take_and_unembed_choose_adapters_by_row(kind):
    leaf, _ = table(kind)
    ids, chosen = jnp.array([[0, 9]] * 3, jnp.int32), jnp.array([0, 2, 1], jnp.int32)
    base = plain_of(leaf.base)
    plain = [base, merge_adapter(leaf, 0), merge_adapter(leaf, 1)]
    rows = linear.take(leaf, ids, dtype="float32", adapter_ids=chosen)
    x = draw(3, 2, 8)
    options = {"tied": True, "dtype": "float32", "out_dtype": "float32"}
    logits = linear.unembed(x, leaf, adapter_ids=chosen, **options)
    for row, number in enumerate(chosen):
        assert np.abs(rows[row] - plain[number][ids[row]]).max() < 1e-5
        wanted = linear.unembed(x, plain[number], **options)[row]
        assert np.abs(logits[row] - wanted).max() < 1e-5


def test_a_matrix_has_no_rows_to_take():
    q = quantize(draw(10, 8), "int8")
    with pytest.raises(ShapeError, match="inputs=0"):
        linear.take(q, jnp.zeros((1, 1), jnp.int32), dtype="float32")


@pytest.mark.parametrize("kind", ["plain", "int8", "adapted", "adapted int8"])
def test_grouped(kind):
    """Each row by its group's matrix; an empty group, and rows past the last group give zeros."""
    w = draw(4, 8, 6)
    leaf = quantize(w, Scheme(format="int8", group=4), lead=1) if "int8" in kind else w
    plain = np.asarray(dequantize(leaf, jnp.float32) if isinstance(leaf, QArray) else leaf)
    if "adapted" in kind:
        a, b = draw(1, 4, 8, 3), draw(1, 4, 3, 6)
        leaf = AdaptedWeight(leaf, a, b, scale=0.5)
        plain = plain + 0.5 * np.einsum("EDR,ERF->EDF", a[0], b[0])
    sizes = np.array([3, 0, 2, 4], np.int32)
    x = draw(11, 8)
    owner = np.repeat(np.arange(4), sizes)
    wanted = np.zeros((11, 6))
    wanted[:9] = np.einsum("TD,TDF->TF", x[:9], plain[owner])
    found = linear.grouped(x, leaf, jnp.asarray(sizes), dtype="float32")
    assert np.abs(found - wanted).max() < 1e-5
    low = linear.grouped(x, leaf, jnp.asarray(sizes), dtype="bfloat16")
    assert low.dtype == jnp.bfloat16


def test_float32_products_take_no_shortcut():
    """On a device with shorter float32 products the program asks for full precision."""
    x, w = draw(2, 3, 8), draw(8, 4)
    text = jax.jit(lambda x, w: linear.einsum("BTD,DF->BTF", x, w, dtype="float32"))
    assert "HIGHEST" in text.lower(x, w).as_text()


def test_align():
    bias = jnp.arange(4.0)
    assert linear.align(bias, draw(2, 3, 4)).shape == (1, 1, 4)
    assert linear.align(draw(3, 4), draw(2, 3, 4)).shape == (1, 3, 4)
