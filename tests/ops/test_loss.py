"""Chunked cross-entropy against a float64 reference in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.ops.loss import LossOptions, cross_entropy

B, T, D, V = 2, 13, 8, 37


def unembed(head, hidden):
    logits = jnp.einsum("BTD,DV->BTV", hidden, head["kernel"], precision="highest")
    return 5.0 * jnp.tanh(logits / 5.0)


def draw(seed=0):
    random = np.random.default_rng(seed)
    hidden, kernel = random.standard_normal((B, T, D)), random.standard_normal((D, V))
    targets = random.integers(0, V, (B, T))
    weights = random.random((B, T)) * (random.random((B, T)) > 0.3)
    return hidden, kernel, targets, weights


def oracle(hidden, kernel, targets, weights, smoothing, z):
    """Value and gradients in float64, everything written out."""
    raw = hidden.reshape(-1, D) @ kernel
    logits = 5 * np.tanh(raw / 5)
    peak = logits.max(-1, keepdims=True)
    total = (peak + np.log(np.exp(logits - peak).sum(-1, keepdims=True)))[:, 0]
    y, w = targets.reshape(-1), weights.reshape(-1)
    wanted = np.full(logits.shape, smoothing / V)
    wanted[np.arange(len(y)), y] += 1 - smoothing
    loss = (w * (total - (wanted * logits).sum(-1) + z * total**2)).sum()
    p = np.exp(logits - total[:, None])
    d = w[:, None] * (p - wanted + 2 * z * total[:, None] * p) * (1 - (logits / 5) ** 2)
    nll = (w * (total - logits[np.arange(len(y)), y])).sum()
    return loss, nll, (d @ kernel.T).reshape(hidden.shape), hidden.reshape(-1, D).T @ d


@pytest.mark.parametrize("chunk", [1, 5, 26, 1000])
@pytest.mark.parametrize(("smoothing", "z"), [(0.0, 0.0), (0.1, 0.0), (0.1, 1e-2)])
def test_value_and_gradient(chunk, smoothing, z):
    hidden, kernel, targets, weights = draw()
    options = LossOptions(label_smoothing=smoothing, z_loss=z, chunk_tokens=chunk)

    def mean(head, hidden):
        sums = cross_entropy(
            unembed,
            head,
            hidden,
            jnp.asarray(targets, jnp.int32),
            jnp.asarray(weights, jnp.float32),
            options=options,
        )
        return sums.loss / sums.weight, sums

    narrow = ({"kernel": jnp.asarray(kernel, jnp.float32)}, jnp.asarray(hidden, jnp.float32))
    (value, sums), (d_head, d_hidden) = jax.jit(
        jax.value_and_grad(mean, argnums=(0, 1), has_aux=True)
    )(*narrow)
    loss, nll, want_hidden, want_kernel = oracle(hidden, kernel, targets, weights, smoothing, z)
    total = weights.sum()
    np.testing.assert_allclose(value, loss / total, rtol=2e-6)
    np.testing.assert_allclose(sums.nll, nll, rtol=2e-6)
    np.testing.assert_allclose(d_hidden, want_hidden / total, atol=3e-7)
    np.testing.assert_allclose(d_head["kernel"], want_kernel / total, atol=2e-6)
    plain, _ = jax.jit(mean)(*narrow)
    np.testing.assert_allclose(plain, value, rtol=1e-6)


def test_tokens_of_weight_zero_do_not_count():
    hidden, kernel, targets, weights = draw()
    head = {"kernel": jnp.asarray(kernel, jnp.float32)}

    def run(targets):
        return cross_entropy(
            unembed,
            head,
            jnp.asarray(hidden, jnp.float32),
            jnp.asarray(targets, jnp.int32),
            jnp.asarray(weights, jnp.float32),
        )

    other = np.where(weights == 0, (targets + 1) % V, targets)
    assert float(run(targets).loss) == float(run(other).loss)
    assert (weights == 0).any()


def test_memory_does_not_grow_with_tokens_times_vocabulary():
    """Temporaries of value and gradient stay far below one array of all logits."""
    tokens, vocab = 4096, 8192
    head = {"kernel": jax.ShapeDtypeStruct((D, vocab), jnp.float32)}
    rows = jax.ShapeDtypeStruct((1, tokens, D), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    weights = jax.ShapeDtypeStruct((1, tokens), jnp.float32)
    options = LossOptions(chunk_tokens=128)

    def mean(head, hidden, targets, weights):
        return cross_entropy(unembed, head, hidden, targets, weights, options=options).loss

    compiled = jax.jit(jax.grad(mean, argnums=(0, 1))).lower(head, rows, ids, weights).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < tokens * vocab * 4 / 4
