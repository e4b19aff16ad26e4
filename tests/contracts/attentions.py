"""Attentions written again in numpy and float64, straight from the words of the spec."""

import math

import numpy as np

from jaxllm.spec.mask import Row, allowed
from tests.ops.test_attention import oracle as attend
from tests.ops.test_rope import rotated


def qk_norm(spec, scale, x):
    dims = (-2, -1) if spec.over == "full" else -1
    if spec.type == "layer":
        x = x - x.mean(dims, keepdims=True)
    y = x / np.sqrt((x**2).mean(dims, keepdims=True) + spec.eps)
    return y * (spec.offset + scale) if spec.scale else y


def seen_by(op, length):
    """Who sees whom [1, N, T, S]."""
    places, head = np.arange(length), np.arange(op.heads)
    row = Row(length=length, head=head[:, None, None], heads=op.heads)
    seen = allowed(op.mask, places[None, :, None], places[None, None, :], row)
    return np.broadcast_to(seen, (op.heads, length, length))[None]


def attention(op, w, x):
    def project(name):
        y = np.einsum("btd,dnh->btnh", x, w[name])
        if op.adapter_rank is not None:
            y = y + np.einsum("btr,rnh->btnh", x @ w[f"{name}_adapter_a"], w[f"{name}_adapter_b"])
        return y + w[f"{name}_bias"] if op.qkv_bias else y

    q, k, v = project("q"), project("k"), project("v")
    length = x.shape[1]
    places = np.broadcast_to(np.arange(x.shape[1]), x.shape[:2])
    rotate = lambda y: y if op.rope is None else rotated(y, places, op.rope)  # noqa: E731
    if op.qk_norm is None:
        q, k = rotate(q), rotate(k)
    elif op.qk_norm.after_rope:
        q, k = (
            qk_norm(op.qk_norm, w.get(f"{n}_norm"), rotate(y))
            for n, y in zip("qk", (q, k), strict=True)
        )
    else:
        q, k = (
            rotate(qk_norm(op.qk_norm, w.get(f"{n}_norm"), y))
            for n, y in zip("qk", (q, k), strict=True)
        )
    if op.temperature is not None:
        steps = np.floor((places + 1) / op.temperature.period)
        q = q * (1 + op.temperature.scale * np.log(1 + steps))[:, :, None, None]
    seen = seen_by(op, x.shape[1])
    scale = 1 / math.sqrt(op.head_dim) if op.scale is None else op.scale
    seen = np.repeat(seen, len(x), axis=0)
    if op.length_projection is not None:
        k, v = (
            np.einsum("btkh,tr->brkh", y, w[f"{n}_length"][:length])
            for y, n in ((k, "k"), (v, "v"))
        )
        seen = np.ones((*seen.shape[:3], k.shape[1]), bool)
    out = attend(q, k, v, seen, scale, softcap=op.softcap, sinks=w["sinks"] if op.sinks else None)
    if op.global_projections:
        first = op.mask.second.first
        q, k, v = project("q_global"), project("k_global"), project("v_global")
        out[:, :first] = attend(q, k, v, np.ones((len(x), length, length), bool), scale)[:, :first]
    if op.gate:
        out = out / (1 + np.exp(-np.einsum("btd,dnh->btnh", x, w["out_gate"])))
    y = np.einsum("btnh,nhd->btd", out, w["o"])
    return y + w["o_bias"] if op.out_bias else y


def infini(op, w, x):
    """By segments: what closed ones say is read for a whole segment, then it is added."""
    parts, heads = [], op.local.heads
    feature = lambda y: np.where(y > 0, y + 1, np.exp(np.minimum(y, 0)))  # noqa: E731
    eye = np.eye(heads * op.local.head_dim).reshape(heads, op.local.head_dim, -1)
    local = attention(op.local, w | {"o": eye}, x).reshape(*x.shape[:2], heads, -1)
    q, k, v = (np.einsum("btd,dnh->btnh", x, w[name]) for name in "qkv")
    q, k, group = feature(q), feature(k), heads // op.local.kv_heads
    k, v = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
    m, z = np.zeros((len(x), heads, *k.shape[-1:] * 2)), np.zeros((len(x), heads, k.shape[-1]))
    for start in range(0, x.shape[1], op.segment):
        at = slice(start, start + op.segment)

        def read(y, m=m, z=z):
            whole = np.einsum("btnh,bnh->btn", y, z)[..., None]
            return np.einsum("btnh,bnhv->btnv", y, m) / np.maximum(whole, 1e-20)

        parts.append(read(q[:, at]))
        new = v[:, at] - read(k[:, at]) if op.delta else v[:, at]
        m = m + np.einsum("btnh,btnv->bnhv", k[:, at], new)
        z = z + k[:, at].sum(1)
    share = 1 / (1 + np.exp(-w["share"]))[:, None]
    out = (1 - share) * local + share * np.concatenate(parts, axis=1)
    return np.einsum("btnh,nhd->btd", out, w["o"])


def latent(op, w, x):
    def normed(y, scale):
        return y / np.sqrt((y**2).mean(-1, keepdims=True) + op.eps) * scale

    def low(name):
        return x @ w[name] + (w[f"{name}_bias"] if op.bias else 0)

    places = np.broadcast_to(np.arange(x.shape[1]), x.shape[:2])
    if op.q_rank is None:
        q = np.einsum("btd,dnh->btnh", x, w["q"])
    else:
        q = np.einsum("btr,rnh->btnh", normed(low("q_down"), w["q_norm"]), w["q_up"])
    vectors, shared = np.split(low("kv_down"), [op.kv_rank], axis=-1)
    both = np.einsum("btr,rnh->btnh", normed(vectors, w["kv_norm"]), w["kv_up"])
    q, turned = np.split(q, [op.nope_dim], axis=-1)
    k, v = np.split(both, [op.nope_dim], axis=-1)
    rotate = lambda y: y if op.rope is None else rotated(y, places, op.rope)  # noqa: E731
    q = np.concatenate([q, rotate(turned)], axis=-1)
    shared = np.repeat(rotate(shared[:, :, None]), op.heads, axis=2)
    k = np.concatenate([k, shared], axis=-1)
    seen = allowed(op.mask, places[:, :, None], places[:, None, :])
    out = attend(q, k, v, seen, op.query_scale, softcap=None, sinks=None)
    return np.einsum("btnv,nvd->btd", out, w["o"]) + (w["o_bias"] if op.bias else 0)
