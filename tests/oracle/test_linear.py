"""Hybrids with linear attention: each feature flipped moves the logits, files that do not fit."""

import dataclasses

import pytest
from safetensors.numpy import save_file

import jaxllm
from jaxllm.core.tree import partition
from jaxllm.errors import WeightsError
from jaxllm.spec.linear_attention import GatedDecay
from jaxllm.spec.ops import LinearAttention, MoE
from jaxllm.spec.rope import Rope
from jaxllm.zoo.load import open_checkpoint, saved_paths
from tests.oracle.checks import check_moved, check_named
from tests.oracle.golden import NAMES, TOLERANCE, copy, golden, relative, tensors
from tests.oracle.mutate import POLICY, attn, change, logits, only, part, renorm, rope, subs, window
from tests.oracle.test_experts import latent, router
from tests.oracle.test_families import spec_of

OURS = [name for name in NAMES if name.startswith(("qwen3_next", "olmo_hybrid", "minimax", "kimi"))]


def linear(**changes):
    """A mutation of linear attention."""
    return lambda s: change(s, LinearAttention, **changes)


MUTATIONS = {
    ("qwen3_next", "no delta rule"): linear(delta=False),
    ("qwen3_next", "no decay"): linear(decay=None),
    ("qwen3_next", "decays by sigmoid"): linear(decay=GatedDecay(form="sigmoid")),
    ("qwen3_next", "no convolution"): linear(conv=None),
    ("qwen3_next", "no activation after it"): linear(activation=None),
    ("qwen3_next", "keys of any length"): linear(l2_eps=None),
    ("qwen3_next", "queries not scaled"): linear(scale=1.0),
    ("qwen3_next", "betas up to 2"): linear(beta_max=2.0),
    ("qwen3_next", "reads not normed"): linear(out_norm=None),
    ("qwen3_next", "reads not gated"): linear(gate=None),
    ("qwen3_next", "a gate by sigmoid"): linear(gate="sigmoid"),
    ("qwen3_next", "attention not gated"): attn(gate=False),
    ("qwen3_next", "rope on half the dims"): rope(fraction=0.5),
    ("qwen3_next", "norms in are w"): subs(norm_in=renorm(offset=0.0)),
    ("qwen3_next", "final norm is w"): part("final_norm", offset=0.0),
    ("qwen3_next", "norm of queries and keys is w"): attn(qk_norm=renorm(offset=0.0)),
    ("olmo_hybrid", "betas up to 1"): linear(beta_max=1.0),
    ("olmo_hybrid", "no rope"): attn(rope=None),
    ("olmo_hybrid", "no norms out"): only("G", subs(norm_out=None)),
    ("minimax", "no decay"): linear(decay=None),
    ("minimax", "no activation"): linear(activation=None),
    ("minimax", "reads not normed"): linear(out_norm=None),
    ("minimax", "a gate by silu"): linear(gate="silu"),
    ("minimax", "residuals not normed"): subs(skip_normed=False),
    ("minimax", "what is kept not weighed"): subs(skip_scale=1.0),
    ("minimax", "updates not weighed"): subs(scale=1.0),
    ("minimax", "one expert"): lambda s: change(s, MoE, active=1),
    ("minimax_hub", "window 9 -> 10"): window(10),
    ("minimax_hub", "no rope"): attn(rope=None),
    ("minimax_hub", "silu"): linear(activation="silu"),
    ("kimi_linear", "no delta rule"): linear(delta=False),
    ("kimi_linear", "no decay"): linear(decay=None),
    ("kimi_linear", "no convolution"): linear(conv=None),
    ("kimi_linear", "no activation after it"): linear(activation=None),
    ("kimi_linear", "keys of any length"): linear(l2_eps=None),
    ("kimi_linear", "betas up to 2"): linear(beta_max=2.0),
    ("kimi_linear", "reads not normed"): linear(out_norm=None),
    ("kimi_linear", "a gate by silu"): linear(gate="silu"),
    ("kimi_linear", "a rope"): latent(rope=Rope(fraction=0.8)),
    ("kimi_linear", "one group more"): router(groups_kept=3),
    ("kimi_linear", "no bias in the choice"): router(balance_bias=False),
    ("kimi_linear", "not renormalised"): router(renormalize=False),
    ("kimi_linear_hub", "renormalised"): router(renormalize=True),
    ("kimi_linear_hub", "weights not scaled"): router(scale=1.0),
    ("olmo_hybrid_nope", "a rope"): attn(rope=Rope()),
    ("olmo_hybrid_nope", "betas up to 2"): linear(beta_max=2.0),
}


@pytest.mark.parametrize(("name", "what"), MUTATIONS)
def test_a_flipped_feature_moves_the_logits(name, what, models):
    model = models(name)
    params = model.params
    if what == "decays by sigmoid":  # which has no leaf for the speed
        params = partition(params, lambda p: p.endswith("a_log"))[1]
    check_moved(model, MUTATIONS[name, what], name, what, params)


@pytest.mark.parametrize("name", OURS)
def test_every_layer_has_the_leaves_of_the_file(name):
    checkpoint = open_checkpoint(golden(name).source)
    paths = list(dict.fromkeys(entry.path for entry in checkpoint.entries))
    assert sorted(set(saved_paths(checkpoint.spec))) == sorted(paths)


PROBLEMS = {
    "a kind of layer": ("qwen3_next", {"layer_types": ["linear_attention"] * 2 + ["conv"]}, "conv"),
    "too few layers": ("olmo_hybrid", {"layer_types": ["full_attention"]}, "has 1 layers"),
    "heads": ("qwen3_next", {"linear_num_key_heads": 3}, "4 is no multiple of key_heads 3"),
    "a gate's bias": ("qwen3_next", {"attention_bias": True}, "gate of attention has no bias"),
    "experts": ("qwen3_next", {"num_experts_per_tok": 5}, "active"),
    "no convolution": ("qwen3_next", {"linear_conv_kernel_dim": 0}, "conv is positive"),
    "no experts": ("minimax", {"num_local_experts": 0}, "experts is positive"),
    "another kind": ("minimax", {"layer_types": ["conv"] * 3}, "'conv'"),
    "a factor": ("minimax", {"mlp_alpha_factor": "2"}, "mlp_alpha_factor is '2'"),
    "a rope": ("kimi_linear_hub", {"mla_use_nope": False}, "mla_use_nope is False"),
    "layers twice": (
        "kimi_linear_hub",
        {"linear_attn_config": {"full_attn_layers": [2], "kda_layers": [2]}},
        "full_attn_layers and kda_layers are not the layers 1 to 2",
    ),
    "a key inside": (
        "kimi_linear_hub",
        {"linear_attn_config": {"num_head": 3}},
        "linear_attn_config: unknown key 'num_head'",
    ),
    "an mlp": ("kimi_linear", {"mlp_layer_types": ["dense"] * 2 + ["moe"]}, "dense or sparse"),
    "unknown": ("olmo_hybrid", {"linear_use_gate": True}, "unknown key 'linear_use_gate'"),
}


@pytest.mark.parametrize("what", PROBLEMS)
def test_a_contradiction_is_named(what, tmp_path):
    check_named(PROBLEMS[what], tmp_path)


def test_interleaved_tensors_of_another_shape_are_named_once(tmp_path):
    folder = copy("qwen3_next", tmp_path)
    found = tensors(folder)
    name = "model.layers.0.linear_attn.in_proj_qkvz.weight"
    found[name] = found[name][:-1].copy()
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"has shape \(111, 24\), not \(112, 24\)") as caught:
        open_checkpoint(folder)
    assert str(caught.value).count(name) == 1


def test_names_in_memory_are_read_too(tmp_path):
    """Norms under the names that they have beside those that saving gives them."""
    folder = copy("olmo_hybrid", tmp_path)
    found = {
        k.replace("attention_layer_norm", "input_layernorm").replace(
            "feedforward_layer_norm", "post_attention_layernorm"
        ): v
        for k, v in tensors(folder).items()
    }
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    want = golden("olmo_hybrid")
    model = jaxllm.load(folder, policy=POLICY, store=False)
    found = logits(model.spec, model.params, want.ids)
    assert relative(found, want.logits) < TOLERANCE


def test_absent_keys_mean_what_the_reference_means(tmp_path):
    for name, pattern in (("qwen3_next_hub", "(L*3 G)*2"), ("olmo_hybrid", "(K*3 G)*2")):
        folder = copy(name, tmp_path / name, layer_types=None, num_hidden_layers=8)
        with pytest.raises(WeightsError, match="is missing"):
            open_checkpoint(folder)
        spec = spec_of(folder)
        assert spec.layers == pattern
        ops = [o.op for b in spec.blocks for s in b.subs for o in s.ops]
        assert dataclasses.asdict(next(o for o in ops if isinstance(o, LinearAttention)))["delta"]


def test_the_rates_of_forgetting_stand_in_the_file(tmp_path):
    folder = copy("minimax", tmp_path)
    found, name = tensors(folder), "model.layers.1.self_attn.slope_rate"
    params = jaxllm.load(folder, policy=POLICY, store=False).params
    assert (params["layers"]["1"]["linear"]["rate"] == found[name].ravel()).all()
    save_file(found | {name: found[name][:, 0]}, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=r"has shape \(4, 1\), not \(4, 1, 1\)"):
        open_checkpoint(folder)
