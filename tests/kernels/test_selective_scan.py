"""The selective scan on the CPU: reference and arguments; its kernels interpreted, lowered for a
GPU and compiled for TPUs, against the loop over tokens in float64."""

import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.ops import ssm
from pallas_kernels.errors import ShapeError, UnsupportedError
from pallas_kernels.selective_scan import explain, selective_scan, unfit
from pallas_kernels.selective_scan.kernels import run
from pallas_kernels.target import targeting
from tests.kernels.compile_grouped_tpu import ENVIRONMENT, TYPES

NAMES = ("y", "final", "dx", "ddt", "da", "db", "dc", "dinitial")


def draw(batch=1, length=12, channels=64, state=16):
    random = np.random.default_rng(0)
    x, dt = random.standard_normal((2, batch, length, channels)).astype(np.float32)
    b, c = random.standard_normal((2, batch, length, state)).astype(np.float32)
    a = -np.exp(random.standard_normal((channels, state))).astype(np.float32)
    initial = random.standard_normal((batch, channels, state)).astype(np.float32)
    dt = np.log1p(np.exp(dt - 2))
    dt[:, ::5] = 0
    return narrow(x), dt, a, b, c, initial


def narrow(x):
    return np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32))


def by_hand(x, dt, a, b, c, initial, starts=()):
    """Token by token in float64."""
    x, dt, a, b, c, h = (np.asarray(z, np.float64) for z in (x, dt, a, b, c, initial))
    y = np.zeros(x.shape)
    for t in range(x.shape[1]):
        h = 0 * h if t in starts else h
        h = np.exp(dt[:, t, :, None] * a) * h + (dt[:, t] * x[:, t])[..., None] * b[:, t, None]
        y[:, t] = np.einsum("bim,bm->bi", h, c[:, t])
    return y, h


def ids_of(given, starts):
    marks = np.zeros(given[0].shape[:2], np.int32)
    marks[:, list(starts)] = 1
    return np.cumsum(marks, axis=1, dtype=np.int32)


def gradients(function, given, pull) -> dict[str, np.ndarray]:
    """Result and gradients of function(x, dt, a, b, c, initial)."""
    out, back = jax.vjp(function, *given)
    pulled = back(tuple(g.astype(z.dtype) for g, z in zip(pull, out, strict=True)))
    return dict(zip(NAMES, (*out, *pulled), strict=True))


def check(implementation: str, starts: tuple[int, ...], **kind) -> None:
    given = draw(**kind)
    random = np.random.default_rng(1)
    pull = [random.standard_normal(given[i].shape).astype(np.float32) for i in (0, 5)]
    pull[0] = narrow(pull[0])
    ids = jnp.asarray(ids_of(given, starts))
    with jax.enable_x64(True):
        wide = [jnp.asarray(z, jnp.float64) for z in given]
        how = {"segment_ids": ids, "implementation": "reference"}
        exact = jax.jit(
            lambda *z: gradients(lambda *y: selective_scan(*y[:5], initial=y[5], **how), z, pull)
        )
        want = {name: np.asarray(z) for name, z in exact(*wide).items()}
    keep = jnp.asarray(jnp.diff(ids, axis=1, prepend=0) == 0, jnp.float32) if starts else None
    x, *rest = (jnp.asarray(z) for z in given)
    found = jax.jit(lambda *z: gradients(lambda *y: run(*y, keep, implementation, True), z, pull))(
        x.astype(jnp.bfloat16), *rest
    )
    for name, true in want.items():
        # All is in float32; y and the gradient of x are rounded once.
        allowed = 2.0**-9 if name in ("y", "dx") else 1e-6
        miss = np.asarray(found[name], np.float64) - true
        assert found[name].shape == true.shape
        assert np.sqrt(np.mean(miss**2)) <= allowed * np.sqrt(np.mean(true**2)), name


def test_reference_is_what_the_words_say() -> None:
    given = draw()
    *inputs, initial = (jnp.asarray(z) for z in given)
    found = selective_scan(*inputs, initial=initial, implementation="reference")
    for got, true in zip(found, by_hand(*given), strict=True):
        np.testing.assert_allclose(got, true, atol=1e-5)
    ids = jnp.asarray(ids_of(given, (4,)))
    how = {"segment_ids": ids, "implementation": "reference"}
    found = selective_scan(*inputs, initial=jnp.full_like(initial, np.nan), **how)
    want = by_hand(*given, starts=(4,))
    np.testing.assert_allclose(found[0][:, 4:], want[0][:, 4:], atol=1e-5)
    np.testing.assert_allclose(found[1], want[1], atol=1e-5)


@pytest.fixture
def _loose():
    """The interpreter's own products mix dtypes, in threads that a context does not reach."""
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    yield
    jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.mark.usefixtures("_loose")
def test_gpu_kernels_in_the_interpreter() -> None:
    check("mosaic_gpu", (3, 15), length=19)


@pytest.mark.slow
@pytest.mark.usefixtures("_loose")
@pytest.mark.parametrize("state", [8, 32])
def test_more_of_the_gpu_kernels_in_the_interpreter(state: int) -> None:
    check("mosaic_gpu", (), length=70, channels=128, state=state, batch=2)


@pytest.mark.parametrize("starts", [pytest.param((), marks=pytest.mark.slow), (3, 127, 129)])
def test_tpu_kernels_in_the_interpreter(starts: tuple[int, ...]) -> None:
    check("mosaic_tpu", starts, length=130, channels=128)


def test_a_start_forgets_what_is_no_number() -> None:
    given = draw(length=9, channels=128)
    x, *rest, initial = (jnp.asarray(z) for z in given)
    keep = jnp.asarray(np.arange(9)[None] != 4, jnp.float32)
    run_from = jnp.full_like(initial, jnp.nan)
    y, final = run(x.astype(jnp.bfloat16), *rest, run_from, keep, "mosaic_tpu", True)
    want = by_hand(*given, starts=(4,))
    np.testing.assert_allclose(np.asarray(y, np.float32)[:, 4:], want[0][:, 4:], atol=0.05)
    np.testing.assert_allclose(np.asarray(final), want[1], atol=1e-4)


def test_lowers_for_cuda() -> None:
    x, dt, a, b, c, initial = (jnp.asarray(z) for z in draw(length=70, channels=128))
    ids = jnp.zeros((1, 70), jnp.int32)

    def both(x, dt, a, b, c, initial):
        def scan(*z):
            how = {"segment_ids": ids, "implementation": "mosaic_gpu"}
            with targeting("gpu"):
                return selective_scan(*z[:5], initial=z[5], **how)

        out, back = jax.vjp(scan, x, dt, a, b, c, initial)
        return out, back(out)

    x = x.astype(jnp.bfloat16)
    traced = jax.jit(both).trace(x, dt, a, b, c, initial)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 3  # the scan; again for states; back


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs the package libtpu")
@pytest.mark.parametrize("topology", TYPES)
def test_compiles_for_a_tpu(topology: str) -> None:
    command = [sys.executable, "-m", "tests.kernels.compile_selective_tpu", topology]
    env = os.environ | ENVIRONMENT | {"TPU_ACCELERATOR_TYPE": TYPES[topology]}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "3 kernels" in done.stdout


@pytest.mark.usefixtures("_loose")
def test_models_take_the_kernel_where_it_is_named() -> None:
    x, dt, a, b, c, initial = (jnp.asarray(z) for z in draw(length=20))
    given = ssm.Selective(x.astype(jnp.bfloat16), dt, b, c, a, jnp.ones(64))
    starts = np.zeros((1, 20), bool)
    starts[:, 7] = True

    def scan(how):
        return ssm.selective_scan(given, initial, starts=starts, implementation=how)

    with targeting("interpreter"):
        found = scan("mosaic_gpu")
    for got, true in zip(found, scan("reference"), strict=True):
        got, true = (np.asarray(z, np.float32) for z in (got, true))
        np.testing.assert_allclose(got, true, rtol=2**-7, atol=1e-2)


def test_transforms_keep_the_shapes() -> None:
    inputs = [jnp.asarray(z, jnp.bfloat16 if i == 0 else None) for i, z in enumerate(draw())]
    many = [jnp.stack([z, z]) for z in inputs]

    def loss(*z):
        with targeting("gpu"):
            y, final = selective_scan(*z[:5], initial=z[5], implementation="mosaic_gpu")
        return jnp.sum(y.astype(jnp.float32)) + jnp.sum(final)

    step = jax.vmap(jax.checkpoint(jax.grad(loss, argnums=tuple(range(6)))))
    assert [z.shape for z in jax.eval_shape(step, *many)] == [z.shape for z in many]


def test_wrong_arguments_are_named() -> None:
    x, dt, a, b, c, initial = (jnp.asarray(z) for z in draw())
    with pytest.raises(ShapeError, match="x and dt"):
        selective_scan(x, dt[:, 1:], a, b, c)
    with pytest.raises(ShapeError, match="b and c"):
        selective_scan(x, dt, a, b[..., 1:], c)
    with pytest.raises(ShapeError, match="initial must be"):
        selective_scan(x, dt, a, b, c, initial=initial[:, 1:])
    with pytest.raises(ShapeError, match="never go back"):
        ids = jnp.asarray([[1] * 6 + [0] * 6], jnp.int32)
        selective_scan(x, dt, a, b, c, segment_ids=ids)
    with pytest.raises(UnsupportedError, match="needs a CUDA device"):
        selective_scan(x, dt, a, b, c, implementation="mosaic_gpu")
    kind = {"dtype": "bfloat16", "state": 16, "platform": "tpu"}
    assert "multiple of 128 channels" in unfit("mosaic_tpu", **kind, channels=64)
    assert unfit("mosaic_tpu", **kind, channels=256) is None
    with targeting("gpu"):
        with pytest.raises(UnsupportedError, match="bfloat16 and float16"):
            selective_scan(x, dt, a, b, c, implementation="mosaic_gpu")
        x = x.astype(jnp.bfloat16)
        assert explain(x, a).name == "mosaic_gpu"
        assert "multiple of 64 channels" in explain(x[..., :60], a[:60]).why
        assert "states a channel" in explain(x, a[:, :12]).why
