"""A mixture of experts written again in numpy and float64: token by token, expert by expert."""

import dataclasses

import numpy as np


def softmax(x):
    y = np.exp(x - x.max())
    return y / y.sum()


def choose(op, logits, bias):
    """(experts, their weights) of one token."""
    router = op.router
    scores = 1 / (1 + np.exp(-logits)) if router.score == "sigmoid" else softmax(logits)
    choice = (logits if router.over_chosen else scores).copy()
    if router.balance_bias:
        choice = choice + bias
    if router.groups > 1:
        parts = np.sort(choice.reshape(router.groups, -1), axis=1)
        best = parts[:, -1] + (parts[:, -2] if router.group_score == "two" else 0)
        size = op.experts // router.groups
        for group in np.argsort(-best)[router.groups_kept :]:
            choice[group * size : (group + 1) * size] = -np.inf
    chosen = np.argsort(-choice, kind="stable")[: op.active]
    weights = softmax(logits[chosen]) if router.over_chosen else scores[chosen]
    weights = weights / weights.sum() if router.renormalize else weights
    return chosen, weights * router.scale


def moe(op, w, x):
    """Updates [B, T, D] of inputs [B, T, D]."""
    from tests.contracts.test_oracle import mlp

    logits = x @ w["router"] + (w["router_bias"] if op.router.bias else 0)
    leaves = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
    if op.latent is not None:
        x = x @ w["latent_down"] + (w["latent_down_bias"] if op.latent_bias else 0)
    out = np.zeros_like(x)
    for place in np.ndindex(x.shape[:2]):
        chosen, weights = choose(op, logits[place], w.get("balance_bias"))
        for expert, weight in zip(chosen, weights, strict=True):
            own = {name: w[name][expert] for name in leaves if name in w}
            if op.router.weigh_inputs:
                out[place] += mlp(op.mlp, own, x[place] * weight)
            else:
                out[place] += weight * mlp(op.mlp, own, x[place])
    if op.latent is None:
        return out
    return out @ w["latent_up"] + (w["latent_up_bias"] if op.latent_bias else 0)


def counts(op, w, x):
    """How many tokens chose each expert."""
    logits = x @ w["router"] + (w["router_bias"] if op.router.bias else 0)
    chosen = [choose(op, row, w.get("balance_bias"))[0] for row in logits.reshape(-1, op.experts)]
    return np.bincount(np.concatenate(chosen), minlength=op.experts)


def alone(op, **router):
    """The op with its router changed."""
    return dataclasses.replace(op, router=dataclasses.replace(op.router, **router))
