"""Rotary embedding against float64 formulas."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.errors import ConfigError
from jaxllm.ops.rope import apply_rope, frequencies
from jaxllm.spec.ops import Attention
from jaxllm.spec.rope import LinearScaling, Llama3Scaling, Rope

LLAMA3 = Llama3Scaling(
    factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192
)
ROPES = {
    "plain": Rope(theta=1e4),
    "partial": Rope(theta=1e4, fraction=0.5),
    "interleaved": Rope(theta=5e5, layout="interleaved"),
    "linear": Rope(theta=1e4, scaling=LinearScaling(factor=4.0)),
    "llama3": Rope(theta=5e5, scaling=LLAMA3),
}
H = 32


def wanted_frequencies(rope, width=H):
    """One by one, as the papers and Meta's own code write them."""
    dims, out = int(width * rope.fraction), []
    for i in range(dims // 2):
        f = 1.0 / rope.theta ** (2 * i / dims)
        match rope.scaling:
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


def rotated(x, positions, rope):
    """Pair by pair as complex numbers, in float64."""
    out = np.array(x, np.float64)
    freqs = wanted_frequencies(rope, x.shape[-1])
    half = len(freqs)
    for i, f in enumerate(freqs):
        a, b = (i, i + half) if rope.layout == "half" else (2 * i, 2 * i + 1)
        turn = np.exp(1j * positions[:, :, None] * f)
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


@pytest.mark.parametrize("name", ROPES)
def test_rotation(name):
    random = np.random.default_rng(0)
    x = random.standard_normal((2, 6, 3, H)).astype(np.float32)
    positions = random.integers(0, 500, (2, 6), dtype=np.int32)
    found = apply_rope(jnp.asarray(x), jnp.asarray(positions), ROPES[name])
    assert np.abs(found - rotated(x, positions, ROPES[name])).max() < 2e-4
    near = positions % 4
    found = apply_rope(jnp.asarray(x), jnp.asarray(near), ROPES[name])
    assert np.abs(found - rotated(x, near, ROPES[name])).max() < 3e-6
    dims = int(H * ROPES[name].fraction)
    assert np.array_equal(found[..., dims:], x[..., dims:])


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
    ],
)
def test_wrong_ropes_are_errors(change):
    from jaxllm.core.config import from_dict

    with pytest.raises(ConfigError, match="rope"):
        from_dict(Rope, change)


def test_an_odd_number_of_rotated_dims_is_an_error():
    with pytest.raises(ConfigError, match="even"):
        Attention(heads=1, kv_heads=1, head_dim=6, rope=Rope(fraction=0.5))
