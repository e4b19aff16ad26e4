"""Families with experts and latent attention: each feature flipped moves the logits."""

import dataclasses
import json
import shutil

import pytest

from jaxllm.errors import WeightsError
from jaxllm.spec.mask import And, Causal, Chunk
from jaxllm.spec.ops import LatentAttention, MoE
from jaxllm.zoo.load import open_checkpoint, saved_paths
from tests.oracle.checks import check_moved, check_named
from tests.oracle.golden import NAMES, golden, tensors
from tests.oracle.mutate import attn, change, only, rope, subs, window

STEMS = (
    *("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek", "dots1", "gpt_oss", "llama4"),
    "minimax_m2",
)
OURS = [name for name in NAMES if name.startswith(STEMS) or "_moe" in name]


def moe(**changes):
    """A mutation of the mixtures."""
    return lambda s: change(s, MoE, **changes)


def router(**changes):
    """A mutation of the routers."""
    return moe(router=lambda old: dataclasses.replace(old, **changes))


def expert(**changes):
    """A mutation of each expert."""
    return moe(mlp=lambda old: dataclasses.replace(old, **changes))


def truncated(rope):
    """A rope whose ramp begins and ends at whole dims."""
    return dataclasses.replace(rope, scaling=dataclasses.replace(rope.scaling, truncate=True))


def latent(**changes):
    """A mutation of the latent attention; a function gets the old value."""
    return lambda s: change(s, LatentAttention, **changes)


def yarn(**changes):
    """A mutation of the scaling of the rope."""
    scaled = lambda old: dataclasses.replace(old.scaling, **changes)  # noqa: E731
    return latent(rope=lambda old: dataclasses.replace(old, scaling=scaled(old)))


MUTATIONS = {
    ("mixtral", "one expert"): moe(active=1),
    ("mixtral", "not renormalised"): router(renormalize=False),
    ("mixtral", "sigmoid"): router(score="sigmoid"),
    ("mixtral_hub", "window 9 -> 10"): window(10),
    ("olmoe", "renormalised"): router(renormalize=True),
    ("olmoe", "queries and keys not normed together"): attn(
        qk_norm=lambda old: dataclasses.replace(old, over="heads")
    ),
    ("qwen2_moe", "renormalised"): router(renormalize=True),
    ("qwen2_moe", "the sliding layers slide further"): only("L", window(10)),
    ("qwen3_moe", "not renormalised"): router(renormalize=False),
    ("gpt_oss", "softmax before the choice"): router(over_chosen=False),
    ("gpt_oss", "no clamp"): expert(clamp=None),
    ("gpt_oss", "silu"): expert(gain=1.0),
    ("gpt_oss", "up not offset"): expert(up_offset=0.0),
    ("gpt_oss", "no biases of experts"): expert(bias=False),
    ("gpt_oss", "no sinks"): attn(sinks=False),
    ("gpt_oss", "full layers slide"): only("G", window(6)),
    ("gpt_oss", "yarn truncated"): attn(rope=truncated),
    ("granite_moe", "softmax before the choice"): router(over_chosen=False),
    ("granite_moe", "one expert"): moe(active=1),
    ("granite_moe", "residuals not scaled"): subs(scale=1.0),
    ("granite_moe_shared", "scale of scores"): attn(scale=None),
    ("granite_hybrid_moe", "softmax before the choice"): router(over_chosen=False),
    ("granite_hybrid_moe", "one expert"): moe(active=1),
    ("jamba_moe", "renormalised"): router(renormalize=True),
    ("jamba_moe", "one expert"): moe(active=1),
    ("nemotron_h_moe", "softmax"): router(score="softmax"),
    ("nemotron_h_moe", "no bias in the choice"): router(balance_bias=False),
    ("nemotron_h_moe", "weights not scaled"): router(scale=1.0),
    ("nemotron_h_moe", "not renormalised"): router(renormalize=False),
    ("nemotron_h_moe", "one group more"): router(groups_kept=3),
    ("nemotron_h_moe", "silu"): expert(activation="silu"),
    ("nemotron_h_moe_hub", "renormalised"): router(renormalize=True),
    ("deepseek_v2", "sigmoid"): router(score="sigmoid"),
    ("deepseek_v2", "groups by two scores"): router(group_score="two"),
    ("deepseek_v2", "one group more"): router(groups_kept=3),
    ("deepseek_v2", "weights not scaled"): router(scale=1.0),
    ("deepseek_v2", "renormalised"): router(renormalize=True),
    ("deepseek_v2", "scores without mscale"): latent(scale=None),
    ("deepseek_v2", "rope pairs i, i + P/2"): latent(
        rope=lambda old: dataclasses.replace(old, layout="half")
    ),
    ("glm4_moe", "softmax"): router(score="softmax"),
    ("glm4_moe", "one group more"): router(groups_kept=3),
    ("glm4_moe", "no bias in the choice"): router(balance_bias=False),
    ("glm4_moe", "weights not scaled"): router(scale=1.0),
    ("glm4_moe", "rope on whole heads"): rope(fraction=1.0),
    ("glm4_moe", "queries and keys not normed"): attn(qk_norm=None),
    ("glm4_moe_hub", "renormalised"): router(renormalize=True),
    ("dots1", "window 6 -> 7"): only("S", window(7)),
    ("dots1", "renormalised"): router(renormalize=True),
    ("dots1", "queries and keys not normed"): attn(qk_norm=None),
    ("lfm2_moe", "softmax"): router(score="softmax"),
    ("lfm2_moe", "no bias in the choice"): router(balance_bias=False),
    ("lfm2_moe", "weights not scaled"): router(scale=1.0),
    ("lfm2_moe", "not renormalised"): router(renormalize=False),
    ("minimax_m2", "softmax"): router(score="softmax"),
    ("minimax_m2", "not renormalised"): router(renormalize=False),
    ("minimax_m2", "no bias in the choice"): router(balance_bias=False),
    ("minimax_m2", "head by head"): attn(
        qk_norm=lambda old: dataclasses.replace(old, over="heads")
    ),
    ("minimax_m2_hub", "rope on whole heads"): rope(fraction=1.0),
    ("llama4", "weights on what comes out"): router(weigh_inputs=False),
    ("llama4", "softmax"): router(score="softmax"),
    ("llama4", "two experts"): moe(active=2),
    ("llama4", "no temperature"): attn(temperature=None),
    ("llama4", "queries and keys not normed"): attn(qk_norm=None),
    ("llama4", "chunks of 9"): only("S", attn(mask=And(first=Causal(), second=Chunk(size=9)))),
    ("llama4", "no chunks"): only("C", attn(mask=Causal())),
    ("deepseek_v3", "softmax"): router(score="softmax"),
    ("deepseek_v3", "one group more"): router(groups_kept=3),
    ("deepseek_v3", "groups by one score"): router(group_score="one"),
    ("deepseek_v3", "no bias in the choice"): router(balance_bias=False),
    ("deepseek_v3", "weights not scaled"): router(scale=1.0),
    ("deepseek_v3", "not renormalised"): router(renormalize=False),
    ("deepseek_v3", "rope pairs i, i + P/2"): latent(
        rope=lambda old: dataclasses.replace(old, layout="half")
    ),
    ("deepseek_v3", "scores without mscale"): latent(scale=None),
    ("deepseek_v3", "yarn's factor"): yarn(factor=5.0),
    ("deepseek_v3", "mscale of cos and sin"): yarn(mscale=0.8),
    ("deepseek_v3", "eps of the short vectors"): latent(eps=1e-2),
}


@pytest.mark.parametrize(("name", "what"), MUTATIONS)
def test_a_flipped_feature_moves_the_logits(name, what, models):
    check_moved(models(name), MUTATIONS[name, what], name, what)


@pytest.mark.parametrize("name", OURS)
def test_every_expert_has_a_tensor_and_no_two_the_same(name):
    checkpoint = open_checkpoint(golden(name).source)
    places = [(entry.path, entry.index) for entry in checkpoint.entries]
    assert len(set(places)) == len(places)
    assert set(saved_paths(checkpoint.spec)) == {path for path, _ in places}
    assert len(saved_paths(checkpoint.spec)) == len({path for path, _ in places})


def copy(name, tmp_path, **changes):
    """A copy of a golden model with keys of its config changed; None removes one."""
    folder = tmp_path / "model"
    shutil.copytree(golden(name).source, folder)
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


PROBLEMS = {
    "too many active": ("mixtral", {"num_experts_per_tok": 5}, "active is 1 to 4"),
    "no experts": ("olmoe", {"num_experts": 0}, "experts is positive"),
    "clipped": ("olmoe", {"clip_qkv": 8.0}, "clip_qkv"),
    "a layer that is none": ("qwen3_moe", {"mlp_only_layers": [7]}, "mlp_only_layers"),
    "a window unused": ("qwen2_moe", {"use_sliding_window": False}, "use_sliding_window"),
    "groups": ("deepseek_v3", {"n_group": 4}, "no multiple of the router's groups 4"),
    "another way to choose": ("deepseek_v3", {"topk_method": "greedy"}, "topk_method"),
    "another score": ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func"),
    "a method unknown": ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc'"),
    "weights divided": ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob"),
    "groups of V2": ("deepseek_v2", {"topk_group": 4}, "groups_kept is 1 to groups = 3"),
    "no divisor": ("granite_moe", {"logits_scaling": 0.0}, "logits_scaling is 0"),
    "too many of a hybrid's": ("jamba_moe", {"num_experts_per_tok": 6}, "active is 1 to 5"),
    "offset of experts": ("jamba_moe", {"expert_layer_offset": 2}, "not below expert_layer_period"),
    "shared experts": ("nemotron_h_moe", {"n_shared_experts": 2}, "n_shared_experts"),
    "ropes": ("llama4", {"no_rope_layers": [1, 1]}, "no_rope_layers"),
    "kinds beside ropes": ("llama4", {"layer_types": ["full_attention"] * 4}, "layer_types"),
    "odd rope": ("deepseek_v3", {"qk_rope_head_dim": 7}, "even number"),
    "a routing without bias": ("minimax_m2", {"use_routing_bias": False}, "use_routing_bias is F"),
    "lightning attention": ("minimax_m2", {"attn_type_list": [1, 0]}, "attn_type_list has another"),
    "groups of GLM": ("glm4_moe", {"n_group": 4}, "no multiple of the router's groups 4"),
    "kinds of dots": ("dots1", {"layer_types": ["full_attention"]}, "has 1 layers"),
    "unknown": ("deepseek_v3", {"index_topk": 4}, "unknown key 'index_topk'"),
}


@pytest.mark.parametrize("what", PROBLEMS)
def test_a_contradiction_is_named(what, tmp_path):
    check_named(PROBLEMS[what], tmp_path)


def test_a_missing_expert_is_named(tmp_path):
    from safetensors.numpy import save_file

    folder, name = copy("mixtral", tmp_path), "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    found = tensors(folder)
    del found[name]
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=f"{name} is missing"):
        open_checkpoint(folder)


def further(folder, layers):
    """The files of a model with a layer more, as it stands in files that predict further tokens."""
    from safetensors.numpy import save_file

    found = tensors(folder)
    last = f"model.layers.{layers - 1}."
    more = {k.replace(last, f"model.layers.{layers}."): v for k, v in found.items() if last in k}
    ends = ("eh_proj", "enorm", "hnorm", "shared_head.norm", "shared_head.head", "embed_tokens")
    norm = found["model.norm.weight"]
    more |= {f"model.layers.{layers}.{name}.weight": norm for name in ends}
    save_file(found | more, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_layer_that_predicts_further_tokens_is_left_out(tmp_path):
    folder = copy("deepseek_v3", tmp_path, num_nextn_predict_layers=1)
    further(folder, 2)
    assert open_checkpoint(folder).spec == open_checkpoint(golden("deepseek_v3").source).spec


def test_a_layer_too_many_is_no_such_layer(tmp_path):
    folder = copy("deepseek_v3", tmp_path, num_hidden_layers=1)
    with pytest.raises(WeightsError, match=r"model.layers.1.* is used by nothing"):
        open_checkpoint(folder)
