"""The toys against a decoder written again in numpy and float64, straight from the spec's words."""

import dataclasses

import numpy as np
import pytest

from jaxllm.nn.api import Inputs
from jaxllm.spec.mask import Causal
from jaxllm.spec.ops import (
    MLP,
    Attention,
    InfiniAttention,
    LatentAttention,
    Linear,
    LinearAttention,
    Memory,
    MoE,
)
from tests.contracts import recurrences
from tests.contracts.attentions import attention, infini, latent
from tests.contracts.linear import linear_attention
from tests.contracts.specs import NAMES, SPECS, assert_close, full, params, runner, single, tokens
from tests.ops.memory_oracle import memory
from tests.ops.routing_oracle import moe
from tests.ops.test_norm import FORMULAS


def norm(spec, leaves, x):
    if spec is None:
        return x
    if spec.type == "layer":
        x = x - x.mean(-1, keepdims=True)
    y = x / np.sqrt((x**2).mean(-1, keepdims=True) + spec.eps) * (spec.offset + leaves["scale"])
    return y + leaves["bias"] if spec.bias else y


def mlp(op, w, x):
    def project(name, x):
        y = x @ w[name]
        if op.adapter_rank is not None and name != "down":
            y = y + x @ w["adapter_a"] @ w[f"{name}_adapter_b"]
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
    Linear: lambda _, w, x: x @ w["kernel"],
    MoE: moe,
    Memory: memory,
    LinearAttention: linear_attention,
    **recurrences.OPS,
}


def seen_of(sub, x, first, aside):
    """What an update's ops read: `first` is the embedding."""
    if sub.reads == "embedded":
        return np.concatenate([x, first], axis=-1)
    return x if sub.reads == "hidden" else aside + (x if sub.reads == "sum" else 0)


def decode(spec, weights, ids, types=0):
    """Logits [B, T, V] in float64."""
    table = weights["embed"]["table"]
    x = table[ids] * spec.embedding.scale
    if spec.embedding.positions is not None:
        x = x + weights["embed"]["positions"][spec.embedding.position_offset :][: ids.shape[1]]
    if spec.embedding.types is not None:
        x = x + weights["embed"]["types"][types]
    x = norm(spec.embedding.norm, weights.get("embed_norm"), x)
    first, shared = x, weights.get("shared", {})
    for layer in range(spec.num_layers):
        aside = None
        for sub in spec.block(layer).subs:
            name, w = sub.ops[0].name, dict(weights["layers"][str(layer)])
            for key, leaves in shared.get(sub.share, {}).items():
                w[key] = w.get(key, {}) | leaves
            seen = seen_of(sub, x, first, aside)
            inner = norm(sub.norm_in, w.get(f"{name}_norm"), seen)
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
            update = sub.scale * norm(sub.norm_out, w.get(f"{name}_out_norm"), update)
            if sub.aside:
                aside = update
                continue
            x = sub.skip_scale * (inner if sub.skip_normed else x) + update
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
    ("kernels", ("blocks", 1, "subs", 0, "skip_normed"), False),
    ("kernels", ("blocks", 1, "subs", 1, "skip_scale"), 1.0),
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
    ("shared", (*op(1), "adapter_rank"), None),
    ("shared", (*op(1), "scale"), None),
    ("shared", (*op(1, 1), "adapter_rank"), None),
    ("shared", ("blocks", 1, "subs", 2, "scale"), 1.0),
    ("shared", ("blocks", 1, "subs", 2, "reads"), "hidden"),
    ("shared", ("blocks", 2, "subs", 3, "reads"), "hidden"),
    ("shared", ("layers",), "M (B M A)*2"),
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
