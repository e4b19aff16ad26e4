"""The dual state space scan on the CPU: reference and arguments; its kernels interpreted, lowered
for a GPU and compiled for TPUs."""

import functools
import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import warpgroups
from pallas_kernels.errors import ShapeError, UnsupportedError
from pallas_kernels.ssd import explain, ssd, tpu
from pallas_kernels.ssd.chunks import numbers
from pallas_kernels.ssd.shapes import CASES as TIMED
from pallas_kernels.target import targeting
from tests.kernels.compile_grouped_tpu import ENVIRONMENT, TYPES
from tests.kernels.ssd import CASES, Case, arguments, by_hand, failures, plain, results


def named(implementation: str, platform: str):
    def run(x, dt, a, b, c, initial, ids):
        with targeting(platform):
            return ssd(
                x, dt, a, b, c, initial=initial, segment_ids=ids, implementation=implementation
            )

    return run


def on_tpu(x, dt, a, b, c, initial, ids):
    number = None if ids is None else numbers(ids)
    return tpu.scan(x, dt, a, b, c, initial, number, interpret=True)


@pytest.mark.parametrize("name", CASES)
def test_reference_is_what_the_words_say(name: str) -> None:
    given = arguments(CASES[name])
    *inputs, dy, dfinal = (jnp.asarray(z) for z in given)
    ids = CASES[name].segment_ids()
    ids = None if ids is None else jnp.asarray(ids)
    run = functools.partial(named("reference", "cpu"), ids=ids)
    out, back = jax.vjp(run, *inputs)
    want = by_hand(CASES[name], given)
    for got, true in zip((*out, *back((dy, dfinal))), want.values(), strict=True):
        scale = float(np.max(np.abs(true), initial=1e-6))
        np.testing.assert_allclose(np.asarray(got) / scale, true / scale, rtol=0, atol=2e-5)


@pytest.fixture
def _loose():
    """The interpreter's own products mix dtypes, in threads that a context does not reach."""
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    yield
    jax.config.update("jax_numpy_dtype_promotion", "strict")


def missed(function, name: str) -> dict:
    case = CASES[name]
    given = arguments(case)
    usual = jax.jit(lambda *z: results(plain, case, z))(*given)
    found = jax.jit(lambda *z: results(function, case, z))(*given)
    return failures(found, usual, by_hand(case, given))


QUICK = {"sequences"}
INTERPRETED = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CASES
]


@pytest.mark.usefixtures("_loose")
@pytest.mark.parametrize("name", INTERPRETED)
def test_kernels_in_the_interpreter(name: str) -> None:
    assert missed(named("mosaic_gpu", "interpreter"), name) == {}


@pytest.mark.parametrize("name", INTERPRETED)
def test_tpu_kernels_in_the_interpreter(name: str) -> None:
    assert missed(on_tpu, name) == {}


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs the package libtpu")
@pytest.mark.parametrize("topology", TYPES)
def test_every_timed_case_compiles_for_a_tpu(topology: str) -> None:
    command = [sys.executable, "-m", "tests.kernels.compile_ssd_tpu", topology]
    env = os.environ | ENVIRONMENT | {"TPU_ACCELERATOR_TYPE": TYPES[topology]}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("3 kernels") == len(TIMED)


def test_forward_and_gradient_lower_for_cuda() -> None:
    case = Case(length=200, heads=4, groups=2, state=128, starts=(3, 70))
    given = arguments(case)
    run = jax.jit(lambda *z: results(named("mosaic_gpu", "gpu"), case, z))
    text = run.trace(*given).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 4  # the scan; states, their gradients, and the rest


def test_a_start_forgets_what_is_no_number() -> None:
    case = CASES["a sequence from the first token on"]
    given = list(arguments(case))
    want = by_hand(case, tuple(given))
    given[5] = np.full_like(given[5], np.nan)
    x, dt, a, b, c, initial = (jnp.asarray(z) for z in given[:6])
    for run in (named("reference", "cpu"), on_tpu):
        narrow = [z.astype(jnp.bfloat16) for z in (x, b, c)]
        ids = jnp.asarray(case.segment_ids())
        y, final = run(narrow[0], dt, a, narrow[1], narrow[2], initial, ids)
        assert np.all(np.isfinite(np.asarray(final)))
        np.testing.assert_allclose(np.asarray(y, np.float32), want["y"], atol=0.1, rtol=0.05)


def test_ids_on_the_device_may_go_back() -> None:
    case = Case(length=40)
    x, dt, a, b, c, *_ = (jnp.asarray(z) for z in arguments(case))
    run = jax.jit(lambda ids: ssd(x, dt, a, b, c, segment_ids=ids, implementation="reference")[0])
    back = jnp.asarray(np.repeat([[5, 2, 7, -1]], 10, axis=1), jnp.int32)
    forth = jnp.asarray(np.repeat([[1, 2, 3, 4]], 10, axis=1), jnp.int32)
    np.testing.assert_array_equal(run(back), run(forth))


def test_ids_that_are_seen_within_a_trace_are_checked() -> None:
    x, dt, a, b, c, *_ = (jnp.asarray(z) for z in arguments(Case(length=4)))

    def run(x, ids):
        return ssd(x, dt, a, b, c, segment_ids=ids, implementation="reference")[0]

    ids, back = (jnp.asarray([z], jnp.int32) for z in ([0, 0, 1, 1], [1, 1, 0, 0]))
    np.testing.assert_array_equal(jax.jit(lambda x: run(x, ids))(x), jax.jit(run)(x, ids))
    with pytest.raises(ShapeError, match="never go back"):
        jax.jit(lambda x: run(x, back))(x)


def test_transforms_keep_the_shapes() -> None:
    case = Case(length=64)
    x, dt, a, b, c, initial = arguments(case)[:6]
    inputs = [jnp.asarray(z, jnp.bfloat16) for z in (x, b, c)]
    many = [jnp.stack([z, z]) for z in (*inputs, jnp.asarray(dt), jnp.asarray(initial))]

    def loss(x, b, c, dt, initial):
        y, final = named("mosaic_gpu", "gpu")(x, dt, jnp.asarray(a), b, c, initial, None)
        return jnp.sum(y.astype(jnp.float32)) + jnp.sum(final)

    step = jax.vmap(jax.checkpoint(jax.grad(loss, argnums=(0, 1, 2, 3, 4))))
    assert [z.shape for z in jax.eval_shape(step, *many)] == [z.shape for z in many]


def test_wrong_arguments_are_named() -> None:
    x, dt, a, b, c, initial = (jnp.asarray(z) for z in arguments(Case(length=16, heads=4))[:6])
    ids = jnp.zeros((1, 16), jnp.int32)
    with pytest.raises(ShapeError, match="b and c"):
        ssd(x, dt, a, b, c[:, 1:])
    with pytest.raises(ShapeError, match="no multiple of 3 groups"):
        ssd(x, dt, a, *(jnp.concatenate([z] * 3, axis=2) for z in (b, c)))
    with pytest.raises(ShapeError, match="dt"):
        ssd(x, dt[..., :1], a, b, c)
    with pytest.raises(ShapeError, match="dtype"):
        ssd(x.astype(jnp.bfloat16), dt, a, b, c)
    with pytest.raises(ShapeError, match="initial state must be"):
        ssd(x, dt, a, b, c, initial=initial[:, 1:])
    with pytest.raises(ShapeError, match="integers"):
        ssd(x, dt, a, b, c, segment_ids=ids.astype(jnp.float32))
    with pytest.raises(ShapeError, match="never go back"):
        ssd(x, dt, a, b, c, segment_ids=ids.at[0, 3].set(1))
    with pytest.raises(UnsupportedError, match="did you mean 'mosaic_gpu'"):
        ssd(x, dt, a, b, c, implementation="mosaic_gp")
    with pytest.raises(UnsupportedError, match="needs a CUDA device"):
        ssd(x, dt, a, b, c, implementation="mosaic_gpu")
    x16, b16, c16 = (z.astype(jnp.bfloat16) for z in (x, b, c))
    gpu = named("mosaic_gpu", "gpu")
    with pytest.raises(UnsupportedError, match="bfloat16 and float16"):
        gpu(x, dt, a, b, c, None, None)
    with pytest.raises(UnsupportedError, match="multiple of 64"):
        gpu(x16[..., :32], dt, a, b16, c16, None, None)
    with pytest.raises(UnsupportedError, match="states of 64 or 128"):
        gpu(x16, dt, a, b16[..., :16], c16[..., :16], None, None)
    with pytest.raises(UnsupportedError, match="two by two"):
        gpu(x16[:, :, :1], dt[..., :1], a[:1], b16, c16, None, None)
    assert explain(x16, b16).name == "reference"
    with targeting("gpu"):
        assert explain(x16, b16).name == "mosaic_gpu"
    with targeting("tpu"):
        assert explain(x16, b16).name == "mosaic_tpu"


def test_programs_are_no_clusters(monkeypatch) -> None:
    """32 pairs of heads are more than the programs that a device lets into one."""
    asked = []
    real = warpgroups.plgpu.kernel

    def spy(*args, **options):
        asked.append((options["kernel_name"], options.get("cluster")))
        return real(*args, **options)

    monkeypatch.setattr(warpgroups.plgpu, "kernel", spy)
    wide = jax.ShapeDtypeStruct((2, 192, 64, 64), jnp.bfloat16)
    shared = jax.ShapeDtypeStruct((2, 192, 1, 128), jnp.bfloat16)
    dt, a = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 192, 64), (64,)))

    def both(x, dt, a, b, c, dy):
        def run(x, dt, a, b, c):
            return named("mosaic_gpu", "gpu")(x, dt, a, b, c, None, None)[0]

        y, back = jax.vjp(run, x, dt, a, b, c)
        return y, *back(dy)

    jax.jit(both).trace(wide, dt, a, shared, shared, wide).lower(lowering_platforms=("cuda",))
    assert {cluster for _, cluster in asked} == {None}
    assert len(asked) >= 3
    with pytest.raises(ValueError, match="programs along 'pair' are two, not 3"):
        warpgroups.run_kernel(None, {}, {}, name="any", grid={"pair": 3}, interpret=False)
