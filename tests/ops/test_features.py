"""Feature maps: formulas, FAVOR+'s accuracy, and that no key is scaled by a later one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.ops.features import FEATURES, favor, l2_normalize, projection
from jaxllm.ops.linear_attention import Gates, add_ones, divide, linear_attention
from tests.contracts.specs import quick

B, T, N, K, H = 1, 128, 2, 1, 16


def draw(scale=1.0, seed=0, length=T):
    random = np.random.default_rng(seed)
    q, k, v = (random.standard_normal((B, length, n, H)) for n in (N, N, N))
    return [x.astype(np.float32) for x in (scale * q, scale * k, v)]


def attend(q, k, v):
    """Causal softmax attention in float64, no scale on the scores."""
    scores = np.einsum("btnh,bsnh->bnts", *(x.astype(np.float64) for x in (q, k)))
    scores = np.where(np.tri(q.shape[1], dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v)


@functools.partial(quick, static_argnames="how")
def performer(q, k, v, weights, starts=None, real=None, state=None, *, how="auto"):
    """(out, (peak, matrix))."""
    peak, matrix = state or (None, None)
    begins = jnp.zeros(q.shape[:2], bool).at[:, 0].set(state is None)
    begins = begins if starts is None else begins | starts
    real = jnp.ones(q.shape[:2], bool) if real is None else real
    found = favor(q, k, weights, before=peak, starts=begins, real=real)
    gates = Gates(found.log_decay, starts=starts, real=real)
    qkv = (found.q, found.k, add_ones(v))
    out, matrix = linear_attention(qkv, gates=gates, state=matrix, implementation=how)
    return divide(out, 1e-20), (found.peak, matrix)


@pytest.mark.parametrize("name", FEATURES)
def test_formulas(name):
    x = np.linspace(-3, 3, 24).reshape(2, 12)
    shifted = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    wanted = {
        "identity": x,
        "elu1": np.where(x > 0, x + 1, np.exp(x)),
        "relu": np.maximum(x, 0),
        "softmax": shifted,
    }[name]
    assert np.abs(FEATURES[name](jnp.asarray(x, jnp.float32)) - wanted).max() < 1e-6
    slope = jax.grad(lambda x: FEATURES[name](x).sum())(jnp.asarray([-200.0, -1.0, 1.0, 200.0]))
    assert np.isfinite(slope).all()


def test_l2():
    x = draw()[0]
    wanted = x / np.sqrt((x.astype(np.float64) ** 2).sum(-1, keepdims=True) + 1e-2)
    assert np.abs(l2_normalize(jnp.asarray(x), 1e-2) - wanted).max() < 1e-6
    zero = jnp.zeros((1, 4), jnp.bfloat16)
    assert l2_normalize(zero, 1e-6).dtype == jnp.bfloat16
    assert np.isfinite(jax.grad(lambda x: l2_normalize(x, 1e-6).sum())(jnp.zeros(4))).all()


def test_rows_of_the_projection_are_orthogonal_within_a_block():
    w = projection(40, 16, 3).astype(np.float64)
    assert w.shape == (40, 16)
    gram = (w / np.linalg.norm(w, axis=1, keepdims=True)) @ (
        w / np.linalg.norm(w, axis=1)[:, None]
    ).T
    for first in (0, 16, 32):
        part = gram[first : first + 16, first : first + 16]
        assert np.abs(part - np.eye(len(part))).max() < 1e-6
    lengths = np.linalg.norm(projection(4096, 16, 0), axis=1)
    assert abs((lengths**2).mean() / 16 - 1) < 0.02
    assert abs(lengths.std() - 0.7) < 0.05  # of a chi distribution of 16 dims
    assert (projection(40, 16, 4) != projection(40, 16, 3).astype(np.float32)).any()


def test_the_error_falls_as_one_over_the_root_of_the_features():
    """With q, k x 0.5 (and H^-1/4), as unit normal ones are beyond any number of features."""
    errors = []
    for features in (64, 256, 1024):
        squares = []
        for seed in range(4):
            q, k, v = draw(scale=0.5 * H**-0.25, seed=seed)
            wanted = attend(q, k, v)
            found, _ = performer(q, k, v, projection(features, H, seed))
            squares.append(((found - wanted) ** 2).sum() / (wanted**2).sum())
        errors.append(np.sqrt(np.mean(squares)))
    slopes = np.diff(np.log(errors)) / np.log(4)
    print(errors, slopes)
    assert (np.abs(slopes + 0.5) < 0.15).all()
    assert errors[-1] < 0.1


@pytest.mark.parametrize("how", ["reference", "chunked"])
def test_the_future_does_not_reach_the_past(how):
    """Later keys far greater than all before: earlier outputs stay, bit for bit."""
    q, k, v = draw()
    weights = projection(32, H, 0)
    first, _ = performer(q, k, v, weights, how=how)
    late = (np.arange(T) >= 100)[:, None, None]
    others = (np.where(late, s * x, x) for x, s in ((q, 2), (k, 8), (v, -1)))
    other, _ = performer(*others, weights, how=how)
    assert np.array_equal(other[:, :100], first[:, :100])
    assert np.abs(other[:, 100:] - first[:, 100:]).max() > 0.1


def test_the_scale_of_features_cancels():
    """Growing keys, whose features span e^60: as without any scaling in float64."""
    q, k, v = draw()
    k = k * np.linspace(0.2, 4, T, dtype=np.float32)[:, None, None]
    w = projection(24, H, 1).astype(np.float64)
    q64, k64 = (x.astype(np.float64) for x in (q, k))
    of_q, of_k = (np.exp(x @ w.T - 0.5 * (x**2).sum(-1, keepdims=True)) for x in (q64, k64))
    weights = np.einsum("btnm,bsnm->bnts", of_q, of_k) * np.tri(T)
    wanted = np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v)
    for how in ("reference", "chunked"):
        found, _ = performer(q, k, v, projection(24, H, 1), how=how)
        assert np.abs(found - wanted).max() < 1e-4


def test_prefill_goes_on_from_the_state():
    """In pieces, with padding, and from a start within: as in one piece."""
    q, k, v = draw(length=40)
    weights = projection(24, H, 0)
    wanted, (peak, matrix) = performer(q, k, v, weights)
    state, found = None, []
    for first, size in ((0, 17), (17, 1), (18, 22)):
        piece = [np.pad(x[:, first : first + size], ((0, 0), (0, 3), (0, 0), (0, 0)),
                        constant_values=50.0) for x in (q, k, v)]  # fmt: skip
        real = (np.arange(size + 3) < size)[None]
        out, state = performer(*piece, weights, real=real, state=state)
        found.append(out[:, :size])
    assert np.abs(np.concatenate(found, axis=1) - wanted).max() < 1e-5
    assert np.abs(state[0] - peak).max() < 1e-6
    assert np.abs(state[1] - matrix).max() < 1e-5 * np.abs(matrix).max()
    starts = np.zeros((1, 40), bool)
    starts[:, 25] = True
    out, _ = performer(q, 10 * k * (np.arange(40) < 25)[:, None, None] + k, v, weights, starts)
    alone, _ = performer(*(x[:, 25:] for x in (q, k, v)), weights)
    assert np.abs(out[:, 25:] - alone).max() < 1e-5


def test_gradients_are_finite_and_right():
    q, k, v = draw(length=20)
    weights, move = projection(24, H, 0), draw(seed=5, length=20)

    def total(qkv, s):
        qkv = tuple(x + s * jnp.asarray(d, x.dtype) for x, d in zip(qkv, move, strict=True))
        return (performer.__wrapped__(*qkv, weights)[0] ** 2).sum()

    grads = quick(jax.grad(total))((q, k, v), np.float32(0))
    with jax.enable_x64(True):
        run, wide = quick(total), tuple(x.astype(np.float64) for x in (q, k, v))
        slope = float((run(wide, np.float64(1e-6)) - run(wide, np.float64(-1e-6))) / 2e-6)
    found = sum(float(np.vdot(g, d)) for g, d in zip(grads, move, strict=True))
    assert abs(found / slope - 1) < 1e-4
