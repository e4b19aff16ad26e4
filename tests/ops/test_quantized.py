"""Products with quantized leaves of every format, their gradients, and how a loop runs them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.choices import taken
from jaxllm.core.layouts import as_operand, as_planes, as_values
from jaxllm.core.qarray import dequantize, dequantize_rows
from jaxllm.core.qrows import join_rows
from jaxllm.core.quantize import Scheme, quantize_jit
from jaxllm.errors import ConfigError
from jaxllm.ops import linear, quantized
from pallas_kernels.scaled_matmul import rounded, scaled_matmul
from pallas_kernels.target import targeting

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


@pytest.mark.parametrize("held", [as_planes, as_operand])
@pytest.mark.parametrize("name", ["int8", "offset", "nf4"])
def test_tables(name, held):
    table = held(quantize_jit(draw(64, 128), SCHEMES[name], inputs=0))
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


def test_a_loop_does_not_unpack_its_matrices_before_it():
    """XLA would hoist them: eight times slower, and all the memory that was saved."""
    leaves = [as_planes(quantize_jit(draw(512, 512, seed=i), SCHEMES["int4"])) for i in range(6)]

    def steps(x, leaves):
        def one(x, _):
            for leaf in leaves:
                x = 0.1 * quantized.quantized_product(x, leaf, jnp.float32)
            return x, None

        return jax.lax.scan(one, x, None, length=4)[0]

    program = jax.jit(steps).lower(draw(1, 512), leaves).compile()
    assert program.memory_analysis().temp_size_in_bytes < 3 * 4 * 512 * 512


KERNEL = {
    "int4": Scheme(format="int4", group=64),
    "int8": Scheme(format="int8"),
    "offset": Scheme(format="int4", group=128, symmetric=False),
    "nf4": Scheme(format="nf4"),
    "mxfp4": Scheme(format="mxfp4"),
    "fp8 blocks": Scheme(format="fp8", rows=128, group=128),
    "fp8 matrix": Scheme(format="fp8", rows=0, group=0),
}


@pytest.mark.parametrize("name", KERNEL)
def test_the_operand_s_order_holds_the_same_numbers(name):
    q = quantize_jit(draw(256, 2, 64), KERNEL[name])
    held = as_operand(q)
    assert held.version == 3
    assert np.array_equal(dequantize_rows(held), dequantize_rows(q))
    same = jax.tree.map(np.array_equal, as_values(held), q)
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("name", KERNEL)
def test_a_gpu_multiplies_packed_numbers_by_our_kernel(name):
    q = quantize_jit(draw(256, 2, 64), KERNEL[name])
    q = q if name in ("int8", "offset") else as_operand(q)
    x, dy = draw(2, 3, 256).astype(jnp.bfloat16), draw(2, 3, 2, 64, seed=1).astype(jnp.bfloat16)
    w = dequantize(q, jnp.float32)

    def loss(x, leaf, dtype):
        y = linear.einsum("BTD,DNH->BTNH", x, leaf, dtype=dtype)
        return jnp.sum(y.astype(jnp.float32) * dy.astype(jnp.float32)), y

    gradient = jax.grad(loss, has_aux=True)
    d_wanted, wanted = gradient(x.astype(jnp.float32), w, "float32")
    with targeting("interpreter"):
        assert quantized.kernel_obstacle(x, q) is None
        d_x, y = gradient(x, q, "bfloat16")
    assert np.abs(y.astype(jnp.float32) - wanted).max() < 2**-7 * np.abs(wanted).max()
    assert np.abs(d_x.astype(jnp.float32) - d_wanted).max() < 2**-6 * np.abs(d_wanted).max()


@pytest.mark.parametrize("rows", [3, 70])
def test_nf4_goes_to_the_streamed_kernel_in_any_layout(rows):
    q = leaf("nf4", planes=False)
    x = draw(rows, q.shape[0]).astype(jnp.bfloat16)
    wanted = x.astype(jnp.float32) @ dequantize(q, jnp.float32).reshape(q.shape[0], -1)
    with targeting("interpreter"), taken() as heard:
        y = quantized.quantized_product(x, q, jnp.float32)
    assert heard["packed product"] == {"mosaic_gpu_streamed"}
    assert np.abs(y - wanted).max() < 2**-7 * np.abs(wanted).max()


@pytest.mark.parametrize("name", ["int4", "int8", "offset"])
def test_integers_go_to_the_streamed_kernel_and_float16_to_the_first(name):
    q = quantize_jit(draw(256, 2, 64), KERNEL[name])
    x = draw(130, 256).astype(jnp.bfloat16)
    wanted = x.astype(jnp.float32) @ dequantize(q, jnp.float32).reshape(256, -1)
    with targeting("interpreter"), taken() as heard:
        y = quantized.quantized_product(x, q, jnp.bfloat16)
        assert heard["packed product"] == {"mosaic_gpu_streamed"}
        quantized.quantized_product(x[:16].astype(jnp.float16), q, jnp.float16)
    assert heard["packed product"] == {"mosaic_gpu_streamed", "mosaic_gpu"}
    assert np.abs(y.astype(jnp.float32) - wanted).max() < 2**-7 * np.abs(wanted).max()


def test_what_the_kernel_cannot_serve_is_said():
    x, q = draw(3, 256).astype(jnp.bfloat16), quantize_jit(draw(256, 2, 64), KERNEL["int4"])
    obstacle = quantized.kernel_obstacle
    assert "needs a CUDA device" in obstacle(x, q)
    with targeting("tpu"):
        wide = quantize_jit(draw(256, 2, 64), Scheme(format="int4", group=128))
        assert obstacle(x, wide) is None
        assert "no offsets" in obstacle(x, quantize_jit(draw(256, 2, 64), KERNEL["offset"]))
        assert "multiples of 128" in obstacle(x, q)
    with targeting("gpu"):
        assert "not float32" in obstacle(draw(3, 256), q)
        assert obstacle(jnp.repeat(x, 30, 0), q) is None
        assert "1 to 64 rows" in obstacle(jnp.repeat(x, 30, 0).astype(jnp.float16), q)
        assert "first or third layout" in obstacle(x, as_planes(q))
        assert "not table" in obstacle(x, leaf("mxfp4", planes=False))
        assert obstacle(x, leaf("nf4", planes=False)) is None
        assert obstacle(x, leaf("int4", planes=False)) is None
        narrow = obstacle(x.astype(jnp.float16), leaf("int4", planes=False))
        assert "groups of 32" in narrow
        held = as_operand(q)
        assert obstacle(jnp.repeat(x, 30, 0), held) is None
        assert "1 to 4096 rows" in obstacle(jnp.repeat(x, 3000, 0), held)
        assert "not float32" in obstacle(draw(3, 256), held)


BLOCKS = Scheme(format="fp8", rows=128, group=128, activations=True)


@pytest.mark.parametrize("scheme", ["w8a8", Scheme(format="fp8", activations=True), BLOCKS])
def test_activations_are_rounded_token_by_token(scheme):
    """Near the exact product, and the same for a token whatever the others are."""
    w, x = draw(256, 2, 48), draw(2, 3, 256)
    x = x.at[0, 0].multiply(1e3).at[1, 2].set(0.0)
    q = quantize_jit(w, scheme if isinstance(scheme, Scheme) else Scheme(format=scheme))
    assert q.activations and as_operand(q) is q

    def product(x):
        return linear.einsum("BTD,DNH->BTNH", x, q, dtype="float32")

    found, wanted = product(x), jnp.einsum("BTD,DNH->BTNH", x, dequantize(q, jnp.float32))
    unit = jnp.max(jnp.abs(wanted), axis=(-1, -2), keepdims=True)
    bound = 0.02 if q.format == "int8" else 0.06
    assert np.abs(found - wanted).max(axis=(-1, -2))[1, 2] == 0
    relative = jnp.abs(found - wanted) / jnp.where(unit == 0, 1.0, unit)
    assert 0 < relative.max() < bound
    optimized = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
    compiled = jax.jit(product, compiler_options=optimized)  # as a user's: sums in one order
    np.testing.assert_allclose(compiled(x[:1, :1]), compiled(x)[:1, :1], rtol=1e-5)
    d_x = jax.grad(lambda x: jnp.sum(product(x)))(x)
    wanted = jnp.sum(dequantize(q, jnp.float32), axis=(1, 2))
    np.testing.assert_allclose(d_x, jnp.broadcast_to(wanted, x.shape), atol=1e-3)


def test_blocks_are_rounded_the_same_by_the_kernel():
    """Blocks stay whole when projections are joined, and the kernel multiplies them."""
    x = draw(3, 256)
    leaves = [quantize_jit(draw(256, n), BLOCKS) for n in (128, 256)]
    whole = join_rows(leaves, (256, 384), 1)
    assert whole.rows == 128 and whole.scale.shape == (3, 2)
    plain = quantized.quantized_product(x, whole, jnp.float32)
    parts = [quantized.quantized_product(x, leaf, jnp.float32) for leaf in leaves]
    np.testing.assert_allclose(plain, jnp.concatenate(parts, 1), rtol=1e-6)
    codes, scale = rounded(x)
    with targeting("interpreter"):
        by_name = scaled_matmul(codes, scale, whole.values, whole.scale, out_dtype="float32")
        assert quantized.blocks_obstacle(x, whole, jnp.float32) is None
        found = quantized.quantized_product(x[:, None], whole, jnp.float32)[:, 0]
    np.testing.assert_array_equal(found, by_name)
    np.testing.assert_allclose(found, plain, atol=1e-5 * float(jnp.abs(plain).max()))


def test_where_blocks_are_not_the_kernel_s():
    x, leaf = draw(3, 256), quantize_jit(draw(256, 128), BLOCKS)

    def obstacle(leaf, out_dtype="bfloat16", name="gpu"):
        with targeting(name):
            return quantized.blocks_obstacle(x, leaf, out_dtype)

    assert obstacle(leaf) is None
    assert "this is tpu" in obstacle(leaf, name="tpu")
    assert "not int8" in obstacle(leaf, "int8")
    parts = [quantize_jit(draw(256, n), BLOCKS) for n in (100, 28)]
    assert "in blocks of (1, 128)" in obstacle(join_rows(parts, (256, 128), 1))
    assert "not (100, 256)" in obstacle(parts[0])


def test_blocks_at_the_edges_are_rounded_too():
    """Sides that are no multiple of 128, and joined parts that blocks do not divide."""
    x, ragged = draw(3, 200), quantize_jit(draw(200, 100), BLOCKS)
    joined = join_rows([ragged, ragged], (200, 200), 1)
    assert joined.rows == 1
    found = quantized.quantized_product(x, joined, jnp.float32)
    one = quantized.quantized_product(x, ragged, jnp.float32)
    np.testing.assert_allclose(found, jnp.concatenate([one, one], 1), rtol=1e-6)
    exact = x @ dequantize(ragged, jnp.float32)
    assert 0 < jnp.abs(one - exact).max() < 0.06 * jnp.abs(exact).max()


def test_activations_want_one_scale_a_row():
    with pytest.raises(ConfigError, match="rows=1, group=128"):
        Scheme(format="fp8", group=128, activations=True)
    with pytest.raises(ConfigError, match="in blocks of 128 x 128; found int4"):
        Scheme(format="int4", activations=True)
    with pytest.raises(ConfigError, match="group=64"):
        Scheme(format="w8a8", group=64)
