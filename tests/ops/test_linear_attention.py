"""Linear attention against a float64 recurrence; chunks against tokens; borders and padding."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.errors import ConfigError, ShapeError
from jaxllm.ops.linear_attention import Gates, add_ones, divide, linear_attention
from tests.contracts.specs import quick

B, N, K, M, H = 2, 4, 2, 5, 6
DECAYS = ("none", "head", "channel")
KINDS = list(itertools.product(DECAYS, (False, True)))
FORMS = ("reference", "chunked")


def inputs(length, decay, delta, *, strength=1.0, seed=0):
    """(q, k, v), log decays, betas, state; keys of length 1 and betas up to 2 with delta."""
    random = np.random.default_rng(seed)
    q, k = random.standard_normal((2, B, length, K, M))
    v = random.standard_normal((B, length, N, H))
    k = k / np.linalg.norm(k, axis=-1, keepdims=True) if delta else k * M**-0.5
    shape = {"none": None, "head": (B, length, N), "channel": (B, length, N, M)}[decay]
    g = None if shape is None else -strength * random.random(shape) ** 2
    beta = 2 * random.random((B, length, N)) if delta else None
    return (q * M**-0.5, k, v), g, beta, random.standard_normal((B, N, M, H))


def oracle(qkv, g, beta, state, starts=None, real=None):
    """Token by token in float64."""
    q, k = (np.repeat(x, N // K, axis=2) for x in qkv[:2])
    v, s, out = qkv[2], state.astype(np.float64).copy(), np.zeros(qkv[2].shape)
    for t in range(v.shape[1]):
        if starts is not None:
            s[starts[:, t]] = 0
        new = s if g is None else s * np.exp(g[:, t].reshape(B, N, -1, 1))
        u = v[:, t]
        if beta is not None:
            u = beta[:, t, :, None] * (u - np.einsum("bnmh,bnm->bnh", new, k[:, t]))
        new = new + k[:, t, ..., None] * u[:, :, None]
        s = new if real is None else np.where(real[:, t, None, None, None], new, s)
        out[:, t] = np.einsum("bnmh,bnm->bnh", s, q[:, t])
    return out, s


def form(qkv, gates, state, *, how):
    return linear_attention(qkv, gates=gates, state=state, implementation=how)


_run = quick(form, static_argnames="how")


def cast(tree, dtype):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def run(qkv, g, beta, state, *, how="auto", starts=None, real=None, dtype=np.float32):
    qkv, g, beta, state = cast((qkv, g, beta, state), dtype)
    return _run(qkv, Gates(g, beta, starts, real), state, how=how)


def close(found, wanted, tolerance):
    for a, b in zip(found, wanted, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.isfinite(a).all()
        assert np.abs(a - b).max() <= tolerance * max(1, np.abs(b).max())


@pytest.mark.parametrize(("decay", "delta"), KINDS)
@pytest.mark.parametrize("length", [1, 150])
def test_both_forms_are_the_recurrence(length, decay, delta):
    given = inputs(length, decay, delta)
    wanted = oracle(*given)
    for how in FORMS:
        close(run(*given, how=how), wanted, 1e-5)
    with jax.enable_x64(True):
        for how in FORMS:
            close(run(*given, how=how, dtype=np.float64), wanted, 1e-12)


@pytest.mark.parametrize(("decay", "delta"), KINDS)
def test_gradients_are_the_slope_of_the_recurrence(decay, delta):
    """Of chunks and of tokens, against differences of the float64 recurrence."""
    given = inputs(37, decay, delta)
    random = np.random.default_rng(1)
    weights = [random.standard_normal(x.shape) for x in oracle(*given)]
    total = lambda result: sum((w * y).sum() for w, y in zip(weights, result, strict=True))  # noqa: E731
    move = jax.tree.map(lambda x: random.standard_normal(x.shape), given)
    up, down = (
        total(oracle(*jax.tree.map(lambda x, d, s=sign: x + s * 1e-5 * d, given, move)))
        for sign in (1, -1)
    )

    def slope(how, dtype):
        def loss(args):
            qkv, g, beta, state = args
            return total(form(qkv, Gates(g, beta), state, how=how))

        return quick(jax.grad(loss))(cast(given, dtype))

    weights = cast(weights, np.float32)
    narrow = slope("chunked", np.float32)
    with jax.enable_x64(True):
        weights = cast(weights, np.float64)
        wide = {how: slope(how, np.float64) for how in FORMS}
    for grads in wide.values():
        found = sum(
            np.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (grads, move)), strict=True)
        )
        assert abs(found / ((up - down) / 2e-5) - 1) < 1e-7
    leaves = [jax.tree.leaves(tree) for tree in (wide["chunked"], wide["reference"], narrow)]
    close(leaves[0], leaves[1], 1e-11)
    close(leaves[2], leaves[1], 2e-5)


@pytest.mark.parametrize(("decay", "delta"), KINDS)
def test_documents_in_a_row_are_as_if_alone(decay, delta):
    """A start forgets exactly, at any place of a chunk, and whatever the past holds."""
    length = 100
    given = inputs(length, decay, delta)
    starts = np.zeros((B, length), bool)
    starts[0, [0, 3, 64, 65]] = starts[1, [17, 80]] = True
    wanted = oracle(*given, starts=starts)
    for how in FORMS:
        found = run(*given, how=how, starts=starts)
        close(found, wanted, 1e-5)
        (q, k, v), g, beta, state = given
        past = np.arange(length)[None] < np.array([[65], [80]])
        v = np.where(past[..., None, None], 1e4 * v, v)
        other = run((q, k, v), g, beta, state * 1e4, how=how, starts=starts)
        late = ~past
        assert np.array_equal(np.asarray(other[0])[late], np.asarray(found[0])[late])
        assert np.array_equal(other[1], found[1])


@pytest.mark.parametrize(("decay", "delta"), KINDS)
def test_padding_leaves_the_matrix(decay, delta):
    length = 70
    given = inputs(length, decay, delta)
    real = np.arange(length)[None] < np.array([[33], [0]])

    def poison(x):
        if x is None:
            return None
        return np.where(real.reshape(B, length, *[1] * (x.ndim - 2)), x, np.nan)

    for how in FORMS:
        out, state = run(
            tuple(map(poison, given[0])), poison(given[1]), poison(given[2]), given[3],
            how=how, real=real,
        )  # fmt: skip
        wanted = oracle(*given, real=real)
        close([np.asarray(out)[real], state], [wanted[0][real], wanted[1]], 1e-5)
        assert np.array_equal(state[1], given[3][1].astype(np.float32))


@pytest.mark.parametrize("decay", DECAYS[1:])
@pytest.mark.parametrize("delta", [False, True])
def test_strong_decays_over_long_sequences(decay, delta):
    """Sums of 4096 log decays down to -60 each: nothing overflows, and weak ones stay exact."""
    (q, k, v), g, beta, state = inputs(4096, decay, delta)
    random = np.random.default_rng(2)
    g = np.where(random.random(g.shape) < 0.1, -60 * random.random(g.shape), -0.01)
    wanted = oracle((q, k, v), g, beta, state)
    for how in FORMS:
        close(run((q, k, v), g, beta, state, how=how), wanted, 1e-5)

    def total(args):
        qkv, g, beta, state = args
        return form(qkv, Gates(g, beta), state, how="chunked")[0].sum()

    grads = quick(jax.grad(total))(cast(((q, k, v), g, beta, state), np.float32))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))


def test_long_memory_without_decay_does_not_drift():
    given = inputs(4096, "none", True)
    close(run(*given, how="chunked"), oracle(*given), 2e-5)


def test_narrow_inputs_are_summed_wide():
    given = inputs(150, "head", True)
    narrow = jax.tree.map(lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64), given)
    out, state = run(*given, dtype=jnp.bfloat16)
    assert (out.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    wanted = oracle(*narrow)
    close([out], [wanted[0]], 1e-2)
    close([state], [wanted[1]], 1e-4)


def test_a_denominator_is_a_column_of_ones():
    """Weights phi(q) phi(k) over their sum, decayed or not."""
    (q, k, v), g, _, _ = inputs(40, "head", False)
    q, k = np.abs(q), np.abs(k)
    weights = np.einsum("btnm,bsnm->bnts", *(np.repeat(x, N // K, axis=2) for x in (q, k)))
    sums = np.cumsum(g, axis=1).transpose(0, 2, 1)
    weights = weights * np.exp(sums[..., :, None] - sums[..., None, :]) * np.tri(40)
    wanted = np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v)
    q, k, v = cast((q, k, v), np.float32)
    out, _ = linear_attention((q, k, add_ones(v)), gates=Gates(jnp.asarray(g, jnp.float32)))
    close([divide(out, 1e-20)], [wanted], 1e-5)


def test_bad_input():
    (q, k, v), *_ = inputs(3, "none", False)
    q, k, v = cast((q, k, v), np.float32)
    with pytest.raises(ConfigError, match="'chunks' is unknown; did you mean 'chunked'"):
        linear_attention((q, k, v), implementation="chunks")
    with pytest.raises(ShapeError, match="3 heads are no multiple of 2 key heads"):
        linear_attention((q, k, v[:, :, :3]))
