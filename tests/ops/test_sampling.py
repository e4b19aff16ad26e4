"""Sampling against an oracle that sorts, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.ops import sampling
from jaxllm.ops.sampling import History, SamplingRows, penalize, remember, sample

V = 24
SAMPLE = jax.jit(sample)
PENALIZE = jax.jit(penalize)
ONE = {
    "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0,
    "typical": 1.0, "repetition": 1.0, "presence": 0.0, "frequency": 0.0, "seed": 0,
}  # fmt: skip
DTYPES = {"top_k": np.int32, "seed": np.uint32}


def rows(batch=1, **options):
    """Options of a batch; a sequence gives each row its own."""
    full = {
        name: np.broadcast_to(np.asarray(value, DTYPES.get(name, np.float32)), (batch,)).copy()
        for name, value in (ONE | options).items()
    }
    return SamplingRows(**full)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def oracle(logits, temperature, top_k, top_p, min_p, slack=0.0):
    """Tokens that may be drawn; ties at a threshold are all kept.

    `slack` widens (> 0) or narrows (< 0) the cuts of mass by as much as float32 sums may err.
    """
    x = (np.asarray(logits, np.float32) / np.float32(temperature)).astype(np.float64)
    x[np.abs(x) < np.finfo(np.float32).tiny] = 0  # XLA's CPU flushes subnormal numbers
    keep = np.ones(len(x), bool)
    if 0 < top_k < len(x):
        keep = x >= np.sort(x)[::-1][top_k - 1]
    if top_p < 1:
        p = softmax(np.where(keep, x, -np.inf))
        order = np.argsort(-x, kind="stable")
        mass = np.cumsum(p[order])
        count = np.flatnonzero(mass >= min(top_p + slack, mass[-1]))[0]
        keep &= x >= x[order[count]]
    if min_p > 0:
        p = softmax(np.where(keep, x, -np.inf))
        keep &= p >= min_p * (1 - np.sign(slack) * 1e-4) * p.max()
    return keep & np.isfinite(x)


@functools.cache
def survivors():
    """What is left after the cuts: seen where a token's noise is without bound."""

    def run(logits, options):
        warm = jnp.where(options.temperature > 0, options.temperature, 1.0)[:, None]
        return jnp.isfinite(sampling._cut(logits / warm, options))

    return jax.jit(run)


LOGITS = st.lists(
    st.one_of(
        st.floats(-30, 30, width=32),
        st.sampled_from([0.0, -0.0, 1.0, 1.0, 2.0, -2.0, float("-inf")]),
    ),
    min_size=V, max_size=V,
).filter(lambda x: max(x) > float("-inf"))  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    logits=LOGITS,
    temperature=st.sampled_from([0.01, 0.3, 1.0, 2.5, 100.0]),
    top_k=st.sampled_from([0, 1, 2, 5, V - 1, V, V + 1, 2**31 - 1]),
    top_p=st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 0.99]),
)
def test_cuts_against_the_sort(logits, temperature, top_k, top_p, min_p):
    logits = np.array(logits, np.float32)
    given_rows = rows(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    found = np.asarray(survivors()(jnp.asarray(logits)[None], given_rows))[0]
    cuts = (temperature, top_k, top_p, min_p)
    # The kept set lies between the oracle's with the sums of mass a little less and a little more.
    least, most = (oracle(logits, *cuts, slack=s) for s in (-1e-5, 1e-5))
    assert (found | ~(least & most)).all()
    assert (~found | (least | most)).all()
    assert found[logits.argmax()]


@pytest.mark.parametrize(
    ("cut", "kept"),
    [
        ({"top_k": 1}, 1),
        ({"top_k": 2}, 3),  # two share the second place
        ({"top_k": 4}, 4),
        ({"top_p": 0.01}, 1),
        ({"top_p": 0.65}, 3),
        ({"min_p": 0.5}, 1),
        ({"min_p": 0.3}, 3),
        ({"top_k": 3, "min_p": 0.01}, 3),
        # Entropy 2.09; surprises are .92, 1.90 twice, 2.30 and 4.61.
        ({"typical": 0.25}, 2),
        ({"typical": 0.35}, 3),
        ({"typical": 0.5}, 4),
        ({"typical": 0.9}, V),
        ({}, V),
    ],
)
def test_cuts_by_hand(cut, kept):
    """Masses .4, .15, .15, .1 and 20 x .01."""
    p = np.array([0.4, 0.15, 0.15, 0.1] + [0.01] * (V - 4))
    found = survivors()(jnp.asarray(np.log(p), jnp.float32)[None], rows(**cut))
    assert int(found.sum()) == kept


def draws(logits, count=20_000, **options):
    """Tokens of many positions of one request, a batch of 2,000 at a time."""
    block = 2000
    given_rows = rows(block, **options)
    wide = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (block, len(logits)))
    out = []
    for start in range(0, count, block):
        positions = jnp.arange(start, start + block, dtype=jnp.int32)
        out.append(np.asarray(SAMPLE(wide, given_rows, positions)))
    return np.concatenate(out)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5, "seed": 7},
        {"temperature": 2.0, "top_k": 6},
        {"top_p": 0.8, "seed": 2**32 - 1},
        {"min_p": 0.1},
    ],
)
def test_distribution(options):
    """Chi-square over 20,000 draws against the cut and renormalised probabilities."""
    logits = np.random.default_rng(0).standard_normal(V) * 1.5
    cuts = {k: v for k, v in (ONE | options).items() if k in ("top_k", "top_p", "min_p")}
    temperature = options.get("temperature", 1.0)
    keep = oracle(logits, temperature, **cuts)
    p = softmax(np.where(keep, logits / temperature, -np.inf))
    found = draws(logits, **options)
    assert keep[found].all()
    counts = np.bincount(found, minlength=V)[keep]
    wanted = p[keep] * len(found)
    chi, free = ((counts - wanted) ** 2 / wanted).sum(), keep.sum() - 1
    assert free >= 3
    assert chi < free + 5 * np.sqrt(2 * free)  # five standard deviations above the mean
    again = draws(logits, **(options | {"seed": 12345}))
    assert (again != found).mean() > 0.2


def test_a_draw_depends_on_seed_and_position_alone():
    """Whatever else is in the batch, wherever the row stands in it."""
    random = np.random.default_rng(0)
    logits = random.standard_normal((8, V)).astype(np.float32)
    seeds, positions = np.arange(8, dtype=np.uint32) % 3, np.arange(8, dtype=np.int32) + 5
    temperature = np.linspace(0.5, 2, 8)
    whole = SAMPLE(logits, rows(8, seed=seeds, temperature=temperature), positions)
    turn = random.permutation(8)
    for order in (turn, turn[:3], turn[5:6]):
        part = rows(len(order), seed=seeds[order], temperature=temperature[order])
        found = SAMPLE(jnp.asarray(logits[order]), part, jnp.asarray(positions[order]))
        assert np.array_equal(found, np.asarray(whole)[order])


def test_neighbouring_seeds_and_positions_are_independent():
    flat = np.zeros((4096, V), np.float32)
    at = np.arange(4096, dtype=np.int32)
    by_position = SAMPLE(flat, rows(4096, seed=1), at)
    by_seed = SAMPLE(flat, rows(4096, seed=at), np.ones(4096, np.int32))
    for tokens in (np.asarray(by_position), np.asarray(by_seed)):
        counts = np.bincount(tokens, minlength=V)
        assert ((counts - 4096 / V) ** 2 / (4096 / V)).sum() < V + 5 * np.sqrt(2 * V)
        assert abs((tokens[1:] == tokens[:-1]).mean() - 1 / V) < 0.02


def test_temperature_zero_is_greedy():
    logits = np.random.default_rng(0).standard_normal((64, V)).astype(np.float32)
    logits[0] = 0
    at = np.arange(64, dtype=np.int32)
    mixed = np.where(at % 2 == 0, 0.0, 5.0)
    found = np.asarray(SAMPLE(logits, rows(64, temperature=mixed, seed=at), at))
    assert found[0] == 0
    assert np.array_equal(found[::2], logits.argmax(-1)[::2])
    assert not np.array_equal(found[1::2], logits.argmax(-1)[1::2])


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-37, 2e-38, 1e-44])
def test_tiny_temperatures_are_greedy_too(temperature):
    """logits / 1e-37 overflows float32: it must not turn into NaN and token 0."""
    logits = np.random.default_rng(0).standard_normal((16, V)).astype(np.float32) * 20
    logits[:, 0] = -np.inf
    for cut in ({}, {"top_k": 5, "top_p": 0.9, "min_p": 0.1}):
        options = rows(16, temperature=temperature, seed=np.arange(16), **cut)
        found = SAMPLE(logits, options, np.arange(16, dtype=np.int32))
        assert np.array_equal(found, logits.argmax(-1))


def test_forbidden_tokens_are_never_drawn():
    logits = np.full(V, -np.inf)
    logits[[3, 5]] = 0
    assert set(draws(logits, count=2000, temperature=100.0)) == {3, 5}


def test_penalties_against_the_loop():
    random = np.random.default_rng(0)
    batch = 6
    logits = (3 * random.standard_normal((batch, V))).astype(np.float32)
    logits[:, 1] = -np.inf
    prompt = random.random((batch, V)) < 0.3
    answer = random.integers(0, 4, (batch, V), dtype=np.int32)
    options = {
        "repetition": [1.0, 1.3, 0.5, 100.0, 1.0, 1.1],
        "presence": [0.0, 0.0, 2.0, -2.0, 1.5, 0.7],
        "frequency": [0.0, 0.0, -0.5, 2.0, 0.25, -2.0],
    }
    found = np.asarray(PENALIZE(logits, rows(batch, **options), History(prompt, answer)))
    for row, token in np.ndindex(batch, V):
        wanted, count = float(logits[row, token]), int(answer[row, token])
        if prompt[row, token] or count:
            factor = options["repetition"][row]
            wanted = wanted / factor if wanted > 0 else wanted * factor
        wanted -= options["presence"][row] * (count > 0) + options["frequency"][row] * count
        assert found[row, token] == pytest.approx(wanted, rel=1e-5, abs=1e-5)
    assert np.array_equal(found[0], logits[0])


def test_remember_counts_answers():
    history = History(jnp.zeros((3, V), bool), jnp.zeros((3, V), jnp.int32))
    for tokens in ([1, 2, 3], [1, 5, 3], [1, 0, 0]):
        history = remember(history, jnp.array(tokens, jnp.int32))
    assert not history.prompt.any()
    assert int(history.answer.sum()) == 9
    assert [int(history.answer[0, 1]), int(history.answer[1, 2]), int(history.answer[2, 3])] == [
        3,
        1,
        2,
    ]
