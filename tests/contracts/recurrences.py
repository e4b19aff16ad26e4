"""State space ops and the short convolution in numpy and float64, token by token."""

import numpy as np

from jaxllm.spec.ops import Convolution, SelectiveScan, StateSpaceDual
from tests.ops.test_norm import FORMULAS


def silu(x):
    return x / (1 + np.exp(-x))


def convolved(w, name, x):
    """Every channel's sum over its last inputs."""
    kernel, y = w[name], np.zeros_like(x)
    for back in range(len(kernel)):
        y[:, back:] += kernel[len(kernel) - 1 - back] * x[:, : x.shape[1] - back]
    return y + w.get(f"{name}_bias", 0)


def rms(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def selective(op, w, x):
    x, z = (x @ w[n] + w.get(f"{n}_bias", 0) for n in "xz")
    x = np.vectorize(FORMULAS[op.activation])(convolved(w, "conv", x))
    low, b, c = (x @ w[n] for n in ("step", "b", "c"))
    if op.inner_eps is not None:
        low, b, c = (
            rms(y, w[f"{n}_norm"], op.inner_eps)
            for n, y in zip(("step", "b", "c"), (low, b, c), strict=True)
        )
    dt = np.logaddexp(0, low @ w["dt"] + w["dt_offset"])
    h, y = np.zeros((x.shape[0], *w["a_log"].shape)), np.zeros_like(x)
    for t in range(x.shape[1]):
        h *= np.exp(-np.exp(w["a_log"]) * dt[:, t, :, None])
        h += (dt[:, t] * x[:, t])[..., None] * b[:, t, None]
        y[:, t] = (h * c[:, t, None]).sum(-1) + w["d"] * x[:, t]
    return (y * silu(z)) @ w["o"] + w.get("o_bias", 0)


def dual(op, w, x):
    def project(name, scale):
        y = np.tensordot(x, w[name], 1) + w.get(f"{name}_bias", 0)
        return scale * y

    z, xs, b, c, dt = map(project, ("z", "x", "b", "c", "dt"), op.scales)
    act = np.vectorize(FORMULAS[op.activation])
    xs, b, c = (act(convolved(w, f"conv_{n}", y)) for n, y in zip("xbc", (xs, b, c), strict=True))
    limit = np.inf if op.dt_max is None else op.dt_max
    dt = np.clip(np.logaddexp(0, dt + w["dt_offset"]), op.dt_min, limit)
    b, c = (np.repeat(y, op.heads // op.groups, axis=2) for y in (b, c))
    state, y = np.zeros((*xs[:, 0].shape, op.state)), np.zeros_like(xs)
    for t in range(x.shape[1]):
        state *= np.exp(-np.exp(w["a_log"]) * dt[:, t])[..., None, None]
        state += (dt[:, t, :, None] * xs[:, t])[..., None] * b[:, t, :, None]
        y[:, t] = (state * c[:, t, :, None]).sum(-1) + w["d"][:, None] * xs[:, t]
    y = gated(op.norm, w, y, silu(z))
    return np.tensordot(y, w["o"], 2) + w.get("o_bias", 0)


def gated(norm, w, y, gate):
    if norm is None:
        return y * gate
    y = y if norm.before_gate else y * gate
    parts = y.reshape(*y.shape[:2], norm.groups, -1)
    y = rms(parts, 1, norm.eps).reshape(y.shape) * w["norm"]
    return y * gate if norm.before_gate else y


def convolution(op, w, x):
    b, c, x = (x @ w[n] + w.get(f"{n}_bias", 0) for n in "bcx")
    return (c * convolved(w, "conv", b * x)) @ w["o"] + w.get("o_bias", 0)


OPS = {SelectiveScan: selective, StateSpaceDual: dual, Convolution: convolution}
