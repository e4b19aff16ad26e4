"""Products with quantized leaves of every format, their gradients, and how a loop runs them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.layouts import as_planes
from jaxllm.core.qarray import dequantize, dequantize_rows
from jaxllm.core.quantize import Scheme, quantize_jit
from jaxllm.ops import linear, quantized

SCHEMES = {
    "int8": Scheme(format="int8"),
    "int4": Scheme(format="int4", group=32),
    "offset": Scheme(format="int4", group=32, symmetric=False),
    "nf4": Scheme(format="nf4"),
    "mxfp4": Scheme(format="mxfp4"),
    "fp8 blocks": Scheme(format="fp8", rows=128, group=128),
}


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def leaf(name, *, planes, order=False):
    q = quantize_jit(draw(256, 4, 48), SCHEMES[name])
    if order:
        place = np.random.default_rng(2).permutation(256).astype(np.int32)
        q = dataclasses.replace(q, order=jnp.asarray(place))
    return as_planes(q) if planes else q


@pytest.mark.parametrize("planes", [False, True])
@pytest.mark.parametrize("name", SCHEMES)
def test_product_and_gradient(monkeypatch, name, planes):
    """By tiles as on a CPU and whole as elsewhere: what the dequantized weight gives."""
    q = leaf(name, planes=planes)
    x, dy = draw(2, 3, 256), draw(2, 3, 4, 48, seed=1)
    w = dequantize(q, jnp.float32)

    def loss(x, leaf):
        y = linear.einsum("BTD,DNH->BTNH", x, leaf, dtype="float32")
        return jnp.sum(y * dy), y

    gradient = jax.grad(loss, has_aux=True)
    d_wanted, wanted = gradient(x, w)
    for cpu in (True, False):
        monkeypatch.setattr(quantized, "_on_cpu", lambda cpu=cpu: cpu)
        monkeypatch.setattr(quantized, "_TILE", 256 * 16)
        d_x, y = jax.jit(gradient)(x, q)
        assert np.abs(y - wanted).max() < 1e-4
        assert np.abs(d_x - d_wanted).max() < 1e-4
        one = linear.einsum("BTD,DNH->BTNH", x[:1, :1], q, dtype="float32")
        assert np.abs(one - wanted[:1, :1]).max() < 1e-4


@pytest.mark.parametrize("planes", [False, True])
def test_scattered_inputs(planes):
    q = leaf("int4", planes=planes, order=True)
    x = draw(5, 256)
    found = quantized.quantized_product(x, q, jnp.float32)
    assert np.abs(found - x @ dequantize_rows(q).T).max() < 1e-4


@pytest.mark.parametrize("name", ["int8", "offset", "nf4"])
def test_tables(name):
    table = as_planes(quantize_jit(draw(40, 128), SCHEMES[name], inputs=0))
    plain = dequantize(table, jnp.float32)
    ids = jnp.asarray([[3, 39], [0, 17]], jnp.int32)
    assert np.array_equal(linear.take(table, ids, dtype="float32"), plain[ids])
    x = draw(2, 2, 128)
    options = {"tied": True, "dtype": "float32", "out_dtype": "float32"}
    wanted = linear.unembed(x, plain, **options)
    assert np.abs(linear.unembed(x, table, **options) - wanted).max() < 1e-4


def test_low_precision_sums_in_float32():
    q, x = leaf("int4", planes=True), draw(2, 3, 256)
    wanted = jnp.einsum("BTD,DNH->BTNH", x, dequantize(q, jnp.float32))
    found = linear.einsum("BTD,DNH->BTNH", x, q, dtype="bfloat16", out_dtype="float32")
    assert np.abs(found - wanted).max() < 0.02 * np.abs(wanted).max()


def test_no_gradient_keeps_an_unpacked_matrix():
    """What a backward pass keeps is the packed leaf."""
    q = leaf("int4", planes=False)
    product = lambda x: quantized.quantized_product(x, q, jnp.float32)  # noqa: E731
    _, back = jax.vjp(product, draw(3, 256))
    kept = [a for a in jax.tree.leaves(back) if a.size >= 256 * 192]
    assert {str(a.dtype) for a in kept} <= {"int4"}


def test_a_loop_does_not_unpack_the_matrix_before_it():
    """XLA would hoist it: eight times slower, and all the memory that was saved."""
    q = as_planes(quantize_jit(draw(1024, 1024), SCHEMES["int4"]))

    def steps(x, q):
        one = lambda x, _: (quantized.quantized_product(x, q, jnp.float32) * 0.1, None)  # noqa: E731
        return jax.lax.scan(one, x, None, length=4)[0]

    program = jax.jit(steps).lower(draw(1, 1024), q).compile()
    memory = program.memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 2**19 * 1.5
