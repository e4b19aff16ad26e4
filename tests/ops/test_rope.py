"""Rotary embedding against float64 formulas."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.config import from_dict, to_dict
from jaxllm.errors import ConfigError, ShapeError
from jaxllm.ops.rope import apply_rope, frequencies, frequencies_at
from jaxllm.spec.ops import Attention
from jaxllm.spec.rope import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    NtkScaling,
    Rope,
    YarnScaling,
)

LLAMA3 = Llama3Scaling(
    factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192
)
ROPES = {
    "plain": Rope(theta=1e4),
    "partial": Rope(theta=1e4, fraction=0.5),
    "interleaved": Rope(theta=5e5, layout="interleaved"),
    "linear": Rope(theta=1e4, scaling=LinearScaling(factor=4.0)),
    "llama3": Rope(theta=5e5, scaling=LLAMA3),
    "ntk": Rope(theta=1e4, scaling=NtkScaling(factor=4.0)),
    "dynamic": Rope(theta=1e4, scaling=DynamicScaling(factor=4.0, original_context=100)),
    "yarn": Rope(theta=1e4, scaling=YarnScaling(factor=8.0, original_context=2048)),
    "yarn_partial": Rope(
        theta=1e4,
        fraction=0.5,
        layout="interleaved",
        scaling=YarnScaling(
            factor=8.0, original_context=256, beta_fast=16.0, truncate=False, attention_factor=1.3
        ),
    ),
    "longrope": Rope(
        theta=1e4,
        fraction=0.25,
        scaling=LongRopeScaling(
            short_factor=(1.0, 1.1, 1.2, 1.3),
            long_factor=(1.0, 2.0, 4.0, 8.0),
            factor=8.0,
            original_context=100,
        ),
    ),
}
BY_LENGTH = ("dynamic", "longrope")
H = 32


def wanted_frequencies(rope, width=H, length=1):
    """One by one, as the papers and Meta's own code write them."""
    dims, out = int(width * rope.fraction), []
    for i in range(dims // 2):
        f = 1.0 / rope.theta ** (2 * i / dims)
        match rope.scaling:
            case NtkScaling(factor=s):
                f = 1.0 / (rope.theta * s ** (dims / (dims - 2))) ** (2 * i / dims)
            case DynamicScaling(factor=s, original_context=c):
                stretch = s * max(length, c) / c - (s - 1)
                f = 1.0 / (rope.theta * stretch ** (dims / (dims - 2))) ** (2 * i / dims)
            case YarnScaling() as s:
                # The pair that turns r times in the original context: C f / 2 pi = r.
                pair = lambda r: (  # noqa: E731
                    dims / 2 * math.log(s.original_context / (2 * math.pi * r), rope.theta)
                )
                low, high = pair(s.beta_fast), pair(s.beta_slow)
                if s.truncate:
                    low, high = math.floor(low), math.ceil(high)
                low, high = max(low, 0), min(high, dims - 1)
                kept = 1 - min(max((i - low) / (high - low), 0), 1)
                f = (1 - kept) * f / s.factor + kept * f
            case LongRopeScaling() as s:
                f /= (s.long_factor if length > s.original_context else s.short_factor)[i]
            case LinearScaling():
                f /= rope.scaling.factor
            case Llama3Scaling() as s:
                wavelength = 2 * math.pi / f
                if wavelength > s.original_context / s.low_freq_factor:
                    f /= s.factor
                elif wavelength >= s.original_context / s.high_freq_factor:
                    smooth = (s.original_context / wavelength - s.low_freq_factor) / (
                        s.high_freq_factor - s.low_freq_factor
                    )
                    f = (1 - smooth) * f / s.factor + smooth * f
        out.append(f)
    return np.array(out)


def magnitude(rope):
    """m of the papers, written out."""
    match rope.scaling:
        case YarnScaling() as s:
            return s.attention_factor or 0.1 * math.log(s.factor) + 1
        case LongRopeScaling() as s:
            return s.attention_factor or math.sqrt(1 + math.log(s.factor, s.original_context))
    return 1.0


def rotated(x, positions, rope, length=1):
    """Pair by pair as complex numbers, in float64."""
    out = np.array(x, np.float64)
    freqs = wanted_frequencies(rope, x.shape[-1], length)
    half = len(freqs)
    for i, f in enumerate(freqs):
        a, b = (i, i + half) if rope.layout == "half" else (2 * i, 2 * i + 1)
        turn = magnitude(rope) * np.exp(1j * positions[:, :, None] * f)
        z = (x[..., a].astype(np.float64) + 1j * x[..., b]) * turn
        out[..., a], out[..., b] = z.real, z.imag
    return out


@pytest.mark.parametrize("name", ROPES)
def test_frequencies(name):
    found = frequencies(ROPES[name], H)
    assert found.dtype == np.float32
    assert np.allclose(found, wanted_frequencies(ROPES[name]), rtol=1e-7)


def test_llama3_scaling_has_all_three_parts():
    plain = frequencies(Rope(theta=5e5), H)
    ratio = plain / frequencies(ROPES["llama3"], H)
    assert ratio[0] == 1
    assert np.isclose(ratio[-1], 32)
    assert ((ratio > 1.01) & (ratio < 31.9)).any()


@pytest.mark.parametrize("length", [100, 101, 700])
@pytest.mark.parametrize("name", BY_LENGTH)
def test_frequencies_of_a_length(name, length):
    rope = ROPES[name]
    found = np.asarray(frequencies_at(rope, H, jnp.array([[length], [7]], jnp.int32)))
    assert found.dtype == np.float32 and found.shape == (2, 1, int(H * rope.fraction) // 2)
    assert np.allclose(found[0, 0], wanted_frequencies(rope, H, length), rtol=1e-6)
    # Within the original context a row has the very table, whatever stands beside it.
    assert np.array_equal(found[1, 0], frequencies(rope, H))
    assert np.array_equal(found[0], found[1]) == (length == 100)


def rotate(x, positions, rope, length):
    lengths = jnp.full((len(x), 1), length, jnp.int32) if rope.follows_length else None
    return apply_rope(jnp.asarray(x), jnp.asarray(positions), rope, lengths=lengths)


@pytest.mark.parametrize("length", [4, 500])
@pytest.mark.parametrize("name", ROPES)
def test_rotation(name, length):
    rope, random = ROPES[name], np.random.default_rng(0)
    x = random.standard_normal((2, 6, 3, H)).astype(np.float32)
    positions = random.integers(0, 500, (2, 6), dtype=np.int32)
    found = rotate(x, positions, rope, length)
    assert np.abs(found - rotated(x, positions, rope, length)).max() < 2e-4
    near = positions % 4
    found = rotate(x, near, rope, length)
    assert np.abs(found - rotated(x, near, rope, length)).max() < 4e-6
    dims = int(H * rope.fraction)
    assert np.array_equal(found[..., dims:], x[..., dims:])


def test_rows_of_a_batch_have_lengths_of_their_own():
    """Of each token, where several documents share a row."""
    x = np.random.default_rng(0).standard_normal((1, 4, 1, H)).astype(np.float32)
    places, lengths = np.array([[0, 1, 2, 3]], np.int32), jnp.array([[5, 300, 5, 300]], jnp.int32)
    for name in BY_LENGTH:
        found = apply_rope(jnp.asarray(x), jnp.asarray(places), ROPES[name], lengths=lengths)
        for t, length in enumerate([5, 300, 5, 300]):
            wanted = rotated(x, places, ROPES[name], length)
            assert np.abs(found - wanted)[0, t].max() < 4e-6


def test_no_length_for_a_rope_that_needs_one():
    x, places = jnp.zeros((1, 1, 1, H)), jnp.zeros((1, 1), jnp.int32)
    with pytest.raises(ShapeError, match="needs the lengths"):
        apply_rope(x, places, ROPES["dynamic"])


@pytest.mark.parametrize("name", ROPES)
def test_json_both_ways(name):
    assert from_dict(Rope, to_dict(ROPES[name])) == ROPES[name]
    assert hash(ROPES[name]) == hash(from_dict(Rope, to_dict(ROPES[name])))


@pytest.mark.parametrize("name", ["plain", "llama3"])
def test_the_far_end_of_a_long_context(name):
    """Angle = position x frequency in float32: two roundings, of 2^-24 each, of up to 131071."""
    x = np.zeros((1, 1, 1, H), np.float32)
    x[..., : H // 2] = 1
    last = np.array([[131071]], np.int32)
    found = np.asarray(apply_rope(jnp.asarray(x), jnp.asarray(last), ROPES[name]))[0, 0, 0]
    wanted = rotated(x, last, ROPES[name])[0, 0, 0]
    angles = 131071 * wanted_frequencies(ROPES[name])
    bound = np.tile(angles * 2.0**-23 + 1e-6, 2)
    assert (np.abs(found - wanted) <= bound).all()


def test_half_precision_is_rotated_in_float32():
    x = np.random.default_rng(0).standard_normal((1, 4, 2, H)).astype(jnp.bfloat16)
    positions = np.arange(4, dtype=np.int32)[None] + 1000
    found = apply_rope(jnp.asarray(x), jnp.asarray(positions), ROPES["plain"])
    assert found.dtype == jnp.bfloat16
    error = np.asarray(found, np.float64) - rotated(x, positions, ROPES["plain"])
    assert np.abs(error).max() < 0.02


def test_scores_depend_on_the_distance_alone():
    random = np.random.default_rng(2)
    q, k = random.standard_normal((2, 1, 1, 1, H)).astype(np.float32)
    at = lambda x, p: apply_rope(  # noqa: E731
        jnp.asarray(x), jnp.full((1, 1), p, jnp.int32), ROPES["interleaved"]
    )
    scores = [float(jnp.sum(at(q, p + 7) * at(k, p))) for p in (0, 5, 90)]
    assert max(scores) - min(scores) < 1e-4
    assert abs(scores[0] - float(jnp.sum(at(q, 3) * at(k, 0)))) > 1e-2


@pytest.mark.parametrize(
    "change",
    [
        {"theta": 0.0},
        {"fraction": 0.0},
        {"fraction": 1.5},
        {"scaling": {"kind": "linear", "factor": 0.5}},
        {"scaling": {"kind": "ntk", "factor": 0.5}},
        {"scaling": {"kind": "dynamic", "factor": 2.0, "original_context": 0}},
        {"scaling": {"kind": "yarn", "factor": float("nan"), "original_context": 8}},
        {"scaling": {"kind": "yarn", "factor": 2.0, "original_context": 8, "beta_slow": 0.0}},
        {"scaling": {"kind": "yarn", "factor": 2.0, "original_context": 8, "beta_fast": 0.5}},
        {"scaling": {"kind": "yarn", "factor": 2.0, "original_context": 8, "mscale": 0.0}},
        {"theta": 1.0, "scaling": {"kind": "yarn", "factor": 2.0, "original_context": 8}},
        {"scaling": to_dict(ROPES["longrope"].scaling) | {"original_context": 1}},
        {"scaling": to_dict(ROPES["longrope"].scaling) | {"long_factor": [1.0, -1.0]}},
        {"scaling": to_dict(ROPES["longrope"].scaling) | {"attention_factor": 0.0}},
    ],
)
def test_wrong_ropes_are_errors(change):
    with pytest.raises(ConfigError, match="rope"):
        from_dict(Rope, change)


def test_an_odd_number_of_rotated_dims_is_an_error():
    with pytest.raises(ConfigError, match="even"):
        Attention(heads=1, kv_heads=1, head_dim=6, rope=Rope(fraction=0.5))


@pytest.mark.parametrize(
    ("head_dim", "name", "said"),
    [
        (16, "longrope", "short_factor of the rope has 4 numbers; 4 rotated dims need 2"),
        (2, "ntk", "ntk rope scaling needs at least 4 rotated dims, found 2"),
        (2, "dynamic", "dynamic rope scaling needs at least 4"),
    ],
)
def test_a_head_that_does_not_fit_the_scaling_is_an_error(head_dim, name, said):
    with pytest.raises(ConfigError, match=said):
        Attention(heads=1, kv_heads=1, head_dim=head_dim, rope=ROPES[name])
