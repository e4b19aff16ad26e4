"""State space recurrences against float64 loops: values, gradients, starts, padding, chunks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.choices import taken
from jaxllm.errors import UnsupportedError
from jaxllm.ops import selective, ssd
from jaxllm.ops.gated_norm import gated_norm
from jaxllm.ops.ssm import DUAL, SELECTIVE, Dual, Selective, dual_scan, selective_scan
from jaxllm.spec.state_space import GatedNorm
from pallas_kernels.target import targeting
from tests.contracts.specs import assert_close, quick

BATCH, LENGTH = 2, 8
random = np.random.default_rng(0)


def draw(*shape):
    return random.standard_normal(shape).astype(np.float32)


def positive(*shape):
    """Step sizes and decays over two orders of magnitude."""
    return np.exp(1.2 * draw(*shape)).astype(np.float32)


def inputs(kind, length=LENGTH, batch=BATCH):
    if kind == "selective":
        x, dt = draw(batch, length, 5), positive(batch, length, 5)
        b, c = draw(batch, length, 3), draw(batch, length, 3)
        return Selective(x, dt, b, c, -positive(5, 3), draw(5)), draw(batch, 5, 3)
    x, dt = draw(batch, length, 4, 3), positive(batch, length, 4)
    b, c = draw(batch, length, 2, 5), draw(batch, length, 2, 5)
    return Dual(x, dt, b, c, -positive(4), draw(4)), draw(batch, 4, 3, 5)


def slow_selective(part, initial, starts):
    """The definition in the dtype of its arguments."""
    h, out = initial, []
    for t in range(part.x.shape[1]):
        if starts is not None:
            h = jnp.where(starts[:, t, None, None], 0.0, h)
        decay = jnp.exp(part.dt[:, t, :, None] * part.a[None])
        h = decay * h + (part.dt[:, t] * part.x[:, t])[..., None] * part.b[:, t, None, :]
        out.append((h * part.c[:, t, None, :]).sum(-1) + part.d[None] * part.x[:, t])
    return jnp.stack(out, axis=1), h


def slow_dual(part, initial, starts):
    """The definition in the dtype of its arguments."""
    state, out = initial, []
    repeats = part.x.shape[2] // part.b.shape[2]
    for t in range(part.x.shape[1]):
        if starts is not None:
            state = jnp.where(starts[:, t, None, None, None], 0.0, state)
        b, c = (jnp.repeat(z[:, t], repeats, axis=1) for z in (part.b, part.c))
        entering = part.dt[:, t, :, None, None] * part.x[:, t, :, :, None] * b[:, :, None, :]
        state = jnp.exp(part.dt[:, t] * part.a[None])[..., None, None] * state + entering
        y = (state * c[:, :, None, :]).sum(-1) + part.d[None, :, None] * part.x[:, t]
        out.append(y)
    return jnp.stack(out, axis=1), state


KINDS = {"selective": (selective_scan, slow_selective), "dual": (dual_scan, slow_dual)}
WAYS = [("selective", name) for name in SELECTIVE if not name.startswith("mosaic")] + [
    ("dual", name) for name in DUAL if not name.startswith("mosaic")
]


def starting(length=LENGTH):
    starts = np.zeros((BATCH, length), bool)
    starts[0, [3, 4]], starts[1, 6] = True, True
    return starts


def between(x, first, stop):
    """These tokens of an array that has a dim of tokens."""
    return jnp.asarray(x[:, first:stop] if x.shape[:2] == (BATCH, LENGTH) else x)


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of three tokens, so that several are carried over and the last is not full."""
    monkeypatch.setattr(selective, "CHUNK", 3)
    monkeypatch.setattr(ssd, "CHUNK", 3)


@functools.cache
def wanted(kind, cut):
    """(arguments, weights, (y, final), gradients) by the loop in float64."""
    part, initial = inputs(kind)
    weights = jax.eval_shape(lambda p, i: KINDS[kind][1](p, i, None), part, initial)
    weights = jax.tree.map(lambda w: draw(*w.shape), weights)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda z: jnp.asarray(z, jnp.float64), (part, initial, weights))

        def total(part, initial):
            out = KINDS[kind][1](part, initial, starting() if cut else None)
            return sum((o * w).sum() for o, w in zip(out, wide[2], strict=True)), out

        take = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
        (_, out), grads = quick(take)(*wide[:2])
        return (part, initial), weights, *jax.tree.map(np.asarray, (out, grads))


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize(("kind", "name"), WAYS)
def test_value_and_gradient_are_those_of_a_loop_in_float64(kind, name, cut, small_chunks):
    arguments, weights, out, grads = wanted(kind, cut)

    def total(part, initial):
        found = KINDS[kind][0](
            part, initial, starts=starting() if cut else None, implementation=name
        )
        return sum((o * w).sum() for o, w in zip(found, weights, strict=True)), found

    take = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
    (_, found), found_grads = quick(take)(*jax.tree.map(jnp.asarray, arguments))
    assert_close(found, out, 2e-6)
    assert_close(found_grads, grads, 5e-6)


@pytest.mark.parametrize(("kind", "name"), WAYS)
def test_padding_leaves_the_state_and_a_start_forgets_nan(kind, name, small_chunks):
    part, initial = inputs(kind)
    real = np.arange(LENGTH)[None] < np.array([6, 0])[:, None]
    dt = np.where(real.reshape(BATCH, LENGTH, *[1] * (part.dt.ndim - 2)), part.dt, 0)
    run = quick(functools.partial(KINDS[kind][0], implementation=name))
    padded = dataclasses.replace(part, dt=dt.astype(np.float32))
    _, final = run(*jax.tree.map(jnp.asarray, (padded, initial)))
    assert np.array_equal(final[1], initial[1])
    part = jax.tree.map(jnp.asarray, part)
    _, alone = run(jax.tree.map(functools.partial(between, first=0, stop=6), part), initial)
    assert_close(final[0], alone[0], 2e-6)

    starts = np.zeros((BATCH, LENGTH), bool)
    starts[:, [0, 5]] = True
    poison = jnp.full(initial.shape, jnp.nan)
    found = run(jax.tree.map(jnp.asarray, part), poison, starts=starts)
    clean = run(jax.tree.map(jnp.asarray, part), jnp.zeros(initial.shape), starts=starts)
    assert_close(found, clean, 1e-7)


@pytest.mark.parametrize(("kind", "name"), WAYS)
def test_no_gradient_crosses_a_start(kind, name, small_chunks):
    part, initial = inputs(kind)
    starts = np.zeros((BATCH, LENGTH), bool)
    starts[:, 6] = True

    def later(part, initial):
        y, _ = KINDS[kind][0](part, initial, starts=starts, implementation=name)
        return y[:, 6:].sum()

    by_part, by_initial = quick(jax.grad(later, argnums=(0, 1)))(
        *jax.tree.map(jnp.asarray, (part, initial))
    )
    assert not np.asarray(by_initial).any()
    for field in ("x", "dt", "b", "c"):
        grad = np.asarray(getattr(by_part, field))
        assert not grad[:, :6].any() and grad[:, 6:].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(1,) * 8, (4, 1, 3)])
def test_a_sequence_in_parts_is_one_pass(kind, sizes):
    part, initial = inputs(kind)
    run = quick(KINDS[kind][0])
    whole, last = run(*jax.tree.map(jnp.asarray, (part, initial)))
    state, found, at = jnp.asarray(initial), [], 0
    for size in sizes:
        part_of = functools.partial(between, first=at, stop=at + size)
        y, state = run(jax.tree.map(part_of, part), state)
        found.append(y)
        at += size
    assert_close(np.concatenate(found, axis=1), whole, 2e-6)
    assert_close(state, last, 2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_weak_decays_after_strong_ones_keep_their_digits(kind):
    """Sums of logarithms of a chunk go to -2,000; the differences that count are near -1."""
    part, _ = inputs(kind, length=48)
    strong = (np.arange(48) < 40)[None, :, None]
    dt = np.where(strong, 20 + 10 * part.dt % 1, part.dt % 1e-2)
    part = dataclasses.replace(part, dt=dt.astype(np.float32))
    shape = (BATCH, *(part.a.shape if kind == "selective" else (4, 3, 5)))
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda z: jnp.asarray(z, jnp.float64), part)
        y, _ = quick(KINDS[kind][1], static_argnums=2)(wide, jnp.zeros(shape), None)
        y = np.asarray(y)
    found, _ = quick(KINDS[kind][0])(jax.tree.map(jnp.asarray, part))
    late = np.abs(np.asarray(found) - y)[:, 40:].max() / np.abs(y[:, 40:]).max()
    print(late)
    assert late < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_as_good_as_the_loop(kind):
    part, _ = inputs(kind, length=40)
    low = {k: jnp.asarray(getattr(part, k), jnp.bfloat16) for k in "xbc"}
    part = dataclasses.replace(jax.tree.map(jnp.asarray, part), **low)
    wide = dataclasses.replace(part, **{k: v.astype(jnp.float32) for k, v in low.items()})
    exact, _ = quick(KINDS[kind][0])(wide)

    def error(name):
        y, state = quick(functools.partial(KINDS[kind][0], implementation=name))(part)
        assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
        return np.abs(np.asarray(y, np.float32) - exact).max()

    assert error("chunked") <= 2 * error("reference") + 1e-2 * np.abs(exact).max()


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_implementation_is_named(kind):
    part, _ = inputs(kind)
    with pytest.raises(UnsupportedError, match="scan 'fast' is unknown; allowed: auto, chunked"):
        KINDS[kind][0](jax.tree.map(jnp.asarray, part), implementation="fast")


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_the_gated_norm(before, groups):
    y, z, x, scale, d = *draw(3, 2, 3, 6, 4), draw(6, 4), draw(6)
    norm, skip = GatedNorm(eps=1e-2, groups=groups, before_gate=before), (jnp.asarray(x), d)
    found = gated_norm(jnp.asarray(y), jnp.asarray(z), scale, norm, skip=skip)
    u = y.astype(np.float64) + d[:, None] * x
    gate = z / (1 + np.exp(-z.astype(np.float64)))
    wide = u if before else u * gate
    for rows in np.split(np.arange(24), groups):
        part = wide.reshape(2, 3, 24)[..., rows]
        wide.reshape(2, 3, 24)[..., rows] = part / np.sqrt((part**2).mean(-1, keepdims=True) + 1e-2)
    wanted = wide * scale * (gate if before else 1)
    assert_close(found, wanted, 1e-6)
    u = y.astype(np.float64) + d[:, None] * x
    assert_close(gated_norm(jnp.asarray(y), jnp.asarray(z), None, None, skip=skip), u * gate, 1e-6)


@pytest.mark.parametrize(
    ("tokens", "options", "took"),
    [(4096, {}, True), (4095, {}, False), (4096, {"implementation": "chunked"}, False)],
)
def test_the_gated_norm_by_a_kernel_where_there_are_many_tokens(tokens, options, took):
    wide = jax.ShapeDtypeStruct((1, tokens, 4, 64), jnp.bfloat16)
    scale, d = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4, 64), (4,)))
    norm = GatedNorm(eps=1e-2, groups=1, before_gate=False)

    def call(y, z, x, scale, d):
        return gated_norm(y, z, scale, norm, skip=(x, d), **options)

    with targeting("gpu"), taken() as heard:
        jax.jit(call).trace(wide, wide, wide, scale, d)
    assert heard == ({"gated norm": {"mosaic_gpu"}} if took else {})


def test_the_gated_norm_by_a_kernel():
    y, z, x, scale, d = *draw(3, 2, 3, 4, 64), draw(4, 64), draw(4)
    norm = GatedNorm(eps=1e-2, groups=1, before_gate=False)
    y, z, x = (jnp.asarray(a, jnp.bfloat16) for a in (y, z, x))
    call = functools.partial(gated_norm, y, z, scale, norm, skip=(x, d))
    with targeting("interpreter"), taken() as heard:
        found = call(implementation="mosaic_gpu")
    assert heard == {"gated norm": {"mosaic_gpu"}}
    assert_close(found.astype(jnp.float32), call().astype(jnp.float32), 1e-2)
    part = (slice(None), slice(None), slice(3))  # heads that make no whole boxes: XLA's way
    call = functools.partial(gated_norm, y[part], z[part], scale[:3], norm)
    with targeting("interpreter"), taken() as heard:
        call(skip=(x[part], d[:3]), implementation="mosaic_gpu")
    assert not heard
