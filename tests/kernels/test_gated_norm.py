"""The gated norm on the CPU: reference and kernel against float64, lowering, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.errors import ShapeError, UnsupportedError
from pallas_kernels.gated_norm import explain, gated_norm, unfit
from pallas_kernels.gated_norm.bench import draw as drawn
from pallas_kernels.gated_norm.bench import forms
from pallas_kernels.gated_norm.shapes import CASES, Shaped
from pallas_kernels.target import targeting
from pallas_kernels.timing import errors_of
from tests.kernels.lowered import kernel_calls

EPS = 1e-2


def draw(rows=(2, 3), channels=256):
    random = np.random.default_rng(0)
    y, x, z, pull = random.standard_normal((4, *rows, channels))
    d, scale = 1 + random.standard_normal((2, channels)) / 3
    return y, x, z, d, scale, pull


def by_hand(y, x, z, d, scale, *, groups, before_gate):
    """In float64, group by group."""
    gate = z / (1 + np.exp(-z))
    u = y + d * x
    u = u if before_gate else u * gate
    out = np.zeros_like(u)
    for part in np.split(np.arange(u.shape[-1]), groups):
        one = u[..., part]
        out[..., part] = one / np.sqrt((one**2).mean(-1, keepdims=True) + EPS)
    return out * scale * (gate if before_gate else 1)


def slope(function, arguments, i, way):
    """Of sum(pull * function) along `way` in argument i, by differences in float64."""
    *inputs, pull = arguments

    def at(step):
        moved = [a + step * way if j == i else a for j, a in enumerate(inputs)]
        return (pull * function(*moved)).sum()

    return (at(1e-5) - at(-1e-5)) / 2e-5


def narrow(arguments, dtype):
    return [jnp.asarray(a, dtype if a.ndim > 1 else jnp.float32) for a in arguments]


@pytest.mark.parametrize("before_gate", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_reference_in_value_and_gradient(groups, before_gate):
    form = {"groups": groups, "before_gate": before_gate}
    given = draw()
    call = functools.partial(gated_norm, eps=EPS, implementation="reference", **form)
    *inputs, pull = (jnp.asarray(a, jnp.float32) for a in given)
    found, back = jax.vjp(call, *inputs)
    exact = functools.partial(by_hand, **form)
    np.testing.assert_allclose(found, exact(*given[:5]), rtol=2e-5, atol=2e-5)
    random = np.random.default_rng(1)
    for i, gradient in enumerate(back(pull)):
        way = random.standard_normal(given[i].shape)
        wanted = slope(exact, given, i, way)
        assert abs((np.asarray(gradient, np.float64) * way).sum() - wanted) < 1e-3 * (
            1 + abs(wanted)
        )


CALLS = [
    ((2, 3), 512, 1, False),
    ((2, 3), 512, 1, True),
    ((4,), 512, 2, False),
    pytest.param((5, 2), 1024, 1, False, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("rows", "channels", "groups", "before_gate"), CALLS)
def test_the_kernel_interpreted(rows, channels, groups, before_gate):
    """It rounds nothing between, but the gradient of x comes from the rounded one of y."""
    form = {"eps": EPS, "groups": groups, "before_gate": before_gate}
    given = tuple(narrow(draw(rows, channels), jnp.bfloat16))
    exact = functools.partial(gated_norm, implementation="reference", **form)
    with targeting("interpreter"):
        kernel = functools.partial(gated_norm, implementation="mosaic_gpu", **form)
        ours = errors_of(kernel, exact, given)
    plain = errors_of(exact, exact, given)
    assert max(ours) < 4e-3
    assert all(a <= 2 * b + 1e-6 for a, b in zip(ours, plain, strict=True)), (ours, plain)


@pytest.mark.parametrize("name", CASES)
def test_cases_lower_for_hopper(name):
    case = CASES[name]
    wide = jax.ShapeDtypeStruct((case.tokens, case.channels), jnp.bfloat16)
    narrow = jax.ShapeDtypeStruct((case.channels,), jnp.float32)
    call = forms(case.groups)["mosaic_gpu"]

    def both(y, x, z, d, scale, pull):
        out, back = jax.vjp(call, y, x, z, d, scale)
        return out, back(pull)

    with targeting("gpu"):
        lowered = jax.jit(both).trace(wide, wide, wide, narrow, narrow, wide)
        text = lowered.lower(lowering_platforms=("cuda",)).as_text()
    assert kernel_calls(text) == 2


def test_what_the_bench_draws():
    y, x, z, d, scale, pull = drawn(Shaped(tokens=4, channels=256), 0)
    assert y.shape == x.shape == z.shape == pull.shape == (4, 256)
    assert d.shape == scale.shape == (256,) and y.dtype == jnp.bfloat16


def test_choices_and_refusals():
    y = jax.ShapeDtypeStruct((8, 512), jnp.bfloat16)
    with targeting("gpu"):
        assert explain(y).name == "reference"  # until it has been timed
        assert explain(y, implementation="mosaic_gpu").name == "mosaic_gpu"
    with pytest.raises(UnsupportedError, match="CUDA device, this is cpu"):
        explain(y, implementation="mosaic_gpu")
    with pytest.raises(UnsupportedError, match="did you mean 'mosaic_gpu'"):
        explain(y, implementation="mosaic_gp")
    said = functools.partial(unfit, "mosaic_gpu", dtype="bfloat16", platform="gpu")
    assert said(channels=4096) is None and said(channels=8192, groups=8) is None
    assert "multiples of 256 channels up to 4096, not 8192" in (said(channels=8192) or "")
    assert "not 100" in (said(channels=300, groups=3) or "")
    assert "float32" in (unfit("mosaic_gpu", dtype="float32", channels=512, platform="gpu") or "")
    empty = jax.ShapeDtypeStruct((0, 512), jnp.bfloat16)
    with targeting("gpu"), pytest.raises(UnsupportedError, match="empty"):
        explain(empty, implementation="mosaic_gpu")


def test_arguments_that_do_not_fit():
    y, x, z, d, scale, _ = (jnp.asarray(a, jnp.float32) for a in draw())
    call = functools.partial(gated_norm, eps=EPS)
    with pytest.raises(ShapeError, match="one shape and dtype"):
        call(y, x[..., :8], z, d, scale)
    with pytest.raises(ShapeError, match="one shape and dtype"):
        call(y, x.astype(jnp.bfloat16), z, d, scale)
    with pytest.raises(ShapeError, match=r"d and scale \[256\]"):
        call(y, x, z, d[:3], scale)
    with pytest.raises(ShapeError, match="no multiple of 3 groups"):
        call(y, x, z, d, scale, groups=3)
