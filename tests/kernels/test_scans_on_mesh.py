"""Linear attention and the selective scan by kernels on a mesh: each device takes its own rows,
heads and channels. Values and gradients with the loop over tokens in the kernels' place; the
kernels themselves lowered for a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels.linear_attention as linear
import pallas_kernels.selective_scan as selective
from jaxllm.ops import ssm
from jaxllm.ops.linear_attention import Gates, linear_attention
from pallas_kernels.errors import UnsupportedError
from pallas_kernels.target import targeting

random = np.random.default_rng(0)


def draw(*shape, dtype=jnp.float32):
    return jnp.asarray(random.standard_normal(shape).astype(np.float32), dtype)


def mesh(data: int = 2, tensor: int = 4):
    return jax.make_mesh(
        (data, tensor), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )


def attention(key_heads: int, heads: int = 8):
    q, k = (draw(2, 9, key_heads, 64, dtype=jnp.bfloat16) / 8 for _ in range(2))
    v, decay = draw(2, 9, heads, 64, dtype=jnp.bfloat16), -jnp.square(draw(2, 9, heads, 64))
    beta, state = jax.nn.sigmoid(draw(2, 9, heads)), draw(2, heads, 64, 64)
    marks = np.zeros((2, 9), bool)
    marks[1, 4] = True

    def run(q, k, v, decay, beta, state):
        gates = Gates(decay, beta, jnp.asarray(marks))
        with targeting("gpu"):
            return linear_attention(
                (q, k, v), gates=gates, state=state, implementation="mosaic_gpu"
            )

    return run, (q, k, v, decay, beta, state)


def scan(channels: int = 256):
    x, dt = draw(2, 9, channels, dtype=jnp.bfloat16), jnp.exp(draw(2, 9, channels) - 2)
    b, c = draw(2, 9, 16), draw(2, 9, 16)
    a, d, state = -jnp.exp(draw(channels, 16)), draw(channels), draw(2, channels, 16)
    marks = np.zeros((2, 9), bool)
    marks[1, 4] = True

    def run(x, dt, b, c, a, d, state):
        given = ssm.Selective(x, dt, b, c, a, d)
        with targeting("gpu"):
            return ssm.selective_scan(
                given, state, starts=jnp.asarray(marks), implementation="mosaic_gpu"
            )

    return run, (x, dt, b, c, a, d, state)


@pytest.fixture
def _loops(monkeypatch):
    for module, name in ((linear, "linear_attention"), (selective, "selective_scan")):
        real = getattr(module, name)

        def loop(*arguments, real=real, **how):
            return real(*arguments, **how | {"implementation": "reference"})

        monkeypatch.setattr(module, name, loop)


KINDS = {
    "one key head": functools.partial(attention, 1),
    "key heads that several devices need": functools.partial(attention, 2),
    "channels": scan,
}


@pytest.mark.usefixtures("_loops")
@pytest.mark.parametrize("kind", KINDS)
def test_devices_give_what_one_gives(kind: str) -> None:
    run, given = KINDS[kind]()

    def both(*given):
        out, back = jax.vjp(run, *given)
        return out, back(jax.tree.map(jnp.ones_like, out))

    want = jax.jit(both)(*given)
    with jax.set_mesh(mesh()):
        found = jax.jit(both)(*given)
    for got, true in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        got, true = (np.asarray(z, np.float64) for z in (got, true))
        # Gradients that several devices have parts of are sums of rounded ones.
        assert np.sqrt(np.mean((got - true) ** 2)) < 2**-7 * np.sqrt(np.mean(true**2))


@pytest.mark.parametrize("kind", ["key heads that several devices need", "channels"])
def test_kernels_on_a_mesh_lower_for_cuda(kind: str) -> None:
    run, given = KINDS[kind]()

    def loss(*given):
        return jnp.sum(run(*given)[0].astype(jnp.float32))

    with jax.set_mesh(mesh()):
        traced = jax.jit(jax.grad(loss)).trace(*given)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") >= 2


def test_what_does_not_split_is_refused() -> None:
    run, given = scan(channels=128)
    with jax.set_mesh(mesh()), pytest.raises(UnsupportedError, match="64 channels, not 32"):
        run(*given)
