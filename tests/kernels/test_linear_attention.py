"""Linear attention by the kernels of the dual scan: reference, arguments, and the ops of models
that take kernels, in the interpreter and lowered for a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.ops import ssm
from jaxllm.ops.linear_attention import Gates
from jaxllm.ops.linear_attention import linear_attention as op
from pallas_kernels.errors import ShapeError, UnsupportedError
from pallas_kernels.linear_attention import explain, linear_attention
from pallas_kernels.target import targeting

random = np.random.default_rng(0)


def draw(*shape, dtype=jnp.float32):
    return jnp.asarray(random.standard_normal(shape).astype(np.float32), dtype)


def inputs(length=72, heads=2, key_heads=1, dtype=jnp.bfloat16):
    q, k = (draw(1, length, key_heads, 64, dtype=dtype) / 8 for _ in range(2))
    v = draw(1, length, heads, 64, dtype=dtype)
    return q, k, v, -jnp.square(draw(1, length, heads)) / 4, draw(1, heads, 64, 64)


def by_hand(q, k, v, log_decay, state, starts=()):
    """Token by token in float64."""
    q, k, v, log_decay, state = (np.asarray(z, np.float64) for z in (q, k, v, log_decay, state))
    q, k = (np.repeat(z, v.shape[2] // z.shape[2], axis=2) for z in (q, k))
    out = np.zeros(v.shape)
    for t in range(v.shape[1]):
        state = 0 * state if t in starts else state
        state = np.exp(log_decay[:, t])[..., None, None] * state
        state = state + k[:, t, :, :, None] * v[:, t, :, None]
        out[:, t] = np.einsum("bnmh,bnm->bnh", state, q[:, t])
    return out, state


def near(found, want, part):
    for got, true in zip(found, want, strict=True):
        miss = np.sqrt(np.mean((np.asarray(got, np.float64) - true) ** 2))
        assert miss < part * np.sqrt(np.mean(true**2))


def test_reference_is_what_the_words_say() -> None:
    given = inputs(20, heads=4, key_heads=2, dtype=jnp.float32)
    q, k, v, log_decay, state = given
    ids = jnp.asarray(np.repeat([[0, 1]], 10, axis=1), jnp.int32)
    found = linear_attention(
        q, k, v, log_decay=log_decay, initial=state, segment_ids=ids, implementation="reference"
    )
    near(found, by_hand(*given, starts=(10,)), 1e-6)
    bare = linear_attention(q, k, v, implementation="reference")
    near(bare, by_hand(q, k, v, 0 * log_decay, 0 * state), 1e-6)


@pytest.fixture
def _loose():
    """The interpreter's own products mix dtypes, in threads that a context does not reach."""
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    yield
    jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.mark.usefixtures("_loose")
def test_linear_attention_of_models_takes_the_kernel() -> None:
    q, k, v, log_decay, state = inputs()
    marks = np.zeros((1, 72), bool)
    marks[:, 33] = True
    real = np.ones((1, 72), bool)
    real[:, 65:] = False
    gates = Gates(log_decay, None, jnp.asarray(marks), jnp.asarray(real))

    def run(q, k, v, state, how):
        return op((q, k, v), gates=gates, state=state, implementation=how)

    with targeting("interpreter"):
        found = jax.jit(functools.partial(run, how="mosaic_gpu"))(q, k, v, state)
    usual = jax.jit(functools.partial(run, how="chunked"))(q, k, v, state)
    assert (found[0].dtype, found[1].dtype) == (v.dtype, jnp.float32)
    near(found, [np.asarray(x, np.float64) for x in usual], 0.01)


def dual(length=72, heads=2, groups=1):
    x, b, c = (draw(2, length, n, 64, dtype=jnp.bfloat16) for n in (heads, groups, groups))
    dt = jnp.exp(draw(2, length, heads) - 2)
    return ssm.Dual(x, dt, b / 8, c, -jnp.exp(draw(heads)), draw(heads))


@pytest.mark.usefixtures("_loose")
def test_state_space_scan_of_models_takes_the_kernel() -> None:
    given, state = dual(), draw(2, 2, 64, 64)
    marks = np.zeros((2, 72), bool)
    marks[1, 40] = True

    def run(given, state, how):
        return ssm.dual_scan(given, state, starts=jnp.asarray(marks), implementation=how)

    with targeting("interpreter"):
        found = jax.jit(functools.partial(run, how="mosaic_gpu"))(given, state)
    usual = jax.jit(functools.partial(run, how="chunked"))(given, state)
    near(found, [np.asarray(x, np.float64) for x in usual], 0.01)


@pytest.mark.parametrize("groups", [1, 2])
def test_state_space_scan_on_a_mesh_lowers_for_cuda(groups: int) -> None:
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def loss(given):
        with targeting("gpu"):
            y, _ = ssm.dual_scan(given, implementation="mosaic_gpu")
            return jnp.sum(y.astype(jnp.float32))

    with jax.set_mesh(mesh):
        traced = jax.jit(jax.grad(loss)).trace(dual(heads=16, groups=groups))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") >= 3


def test_what_can_be_named() -> None:
    _, k, v, *_ = inputs(length=8)
    given = dual(length=8)
    kind = {"tokens": 8, "dtype": "bfloat16", "heads": (2, 1)}
    for platform, name in (("cpu", "chunked"), ("tpu", "chunked"), ("gpu", "mosaic_gpu")):
        found = ssm.choose_dual("auto", **kind, widths=(64, 64), platform=platform)
        assert found.name == name  # no kernel is taken before it was timed
    named = functools.partial(ssm.choose_dual, "mosaic_gpu", **kind, platform="gpu")
    assert named(widths=(64, 64)).name == "mosaic_gpu"
    with pytest.raises(UnsupportedError, match="multiple of 64"):
        named(widths=(48, 64))
    with pytest.raises(UnsupportedError, match="needs a CUDA device, this is cpu"):
        ssm.dual_scan(given, implementation="mosaic_gpu")
    with targeting("gpu"):
        assert explain(v, k).name == "mosaic_gpu"
    scan = functools.partial(ssm.choose_selective, tokens=8, dtype="bfloat16", shape=(64, 16))
    with pytest.raises(UnsupportedError, match="needs a CUDA device"):
        scan("mosaic_gpu")
    with pytest.raises(UnsupportedError, match="needs a TPU"):
        scan("mosaic_tpu")
    with targeting("gpu"):
        assert scan("mosaic_gpu").name == scan("auto").name == "mosaic_gpu"
        narrow = ssm.choose_selective("auto", tokens=8, dtype="float32", shape=(64, 16))
        assert narrow.name == "chunked"
        assert "not mosaic_gpu: it takes bfloat16" in narrow.why
    for name in ("cpu", "tpu"):
        with targeting(name):
            assert scan("auto").name == "chunked"  # no kernel is taken before it was timed


def test_wrong_arguments_are_named() -> None:
    q, k, v, log_decay, state = inputs(length=8)
    with pytest.raises(ShapeError, match="takes q and k"):
        linear_attention(q[:, 1:], k, v)
    with pytest.raises(ShapeError, match="no multiple of 3 key heads"):
        linear_attention(*(jnp.concatenate([z] * 3, axis=2) for z in (q, k)), v)
    with pytest.raises(ShapeError, match="one floating dtype"):
        linear_attention(q, k, v.astype(jnp.float32))
    with pytest.raises(ShapeError, match="log_decay must be"):
        linear_attention(q, k, v, log_decay=log_decay[..., :1])
    with pytest.raises(ShapeError, match="initial must be"):
        linear_attention(q, k, v, initial=state[:, :1])
    with pytest.raises(ShapeError, match="never go back"):
        ids = jnp.asarray([[0, 1, 0, 0, 0, 0, 0, 0]], jnp.int32)
        linear_attention(q, k, v, segment_ids=ids)
