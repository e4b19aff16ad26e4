"""A product-key memory written again in numpy and float64: every key is scored, one by one."""

import numpy as np


def silu(x):
    return x / (1 + np.exp(-x))


def memory(op, w, x):
    """Updates [B, T, D] of inputs [B, T, D]; `w` holds the values too."""
    half, width = op.key_dim // 2, op.value_dim or x.shape[-1]
    q = np.einsum("btd,dnh->btnh", x, w["q"]).reshape(*x.shape[:2], op.heads, 2, half)
    if op.query_norm:
        q = q / np.sqrt((q**2).mean(-1, keepdims=True) + op.eps) * w["q_norm"]
    y = np.zeros((*x.shape[:2], width))
    for place in np.ndindex(x.shape[:2]):
        for head in range(op.heads):
            first, second = (w["keys"][head, side] @ q[place][head, side] for side in (0, 1))
            scores = (first[:, None] + second[None, :]).reshape(-1)
            best = np.argsort(-scores)[: op.active]
            weights = np.exp(scores[best] - scores[best].max())
            y[place] += (weights / weights.sum()) @ w["values"][best]
    if op.value_dim is None:
        return y
    return (y * silu(x @ w["gate"]) if op.gated else y) @ w["down"]
