"""Linear attention written again in numpy and float64, straight from the spec's words."""

import numpy as np

from jaxllm.ops.features import projection
from jaxllm.spec.linear_attention import ConstantDecay, LinearAttention
from tests.ops.test_norm import FORMULAS
from tests.ops.test_rope import rotated


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softplus(x):
    return np.logaddexp(0, x)


def convolve(x, kernel):
    """Every channel over its last W values."""
    width = len(kernel)
    padded = np.concatenate([np.zeros((x.shape[0], width - 1, *x.shape[2:])), x], axis=1)
    return sum(kernel[j] * padded[:, j : j + x.shape[1]] for j in range(width))


def features(op, q, k):
    """Features of queries and keys; those of favor as they are, without a stabiliser."""
    if op.feature == "favor":
        w = projection(op.features, op.key_dim, op.seed).astype(np.float64)
        root = op.query_scale**0.5
        return (
            np.exp(root * y @ w.T - 0.5 * ((root * y) ** 2).sum(-1, keepdims=True)) for y in (q, k)
        )
    phi = {
        "identity": lambda x: x,
        "elu1": lambda x: np.where(x > 0, x + 1, np.exp(x)),
        "relu": lambda x: np.maximum(x, 0),
        "softmax": lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True),
    }[op.feature]
    return op.query_scale * phi(q), phi(k)


def product(w, name, x):
    """x times a matrix, or the two whose product it is."""
    if f"{name}_a" in w:
        return np.tensordot(x @ w[f"{name}_a"], w[f"{name}_b"], 1)
    return np.tensordot(x, w[name], 1)


def log_decay(op, w, x):
    """[B, T, N, 1 or M]."""
    if op.decay is None:
        return np.zeros((*x.shape[:2], op.heads, 1))
    if isinstance(op.decay, ConstantDecay):
        return np.broadcast_to(-np.abs(w["rate"])[:, None], (*x.shape[:2], op.heads, 1))
    raw = product(w, "decay", x) + w["dt_bias"]
    raw = raw.reshape(*x.shape[:2], op.heads, -1)
    if op.decay.form == "sigmoid":
        return -softplus(-raw) / op.decay.temperature
    return -np.exp(w["a_log"])[:, None] * softplus(raw)


def linear_attention(op: LinearAttention, w, x):
    """The update of x, token by token."""
    parts = [np.tensordot(x, w[name], 1) for name in ("query", "key", "value")]
    if op.conv is not None:
        kernels = (w[f"conv_{name}"] for name in ("query", "key", "value"))
        parts = [convolve(y, kernel) for y, kernel in zip(parts, kernels, strict=True)]
    if op.activation is not None:
        parts = [np.vectorize(FORMULAS[op.activation])(y) for y in parts]
    q, k, v = parts
    if op.rope is not None:
        places = np.broadcast_to(np.arange(x.shape[1]), x.shape[:2])
        q, k = rotated(q, places, op.rope), rotated(k, places, op.rope)
    if op.l2_eps is not None:
        q, k = (y / np.sqrt((y**2).sum(-1, keepdims=True) + op.l2_eps) for y in (q, k))
    q, k = features(op, q, k)
    q, k = (np.repeat(y, op.heads // op.key_heads, axis=2) for y in (q, k))
    if op.normalizer is not None:
        v = np.concatenate([v, np.ones((*v.shape[:3], 1))], axis=-1)
    keep = np.exp(log_decay(op, w, x))
    beta = op.beta_max * sigmoid(np.tensordot(x, w["beta"], 1)) if op.delta else None
    state, out = np.zeros((*k[:, 0].shape, v.shape[-1])), np.zeros(v.shape)
    for t in range(x.shape[1]):
        state = state * keep[:, t, ..., None]
        u = v[:, t]
        if beta is not None:
            u = beta[:, t, :, None] * (u - np.einsum("bnmh,bnm->bnh", state, k[:, t]))
        state = state + k[:, t, ..., None] * u[:, :, None]
        out[:, t] = np.einsum("bnmh,bnm->bnh", state, q[:, t])
    if op.normalizer is not None:
        out = out[..., :-1] / np.maximum(out[..., -1:], op.normalizer)
    return leave(op, w, x, out)


def leave(op, w, x, out):
    """Norm, gate, project out."""
    if op.out_norm is not None:
        dims = -1 if op.out_norm.over == "head" else (-2, -1)
        out = out / np.sqrt((out**2).mean(dims, keepdims=True) + op.out_norm.eps) * w["out_norm"]
    if op.gate is not None:
        gate = product(w, "out_gate", x)
        out = out * sigmoid(gate) * (gate if op.gate == "silu" else 1)
    return np.tensordot(out, w["out"], 2)
