"""A bias by function in flash attention: what it may hold, how it goes with jax's transforms."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from pallas_kernels.errors import ShapeError, UnsupportedError
from pallas_kernels.flash_attention import explain, flash_attention
from pallas_kernels.flash_attention.bias import check, evaluate, unserved
from pallas_kernels.target import targeting
from tests.kernels.attention import Sloped, arguments, bucketed, case
from tests.kernels.lowered import KERNEL, kernel_calls

SMALL = {"batch": 1, "heads": 2, "kv_heads": 1, "width": 64}
NARROW = np.float32(0.125)


def anything(query, key, head):
    """Each operation that kernels take, once."""
    wide = lambda x: (x % 7).astype(jnp.float32) * NARROW + 0.5  # noqa: E731
    q, k, h = wide(query), wide(key), head.astype(jnp.float32)
    terms = [
        jnp.where((query > key) & (key > 3) | ~(query < 5) ^ (query != key), 1.0, 0.0),
        jnp.where(~(head < 1), q, jnp.where(query == key, 1.0, k)),
        jnp.where((query >= key + 4) == (query <= key - 3), 0.2, 0.0),
        jax.lax.clamp(jnp.float32(0), q - k, jnp.float32(1)),
        jnp.cos(q) + jnp.sin(k) + jnp.tanh(q) + jax.nn.sigmoid(k) + jax.nn.relu(q - 0.8),
        jnp.exp(-q) + jnp.exp2(-k) + jnp.log(q) + jnp.log2(k) + jnp.sqrt(q) + jax.lax.rsqrt(k),
        q**3 / (k + 1) + jnp.square(q) + jnp.abs(q - k) + jnp.minimum(q, jnp.maximum(k, 0.7)),
        jnp.sign(query - key).astype(jnp.float32) + jnp.sign(q - 0.8) + jnp.sign(h),
        (((query << 1) + (key >> 2) + jax.lax.shift_right_logical(query, 1)) % 3).astype(q.dtype),
        ((query ^ key) % 4 + (~query) % 3 + (-key) // 9 + query // 5).astype(jnp.float32) * 0.1,
    ]
    return sum(terms) + (h + jnp.exp2(-h) + (head // 2).astype(jnp.float32)) * q


@pytest.mark.parametrize("bias", [anything, bucketed, Sloped()])
def test_what_a_kernel_computes_is_the_function(bias) -> None:
    at = [jax.lax.broadcasted_iota(jnp.int32, (8, 16), dim) + 3 * dim for dim in range(2)]
    inputs = (lambda: at[0], lambda: at[1], lambda: jnp.int32(1))
    found = evaluate(bias, (8, 16), inputs)
    np.testing.assert_allclose(found, bias(*at, jnp.int32(1)), rtol=1e-6, atol=1e-6)


def test_only_what_the_result_needs_is_made() -> None:
    def unused():
        raise AssertionError("the queries' positions are made")

    columns = jax.lax.broadcasted_iota(jnp.int32, (8, 16), 1)
    of_keys = lambda query, key, head: (key + 0 * head).astype(jnp.float32)  # noqa: E731
    inputs = (unused, lambda: columns, lambda: jnp.int32(0))
    np.testing.assert_array_equal(evaluate(of_keys, (8, 16), inputs), columns)


@pytest.mark.parametrize(("target", "platform"), [("gpu", "cuda"), ("tpu", "tpu")])
def test_every_operation_lowers(target, platform) -> None:
    qkv, _ = arguments(case(256, **SMALL), jnp.bfloat16)

    def loss(*qkv):
        return jnp.sum(flash_attention(*qkv, bias=anything).astype(jnp.float32))

    with targeting(target):
        assert unserved(anything) is None
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*qkv)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("mosaic_gpu_v2" if target == "gpu" else "tpu_custom_call") == 3


def test_a_function_is_alibi_as_well() -> None:
    (q, k, v), _ = arguments(case(60, 70, **SMALL), jnp.float32)
    given = {"alibi_slopes": jnp.asarray([0.02, 0.01])}, {"bias": Sloped()}
    for offset in (None, 3, jnp.asarray([5])):
        one, other = (flash_attention(q, k, v, query_offset=offset, **more) for more in given)
        np.testing.assert_allclose(one, other, atol=1e-6)
    assert np.abs(one - flash_attention(q, k, v, query_offset=offset)).max() > 0.01


def test_equal_functions_share_a_program() -> None:
    (q, k, v), _ = arguments(case(16, **SMALL), jnp.float32)
    traces = []

    @functools.partial(jax.jit, static_argnames="bias")
    def call(q, k, v, bias):
        traces.append(bias)
        return flash_attention(q, k, v, bias=bias)

    same = [call(q, k, v, Sloped((0.02, x))) for x in (0.5, 0.5)]
    np.testing.assert_array_equal(*same)
    other = call(q, k, v, Sloped((0.3, 0.5)))
    assert len(traces) == 2
    assert np.abs(other - same[0]).max() > 1e-3


def _total(q, k, v):
    out = flash_attention(q, k, v, causal=True, bias=bucketed, implementation="mosaic_gpu")
    return jnp.sum(out.astype(jnp.float32))


def test_vmap_grad_remat_and_export() -> None:
    qkv, _ = arguments(case(64, **SMALL), jnp.bfloat16)
    many = tuple(jnp.stack([x, x]) for x in qkv)
    step = jax.jit(jax.vmap(jax.checkpoint(jax.grad(_total, argnums=(0, 1, 2)))))
    check = export.DisabledSafetyCheck.custom_call(KERNEL)
    with targeting("gpu"):
        made = export.export(step, platforms=["cuda"], disabled_checks=[check])(*many)
    again = export.deserialize(made.serialize())
    assert kernel_calls(again.mlir_module()) == 3
    assert [x.shape for x in again.out_avals] == [x.shape for x in many]


def test_it_has_a_gradient_by_vmapped_arrays() -> None:
    qkv, _ = arguments(case(40, **SMALL), jnp.float32)
    many = tuple(jnp.stack([x, 2 * x]) for x in qkv)

    def gradients(name, *qkv):
        def loss(*qkv):
            return jnp.sum(flash_attention(*qkv, bias=bucketed, implementation=name) ** 2)

        return jax.vmap(jax.grad(loss, argnums=(0, 1, 2)))(*qkv)

    with targeting("interpreter"):
        found = gradients("mosaic_tpu", *many)
    for one, other in zip(found, gradients("reference", *many), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-4)


@dataclasses.dataclass
class Unhashable:
    """Its eq without frozen takes its hash away."""

    def __call__(self, query, key, head):
        return Sloped()(query, key, head)


TABLE = np.arange(8, dtype=np.float32)
REFUSED = {
    "hashable": (Unhashable(), "bias must be hashable, Unhashable is not"),
    "arrays": (lambda q, k, h: jnp.asarray(TABLE)[q % 8], r"holds arrays .*float32\[8\]"),
    "bfloat16": (lambda q, k, h: (q - k).astype(jnp.bfloat16), r"not bfloat16\[8, 16\]"),
    "one number": (lambda q, k, h: h.astype(jnp.float32), r"not float32\[\]"),
    "integers": (lambda q, k, h: q - k, r"must give float32\[8, 16\] .*, not int32\[8, 16\]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_bias_is_refused(name) -> None:
    (q, k, v), _ = arguments(case(8, **SMALL), jnp.bfloat16)
    bias, message = REFUSED[name]
    with pytest.raises(ShapeError, match=message):
        flash_attention(q, k, v, bias=bias)


def test_a_number_is_no_function() -> None:
    with pytest.raises(ShapeError, match="bias must be a function"):
        check(3.0)


def test_traced_values_are_refused() -> None:
    (q, k, v), _ = arguments(case(8, **SMALL), jnp.float32)

    def loss(slope):
        away = lambda q, k, h: slope * (q - k).astype(jnp.float32)  # noqa: E731
        return jnp.sum(flash_attention(q, k, v, bias=away))

    for transformed in (jax.jit(loss), jax.grad(loss)):
        with pytest.raises(ShapeError, match=r"traced values \(float32\[\]\); it may hold plain"):
            transformed(0.5)
    number = np.float32(0.5)
    assert np.isfinite(loss(number)), "a number that was drawn on the host is plain"


def test_implementations_that_cannot_say_why() -> None:
    (q, k, v), _ = arguments(case(8, **SMALL), jnp.bfloat16)
    with targeting("gpu"), pytest.raises(UnsupportedError, match="it has no bias by function"):
        flash_attention(q, k, v, bias=bucketed, implementation="cudnn")
    rounded = lambda q, k, h: jnp.floor((q - k).astype(jnp.float32) / 3.0)  # noqa: E731
    with targeting("gpu"):
        assert explain(q, k, v, bias=bucketed).name == "mosaic_gpu"
        assert "its bias may not use floor" in explain(q, k, v, bias=rounded).why
        assert explain(q, k, v, bias=rounded).name == "reference"
        with pytest.raises(UnsupportedError, match="its bias may not use floor"):
            flash_attention(q, k, v, bias=rounded, implementation="mosaic_gpu")
