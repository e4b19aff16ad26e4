"""The toys against a decoder written again in numpy and float64, straight from the spec's words."""

import dataclasses
import math

import numpy as np
import pytest

from jaxllm.nn.api import Inputs
from jaxllm.spec.mask import Causal, Row, allowed
from jaxllm.spec.ops import (
    MLP,
    Attention,
    InfiniAttention,
    LatentAttention,
    LinearAttention,
    Memory,
    MoE,
)
from tests.contracts import recurrences
from tests.contracts.linear import linear_attention
from tests.contracts.specs import NAMES, SPECS, assert_close, full, params, runner, single, tokens
from tests.ops.memory_oracle import memory
from tests.ops.routing_oracle import moe
from tests.ops.test_attention import oracle as attend
from tests.ops.test_norm import FORMULAS
from tests.ops.test_rope import rotated


def norm(spec, leaves, x):
    if spec is None:
        return x
    if spec.type == "layer":
        x = x - x.mean(-1, keepdims=True)
    y = x / np.sqrt((x**2).mean(-1, keepdims=True) + spec.eps) * (spec.offset + leaves["scale"])
    return y + leaves["bias"] if spec.bias else y


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


def mlp(op, w, x):
    def project(name, x):
        y = x @ w[name]
        return y + w[f"{name}_bias"] if op.bias else y

    def act(x):
        x = x if op.clamp is None else np.minimum(x, op.clamp)
        gained = x / (1 + np.exp(-op.gain * x))
        return gained if op.gain != 1 else np.vectorize(FORMULAS[op.activation])(x)

    if op.gated:
        up = project("up", x)
        up = up if op.clamp is None else np.clip(up, -op.clamp, op.clamp)
        y = project("down", act(op.gate_scale * project("gate", x)) * (up + op.up_offset))
    else:
        y = project("down", act(project("up", x)))
    return y / (1 + np.exp(-x @ w["out_gate"])) if op.out_gate else y


OPS = {
    Attention: attention,
    LatentAttention: latent,
    InfiniAttention: infini,
    MLP: mlp,
    MoE: moe,
    Memory: memory,
    LinearAttention: linear_attention,
    **recurrences.OPS,
}


def decode(spec, weights, ids, types=0):
    """Logits [B, T, V] in float64."""
    table = weights["embed"]["table"]
    x = table[ids] * spec.embedding.scale
    if spec.embedding.positions is not None:
        x = x + weights["embed"]["positions"][spec.embedding.position_offset :][: ids.shape[1]]
    if spec.embedding.types is not None:
        x = x + weights["embed"]["types"][types]
    x = norm(spec.embedding.norm, weights.get("embed_norm"), x)
    for layer in range(spec.num_layers):
        w = weights["layers"][str(layer)]
        for sub in spec.block(layer).subs:
            name = sub.ops[0].name
            inner = norm(sub.norm_in, w.get(f"{name}_norm"), x)
            shared = weights.get("shared", {})
            own = {o.name: norm(o.norm_in, w.get(f"{o.name}_norm"), inner) for o in sub.ops}
            update = sum(
                o.scale
                * OPS[type(o.op)](
                    o.op,
                    w[o.name] | shared.get(getattr(o.op, "share", None), {}),
                    o.scale_in * own[o.name],
                )
                for o in sub.ops
            )
            kept = sub.skip_scale * (inner if sub.skip_normed else x)
            x = kept + sub.scale * norm(sub.norm_out, w.get(f"{name}_out_norm"), update)
            x = norm(sub.norm_after, w.get(f"{name}_after_norm"), x)
    x = norm(spec.final_norm, weights.get("final_norm"), x)
    head = weights.get("head", {})
    if spec.head.transform is not None:
        x = x @ head["dense"] + head.get("dense_bias", 0)
        act = np.vectorize(FORMULAS[spec.head.transform.activation])
        x = norm(spec.head.transform.norm, weights["head_norm"], act(x))
    logits = x @ (table.T if spec.head.tied else head["kernel"])
    logits = (logits + (head["bias"] if spec.head.bias else 0)) * spec.head.scale
    cap = spec.head.softcap
    return logits if cap is None else cap * np.tanh(logits / cap)


def wide(tree):
    return {k: wide(v) if isinstance(v, dict) else v.astype(np.float64) for k, v in tree.items()}


def test_token_types_are_what_the_spec_says():
    name = "bert"
    types = np.random.default_rng(3).integers(0, 2, tokens(name).shape).astype(np.int32)
    found, _ = runner(name)(params(name), Inputs(tokens(name), types=types))
    weights = wide(single(params(name), SPECS[name].num_layers))
    assert_close(found, decode(SPECS[name], weights, tokens(name), types))


@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_what_its_spec_says(name):
    spec = SPECS[name]
    weights = wide(single(params(name), spec.num_layers))
    assert_close(full(name), decode(spec, weights, tokens(name)))


def changed(spec, *path, value):
    """The spec with one field changed, at a path of names and places."""
    if not path:
        return value
    first, *rest = path
    if isinstance(spec, tuple):
        inner = changed(spec[first], *rest, value=value)
        return (*spec[:first], inner, *spec[first + 1 :])
    return dataclasses.replace(spec, **{first: changed(getattr(spec, first), *rest, value=value)})


def op(block, sub=0, place=0):
    return ("blocks", block, "subs", sub, "ops", place, "op")


FLAGS = [
    ("mha", (*op(0), "rope", "layout"), "half"),
    ("mha", (*op(0), "rope", "scaling"), None),
    ("mha", (*op(0), "rope", "theta"), 110.0),
    ("gqa", (*op(0), "rope"), SPECS["mha"].blocks[0].subs[0].ops[0].op.rope),
    ("gqa", (*op(1), "rope", "scaling"), None),
    ("gqa", (*op(1), "rope", "scaling", "high_freq_factor"), 5.0),
    ("gqa", (*op(2), "mask"), SPECS["mha"].blocks[0].subs[0].ops[0].op.mask),
    ("gqa", ("layers",), "A (L G)*2 G"),
    ("mqa_sandwich", (*op(0), "scale"), None),
    ("mqa_sandwich", ("embedding", "scale"), 1.0),
    ("mqa_sandwich", ("head", "softcap"), None),
    ("mqa_sandwich", (*op(0, 1), "activation"), "silu"),
    ("mqa_sandwich", ("blocks", 0, "subs", 0, "norm_in", "offset"), 0.0),
    ("mqa_sandwich", ("blocks", 0, "subs", 1, "norm_out", "eps"), 1e-2),
    ("post_layernorm", ("blocks", 0, "subs", 0, "norm_after", "eps"), 1e-2),
    ("parallel", ("blocks", 0, "subs", 1, "scale"), 1.0),
    ("parallel", (*op(0, 1), "activation"), "relu"),
    ("parallel", ("blocks", 0, "subs", 1, "ops", 1, "norm_in", "type"), "rms"),
    ("parallel", ("head", "scale"), 1.0),
    ("output_norm", ("final_norm", "type"), "rms"),
    ("capped_gated", (*op(0), "softcap"), 3.0),
    ("capped_gated", (*op(0), "qk_norm", "offset"), 0.0),
    ("capped_gated", (*op(0), "qk_norm", "eps"), 1e-2),
    ("capped_gated", (*op(0), "qk_norm", "type"), "layer"),
    ("capped_gated", (*op(1), "qk_norm", "over"), "heads"),
    ("capped_gated", (*op(1), "gate"), False),
    ("capped_gated", (*op(1), "sinks"), False),
    ("capped_gated", (*op(1), "mask", "second", "size"), 6),
    ("l2_after_rope", (*op(0), "qk_norm", "type"), "rms"),
    ("l2_after_rope", (*op(1), "qk_norm", "eps"), 1e-1),
    ("l2_after_rope", (*op(1), "rope"), None),
    ("l2_after_rope", (*op(1), "temperature"), None),
    ("delta", (*op(0), "delta"), False),
    ("delta", (*op(0), "decay"), None),
    ("delta", (*op(0), "conv"), None),
    ("delta", (*op(0), "activation"), None),
    ("delta", (*op(0), "l2_eps"), 1e-1),
    ("delta", (*op(0), "gate"), "sigmoid"),
    ("delta", (*op(0), "scale"), 0.5),
    ("delta", (*op(0), "out_norm"), None),
    ("delta", (*op(0), "out_norm", "eps"), 1e-1),
    ("delta", (*op(1), "beta_max"), 1.0),
    ("delta", (*op(1), "decay", "form"), "sigmoid"),
    ("delta", (*op(1), "gate"), "silu"),
    ("kernels", (*op(0), "seed"), 1),
    ("kernels", (*op(0), "features"), 23),
    ("kernels", (*op(0), "normalizer"), 1e3),
    ("kernels", (*op(1), "decay"), None),
    ("kernels", (*op(1), "rope"), None),
    ("kernels", (*op(1), "out_norm", "eps"), 1e-2),
    ("kernels", (*op(2), "feature"), "relu"),
    ("kernels", (*op(2), "feature"), "softmax"),
    ("kernels", (*op(3), "decay", "temperature"), 16.0),
    ("latent", (*op(0), "bias"), False),
    ("latent", (*op(0), "eps"), 1e-2),
    ("latent", (*op(0), "rope", "layout"), "half"),
    ("latent", (*op(1), "scale"), None),
    ("latent", (*op(1), "mask"), SPECS["mha"].blocks[0].subs[0].ops[0].op.mask),
    ("moe", (*op(0, 1), "active"), 1),
    ("moe", (*op(0, 1), "router", "renormalize"), False),
    ("moe", (*op(0, 1), "router", "scale"), 1.0),
    ("moe", (*op(0, 1), "router", "score"), "sigmoid"),
    ("moe", (*op(1, 1), "router", "score"), "softmax"),
    ("moe", (*op(1, 1), "router", "groups_kept"), 3),
    ("moe", (*op(1, 1), "router", "groups"), 2),
    ("moe", (*op(1, 1), "router", "group_score"), "one"),
    ("moe", (*op(1, 1), "router", "balance_bias"), False),
    ("moe", (*op(1, 1, 1), "out_gate"), False),
    ("moe_clamped", (*op(0, 1), "mlp", "clamp"), None),
    ("moe_clamped", (*op(0, 1), "mlp", "gain"), 1.0),
    ("moe_clamped", (*op(0, 1), "mlp", "up_offset"), 0.0),
    ("moe_clamped", (*op(0, 1), "mlp", "bias"), False),
    ("moe_clamped", (*op(0, 1), "router", "bias"), False),
    ("moe_clamped", (*op(0, 1), "router", "over_chosen"), False),
    ("moe_clamped", (*op(1, 1), "router", "weigh_inputs"), False),
    ("moe_clamped", (*op(1, 1), "latent_bias"), False),
    ("selective", (*op(0), "inner_eps"), 1e-2),
    ("selective", (*op(0), "activation"), "gelu"),
    ("dual", (*op(0), "scales", 0), 1.0),
    ("dual", (*op(0), "scales", 1), 1.0),
    ("dual", (*op(0), "scales", 2), 1.0),
    ("dual", (*op(0), "scales", 3), 1.0),
    ("dual", (*op(0), "scales", 4), 1.0),
    ("dual", (*op(0), "dt_min"), 0.0),
    ("dual", (*op(0), "dt_max"), None),
    ("dual", (*op(0), "norm", "groups"), 1),
    ("dual", (*op(0), "norm", "before_gate"), True),
    ("dual", (*op(0), "norm", "eps"), 1e-2),
    ("dual", (*op(1), "activation"), "silu"),
    ("dual", ("blocks", 1, "subs", 0, "ops", 0, "scale"), 1.0),
    ("dual", ("blocks", 1, "subs", 0, "ops", 1, "scale_in"), 1.0),
    ("dual", (*op(1, 1), "gate_scale"), 1.0),
    ("infini", (*op(0), "delta"), False),
    ("infini", (*op(1), "delta"), True),
    ("infini", (*op(0), "local", "mask", "second", "size"), 5),
    ("memory", (*op(0, 1), "active"), 2),
    ("memory", (*op(0, 1), "gated"), False),
    ("memory", (*op(0, 1), "eps"), 1e-1),
    ("memory", (*op(1), "active"), 4),
    ("bert", ("embedding", "position_offset"), 2),
    ("bert", ("embedding", "norm", "eps"), 1e-2),
    ("bert", ("embedding", "types"), None),
    ("bert", ("head", "bias"), False),
    ("bert", ("head", "transform"), None),
    ("bert", ("head", "transform", "activation"), "silu"),
    ("bert", (*op(0), "mask"), Causal()),
    ("modernbert", ("embedding", "norm"), None),
    ("modernbert", (*op(1), "mask", "right"), 1),
    ("modernbert", (*op(1), "rope", "theta"), 1000.0),
    ("modernbert", ("layers",), "F L G L"),
    ("modernbert", (*op(2, 1), "activation"), "silu"),
    ("modernbert", ("head", "transform", "norm", "eps"), 1e-2),
    ("longformer", (*op(0), "global_projections"), False),
    ("longformer", (*op(0), "mask", "second", "first"), 1),
    ("bigbird", (*op(0), "mask", "mask", "second", "second", "seed"), 4),
    ("bigbird", (*op(0), "mask", "mask", "second", "second", "count"), 2),
    ("bigbird", (*op(0), "mask", "mask", "second", "first", "last"), 0),
    ("bigbird", (*op(0), "mask", "size"), 2),
    ("linformer", (*op(0), "length_projection"), None),
    ("streaming", (*op(0), "mask", "second", "second", "first"), 1),
    ("prefix", (*op(0), "mask", "second", "first"), 3),
]


@pytest.mark.parametrize(("name", "path", "value"), FLAGS)
def test_every_feature_bites(name, path, value):
    """A feature flipped moves the logits by over 100 times the tolerance: the toys can tell."""
    spec = SPECS[name]
    weights = wide(single(params(name), spec.num_layers))
    other = decode(changed(spec, *path, value=value), weights, tokens(name))
    assert np.abs(other - full(name)).max() > 100 * 1e-5 * max(1.0, np.abs(full(name)).max())
