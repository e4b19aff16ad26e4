"""Linear attention with the delta rule and decays a channel: reference, and its kernels
interpreted, lowered for a GPU and compiled for TPUs, against the loop over tokens in float64."""

import functools
import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.ops.linear_attention import Gates, choose
from jaxllm.ops.linear_attention import linear_attention as op
from pallas_kernels.errors import ShapeError, UnsupportedError
from pallas_kernels.linear_attention import explain, linear_attention, unfit
from pallas_kernels.linear_attention.kernels import plan, walk
from pallas_kernels.linear_attention.mosaic_gpu_inverse import inverse
from pallas_kernels.linear_attention.shapes import CASES as TIMED
from pallas_kernels.ssd.chunks import numbers
from pallas_kernels.target import targeting
from tests.kernels.compile_grouped_tpu import ENVIRONMENT, TYPES
from tests.kernels.linear_attention import (
    CASES,
    Case,
    arguments,
    by_hand,
    exact,
    failures,
    named,
    results,
)


def on_gpu(*arrays, ids):
    with targeting("interpreter"):
        return named("mosaic_gpu")(*arrays, ids)


def on_tpu(*arrays, ids):
    number = None if ids is None else numbers(ids)
    return walk(*arrays, number, plan("mosaic_tpu", interpret=True))


@pytest.mark.parametrize("name", CASES)
def test_reference_is_what_the_words_say(name: str) -> None:
    given = arguments(CASES[name])
    found, want = exact(CASES[name], given), by_hand(CASES[name], given)
    for got, true in zip((found["out"], found["final"]), want, strict=True):
        np.testing.assert_allclose(got, true, rtol=1e-12, atol=1e-12)


@pytest.fixture
def _loose():
    """The interpreter's own products mix dtypes, in threads that a context does not reach."""
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    yield
    jax.config.update("jax_numpy_dtype_promotion", "strict")


def missed(function, name: str) -> dict:
    case = CASES[name]
    given = arguments(case)
    found = jax.jit(lambda *z: results(function, case, z, jnp.bfloat16))(*given)
    return failures(found, exact(case, given))


def cases(*quick: str) -> list:
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in CASES]


@pytest.mark.usefixtures("_loose")
@pytest.mark.parametrize("name", cases("delta rule by channel, sequences"))
def test_kernels_in_the_interpreter(name: str) -> None:
    assert missed(on_gpu, name) == {}


@pytest.mark.parametrize("name", cases("by channel", "sequences"))
def test_tpu_kernels_in_the_interpreter(name: str) -> None:
    assert missed(on_tpu, name) == {}


def test_a_start_forgets_what_is_no_number() -> None:
    case = Case(length=72, starts=(0,))
    given = list(arguments(case))
    want = by_hand(case, tuple(given))[0]
    given[5] = np.full_like(given[5], np.nan)
    *arrays, do, dfinal = (jnp.asarray(z) for z in given)
    arrays[:3] = (x.astype(jnp.bfloat16) for x in arrays[:3])
    run = functools.partial(on_tpu, ids=jnp.asarray(case.segment_ids()))
    (out, final), back = jax.vjp(run, *arrays)
    assert np.all(np.isfinite(np.asarray(final)))
    np.testing.assert_allclose(np.asarray(out, np.float32), want, atol=0.05)
    assert all(
        np.all(np.isfinite(np.asarray(x, np.float32))) for x in back((do.astype(out.dtype), dfinal))
    )


@pytest.mark.parametrize("name", ["gated delta rule", "delta rule by channel, sequences"])
def test_forward_and_gradient_lower_for_cuda(name: str) -> None:
    case = CASES[name]

    def run(*z):
        def call(*arrays, ids):
            with targeting("gpu"):
                return named("mosaic_gpu")(*arrays, ids)

        return results(call, case, z, jnp.bfloat16)

    text = jax.jit(run).trace(*arguments(case)).lower(lowering_platforms=("cuda",)).as_text()
    # The inverse and the walk; both again, the walk for states; the walk back.
    assert text.count("mosaic_gpu_v2") == 5


@pytest.mark.usefixtures("_loose")
def test_inverse_in_the_interpreter_is_right_to_a_rounding() -> None:
    random = np.random.default_rng(0)
    k = random.standard_normal((2, 64, 64))
    k[1] = k[1, :1] + 0.3 * k[1]  # keys much alike
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    below = np.tril(random.uniform(0, 2, (2, 64, 1)) * (k @ k.swapaxes(1, 2)), -1)
    want = np.linalg.inv(np.eye(64) + below)
    found = inverse(jnp.asarray(below, jnp.float32), jnp.dtype(jnp.bfloat16), True)
    miss = np.asarray(found, np.float64) - want
    assert np.sqrt(np.mean(miss**2)) < 2.0**-9 * np.sqrt(np.mean(want**2))


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs the package libtpu")
@pytest.mark.parametrize("topology", TYPES)
def test_every_timed_case_compiles_for_a_tpu(topology: str) -> None:
    command = [sys.executable, "-m", "tests.kernels.compile_linear_attention_tpu", topology]
    env = os.environ | ENVIRONMENT | {"TPU_ACCELERATOR_TYPE": TYPES[topology]}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("3 kernels") == len(TIMED)


@pytest.mark.usefixtures("_loose")
def test_models_take_the_kernel_where_it_is_named() -> None:
    case = Case(length=72)
    q, k, v, decay, beta, state, *_ = (jnp.asarray(z) for z in arguments(case))
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
    marks, real = np.zeros((1, 72), bool), np.ones((1, 72), bool)
    marks[:, 33], real[:, 65:] = True, False
    gates = Gates(decay, beta, jnp.asarray(marks), jnp.asarray(real))

    def run(q, k, v, how):
        return op((q, k, v), gates=gates, state=state, implementation=how)

    with targeting("interpreter"):
        found = jax.jit(functools.partial(run, how="mosaic_gpu"))(q, k, v)
    usual = jax.jit(functools.partial(run, how="chunked"))(q, k, v)
    want = {name: np.asarray(x, np.float64) for name, x in zip("ab", usual, strict=True)}
    assert failures(dict(zip("ab", found, strict=True)), want) == {}


def test_auto_takes_the_kernel_on_a_gpu_and_says_why_not() -> None:
    q, k, v, decay, beta, *_ = (jnp.asarray(z) for z in arguments(Case(length=8)))
    narrow = tuple(x.astype(jnp.bfloat16) for x in (q, k, v))
    gates = Gates(decay, beta)
    assert choose("auto", narrow, gates).name == "chunked"
    with targeting("gpu"):
        assert choose("auto", narrow, gates).name == "mosaic_gpu"
        assert choose("auto", (q, k, v), gates).name == "chunked"
        assert "not float32" in choose("auto", (q, k, v), gates).why
        assert choose("auto", tuple(x[:, :1] for x in narrow), gates).name == "reference"
        assert choose("chunked", narrow, gates).name == "chunked"


def test_transforms_keep_the_shapes() -> None:
    given = arguments(Case(length=64))
    inputs = [jnp.asarray(z, jnp.bfloat16 if i < 3 else None) for i, z in enumerate(given[:6])]
    many = [jnp.stack([z, z]) for z in inputs]

    def loss(*arrays):
        with targeting("gpu"):
            out, final = named("mosaic_gpu")(*arrays, None)
        return jnp.sum(out.astype(jnp.float32)) + jnp.sum(final)

    step = jax.vmap(jax.checkpoint(jax.grad(loss, argnums=tuple(range(6)))))
    assert [z.shape for z in jax.eval_shape(step, *many)] == [z.shape for z in many]


def test_wrong_arguments_are_named() -> None:
    q, k, v, decay, beta, *_ = (jnp.asarray(z) for z in arguments(Case(length=8)))
    with pytest.raises(ShapeError, match="beta must be"):
        linear_attention(q, k, v, beta=beta[..., :1])
    with pytest.raises(ShapeError, match="log_decay must be"):
        linear_attention(q, k, v, log_decay=jnp.zeros((1, 8, 2, 3)))
    with pytest.raises(UnsupportedError, match="needs a CUDA device, this is cpu"):
        linear_attention(q, k, v, beta=beta, implementation="mosaic_gpu")
    kind = {"dtype": "bfloat16", "heads": (2, 1), "delta": True}
    assert "needs a TPU" in unfit("mosaic_tpu", **kind, widths=(64, 64), platform="cpu")
    assert "at most 128" in unfit("mosaic_gpu", **kind, widths=(64, 256), platform="gpu")
    assert unfit("mosaic_gpu", **kind, widths=(192, 96), platform="gpu") is None
    with targeting("gpu"):
        with pytest.raises(UnsupportedError, match="bfloat16 and float16, not float32"):
            linear_attention(q, k, v, beta=beta, implementation="mosaic_gpu")
        narrow = [x.astype(jnp.bfloat16) for x in (v, k)]
        assert explain(*narrow, delta=True).name == "mosaic_gpu"
        with pytest.raises(UnsupportedError, match="use 'chunked' or 'auto'"):
            op((q, k, v), gates=Gates(decay, beta), implementation="mosaic_gpu")
