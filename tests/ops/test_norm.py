"""Norms and activations against float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.config import nearest
from jaxllm.ops.activation import ACTIVATIONS, activation
from jaxllm.ops.norm import layer_norm, rms_norm

random = np.random.default_rng(0)
X = (5 + 3 * random.standard_normal((2, 3, 32))).astype(np.float32)
SCALE, BIAS = random.standard_normal((2, 32)).astype(np.float32)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_rms_norm(offset, eps):
    x = X.astype(np.float64)
    wanted = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * (SCALE + offset)
    found = rms_norm(jnp.asarray(X), jnp.asarray(SCALE), eps=eps, offset=offset)
    assert np.abs(found - wanted).max() < 3e-6


@pytest.mark.parametrize("bias", [None, BIAS])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_layer_norm(bias, offset):
    x = X.astype(np.float64)
    x = x - x.mean(-1, keepdims=True)
    wanted = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * (SCALE + offset)
    wanted = wanted + (0 if bias is None else bias)
    given = None if bias is None else jnp.asarray(bias)
    found = layer_norm(jnp.asarray(X), jnp.asarray(SCALE), given, eps=1e-5, offset=offset)
    assert np.abs(found - wanted).max() < 5e-6


def test_variance_does_not_cancel():
    """Far from zero, mean of squares minus square of the mean would be noise."""
    x = (1e4 + X).astype(np.float32)
    wide = x.astype(np.float64)
    wanted = (wide - wide.mean(-1, keepdims=True)) / wide.std(-1, keepdims=True)
    found = layer_norm(jnp.asarray(x), jnp.ones(32), None, eps=1e-9)
    assert np.abs(found - wanted).max() < 5e-3


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_statistics_are_float32(norm):
    x = jnp.asarray(1000 * X, jnp.bfloat16)
    scale = jnp.asarray(SCALE, jnp.bfloat16)
    wide = x.astype(jnp.float32)
    if norm == "rms":
        found, wanted = (rms_norm(a, scale, eps=1e-5) for a in (x, wide))
    else:
        found, wanted = (layer_norm(a, scale, scale, eps=1e-5) for a in (x, wide))
    assert found.dtype == jnp.bfloat16
    assert np.array_equal(found, wanted.astype(jnp.bfloat16))


def test_rows_of_zeros_stay_finite():
    zero = jnp.zeros((1, 32))
    for grad in (
        jax.grad(lambda x: rms_norm(x, jnp.ones(32), eps=1e-6).sum())(zero),
        jax.grad(lambda x: layer_norm(x, jnp.ones(32), None, eps=1e-6).sum())(zero),
    ):
        assert np.isfinite(grad).all()


FORMULAS = {
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: (
        0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    ),
    "relu": lambda x: max(x, 0.0),
    "relu2": lambda x: max(x, 0.0) ** 2,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    x = np.linspace(-4, 4, 41, dtype=np.float32)
    wanted = np.array([FORMULAS[name](float(v)) for v in x])
    assert np.abs(activation(name, jnp.asarray(x)) - wanted).max() < 2e-6


def test_the_spec_knows_the_same_activations():
    from typing import get_args

    from jaxllm.spec.ops import Activation

    assert set(get_args(Activation)) == set(ACTIVATIONS) == set(FORMULAS)
    assert "did you mean 'gelu'" in nearest("gleu", ACTIVATIONS)
