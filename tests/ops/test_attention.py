"""Reference attention against a plain float64 oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.errors import ShapeError
from jaxllm.ops.attention import Scores, attention, reference
from jaxllm.ops.mask import Visibility, visible
from jaxllm.spec.mask import And, Causal, Chunk, Full, Or, Window, allowed

MASKS = {
    "causal": Causal(),
    "full": Full(),
    "window": Window(left=2, right=1),
    "local": And(first=Causal(), second=Window(left=3)),
    "chunk": And(first=Causal(), second=Chunk(size=3)),
    "either": Or(first=Window(left=1, right=1), second=And(first=Causal(), second=Causal())),
}
B, T, S, N, K, H = 3, 5, 8, 4, 2, 6


def inputs(heads=N, kv_heads=K, keys=S, dtype=np.float32):
    random = np.random.default_rng(0)
    shapes = ((B, T, heads, H), (B, keys, kv_heads, H), (B, keys, kv_heads, H))
    return [random.standard_normal(s).astype(dtype) for s in shapes]


def seen_by(mask, **changes):
    """Queries at the end of their rows, which are ragged: 8, 6 and 5 keys are filled."""
    ends = np.array([8, 6, 5], np.int32)
    query = ends[:, None] - T + np.arange(T, dtype=np.int32)
    keys = np.broadcast_to(np.arange(S, dtype=np.int32), (B, S))
    fields = {"key_lengths": jnp.asarray(ends), "mask": mask} | changes
    return Visibility(jnp.asarray(query), jnp.asarray(keys), **fields)


def oracle(q, k, v, seen, scale, *, softcap=None, sinks=None):
    """Row by row in float64; a row that sees nothing gives zeros; `seen` may be by head."""
    seen = np.broadcast_to(
        seen[:, None] if seen.ndim == 3 else seen, (*seen.shape[:1], q.shape[2], *seen.shape[-2:])
    )
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape[:-1] + v.shape[-1:])
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            for n in np.flatnonzero(seen[b, :, t].any(-1)):
                rows = np.flatnonzero(seen[b, n, t])
                head = n * k.shape[2] // q.shape[2]
                scores = scale * k[b, rows, head] @ q[b, t, n]
                if softcap is not None:
                    scores = softcap * np.tanh(scores / softcap)
                weights = np.exp(scores - scores.max())
                total = weights.sum()
                if sinks is not None:
                    total += np.exp(sinks[n] - scores.max())
                out[b, t, n] = weights @ v[b, rows, head] / total
    return out


def brute_visible(see):
    """Pair by pair."""
    query, key = np.asarray(see.query_positions), np.asarray(see.key_positions)
    out = np.zeros((B, query.shape[1], key.shape[1]), bool)
    for b, t, s in np.ndindex(out.shape):
        fine = bool(allowed(see.mask, query[b, t], key[b, s]))
        if see.query_segments is not None:
            fine &= see.query_segments[b, t] == see.key_segments[b, s]
        if see.key_lengths is not None:
            fine &= s < see.key_lengths[b]
        out[b, t, s] = fine
    return out


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_value_against_the_oracle(mask, heads, kv_heads):
    q, k, v = inputs(heads, kv_heads)
    see = seen_by(MASKS[mask])
    seen = brute_visible(see)
    assert np.array_equal(visible(see)[:, 0], seen)
    found = reference(*map(jnp.asarray, (q, k, v)), see, scores=Scores(scale=0.7))
    assert np.abs(found - oracle(q, k, v, seen, 0.7)).max() < 2e-6


@pytest.mark.parametrize("mask", ["causal", "window"])
def test_gradient_against_differences_of_the_oracle(mask):
    arrays = inputs()
    see = seen_by(MASKS[mask])
    seen = brute_visible(see)
    random = np.random.default_rng(1)
    weight = random.standard_normal((B, T, N, H))

    def total(q, k, v):
        return jnp.sum(
            reference(q, k, v, see, scores=Scores(scale=0.7)) * weight.astype(np.float32)
        )

    grads = jax.grad(total, (0, 1, 2))(*map(jnp.asarray, arrays))
    for place, grad in enumerate(grads):
        direction = random.standard_normal(arrays[place].shape)
        ends = []
        for sign in (1, -1):
            moved = [np.asarray(a, np.float64) for a in arrays]
            moved[place] = moved[place] + sign * 1e-5 * direction
            ends.append((oracle(*moved, seen, 0.7) * weight).sum())
        slope = (ends[0] - ends[1]) / 2e-5
        assert abs(np.vdot(np.asarray(grad, np.float64), direction) - slope) < 1e-4 * abs(slope)


@pytest.mark.parametrize(("softcap", "sink"), [(1.5, None), (None, 0.3), (1.5, 0.3), (None, 60.0)])
def test_softcap_and_sinks_in_value_and_gradient(softcap, sink):
    arrays = inputs()
    see = seen_by(MASKS["local"])
    seen = brute_visible(see)
    sinks = None if sink is None else sink + np.arange(N) / 3
    random = np.random.default_rng(1)
    weight = random.standard_normal((B, T, N, H))

    def run(q, k, v, sinks):
        scores = Scores(scale=0.7, softcap=softcap, sinks=sinks)
        return reference(q, k, v, see, scores=scores)

    narrow = None if sinks is None else jnp.asarray(sinks, jnp.float32)
    args = (*map(jnp.asarray, arrays), narrow)
    want = oracle(*arrays, seen, 0.7, softcap=softcap, sinks=sinks)
    assert np.abs(run(*args) - want).max() < 2e-6
    places = (0, 1, 2) if sinks is None else (0, 1, 2, 3)
    grads = jax.grad(lambda *a: jnp.sum(run(*a) * weight.astype(np.float32)), places)(*args)
    for place, grad in zip(places, grads, strict=True):
        direction = random.standard_normal(args[place].shape)
        ends = []
        for sign in (1, -1):
            moved = [np.asarray(a, np.float64) for a in args if a is not None]
            moved[place] = moved[place] + sign * 1e-5 * direction
            end = moved[3] if sinks is not None else None
            found = oracle(*moved[:3], seen, 0.7, softcap=softcap, sinks=end)
            ends.append((found * weight).sum())
        slope = (ends[0] - ends[1]) / 2e-5
        error = abs(np.vdot(np.asarray(grad, np.float64), direction) - slope)
        assert error < 1e-4 * abs(slope) + 1e-6


def test_rows_that_see_nothing_give_zeros_and_no_gradient():
    q, k, v = map(jnp.asarray, inputs())
    see = seen_by(Causal(), key_lengths=jnp.array([8, 0, 5], jnp.int32))

    def run(q, k, v):
        return reference(q, k, v, see, scores=Scores(scale=1.0))

    out, pull = jax.vjp(run, q, k, v)
    assert np.isfinite(out).all()
    assert np.array_equal(out[1], np.zeros_like(out[1]))
    for grad in pull(jnp.ones_like(out)):
        assert np.isfinite(grad).all()
        assert np.array_equal(grad[1], np.zeros_like(grad[1]))


def test_segments_see_themselves_only():
    q, k, v = inputs(keys=T)
    places = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    ids = jnp.asarray([[1, 1, 2, 2, 2], [1, 2, 3, 4, 5], [1, 1, 1, 1, 0]], jnp.int32)
    see = Visibility(places, places, ids, ids, aligned=True)
    seen = brute_visible(see)
    assert np.array_equal(visible(see)[:, 0], seen)
    assert (seen.sum(-1)[1] == 1).all()
    found = reference(*map(jnp.asarray, (q, k, v)), see, scores=Scores(scale=1.0))
    assert np.abs(found - oracle(q, k, v, seen, 1.0)).max() < 2e-6


@pytest.mark.parametrize("which", ["k", "v"])
def test_poison_in_keys_that_nobody_sees_does_not_leak(which):
    """0 x NaN is NaN: a mask on the weights alone is not enough."""
    q, k, v = inputs()
    see = seen_by(MASKS["local"])
    unseen = ~brute_visible(see).any(1)
    assert unseen[1:].any(1).all()
    wanted = oracle(q, k, v, brute_visible(see), 1.0)
    {"k": k, "v": v}[which][unseen] = np.nan
    found = reference(*map(jnp.asarray, (q, k, v)), see, scores=Scores(scale=1.0))
    assert np.abs(found - wanted).max() < 2e-6


def test_large_scores_do_not_overflow():
    q, k, v = inputs()
    see = seen_by(Causal())
    found = reference(*map(jnp.asarray, (1e4 * q, 1e4 * k, v)), see, scores=Scores(scale=1.0))
    assert np.abs(found - oracle(1e4 * q, 1e4 * k, v, brute_visible(see), 1.0)).max() < 1e-5


def test_low_precision_keeps_statistics_wide():
    q, k, v = inputs(dtype=jnp.bfloat16)
    see = seen_by(Causal())
    found = reference(*map(jnp.asarray, (q, k, v)), see, scores=Scores(scale=0.7))
    assert found.dtype == jnp.bfloat16
    wanted = oracle(q, k, v, brute_visible(see), 0.7)
    assert np.abs(np.asarray(found, np.float64) - wanted).max() < 0.02


def test_auto_says_once_what_it_took(caplog, monkeypatch):
    from jaxllm.core import logging

    monkeypatch.setattr(logging, "_seen", set())
    q, k, v = map(jnp.asarray, inputs())
    with caplog.at_level("INFO", logger="jaxllm"):
        for _ in range(2):
            attention(q, k, v, seen_by(Causal()), scores=Scores(scale=1.0))
    assert [r.getMessage().split(" (")[0] for r in caplog.records] == ["attention: reference"]


def test_shapes_that_do_not_fit_are_errors():
    q, k, v = map(jnp.asarray, inputs(heads=4, kv_heads=3))
    with pytest.raises(ShapeError, match="attention"):
        attention(q, k, v, seen_by(Causal()), scores=Scores(scale=1.0))
