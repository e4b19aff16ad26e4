"""Dense families beside Llama: each feature flipped moves the logits, and files that do not fit."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import jaxllm
from jaxllm.errors import ConfigError, WeightsError
from jaxllm.spec.mask import Causal
from jaxllm.spec.model import Sub
from jaxllm.spec.ops import MLP
from jaxllm.spec.rope import LinearScaling, Rope
from jaxllm.zoo.families import FAMILIES
from jaxllm.zoo.load import open_checkpoint, saved_paths
from jaxllm.zoo.table import ConfigReader
from tests.contracts.specs import SPECS
from tests.oracle.checks import check_moved, check_named
from tests.oracle.golden import NAMES, TOLERANCE, copy, golden, relative, tensors
from tests.oracle.mutate import (
    POLICY,
    attn,
    change,
    logits,
    only,
    part,
    renorm,
    rope,
    subs,
    window,
)

DENSE = (
    *("qwen3", "olmo2", "olmo3", "gemma1", "gemma2", "gemma3", "smollm3", "granite", "phi2"),
    *("phi3", "cohere2", "gpt2", "gpt_neox", "seed_oss", "ernie4_5", "arcee", "helium", "glm4"),
    *("nemotron", "exaone4"),
)
OTHERS = (
    "gemma3_vision",
    "granite_hybrid",
    "nemotron_h",
    "qwen3_next",
)  # of other test files, as all with experts
OURS = [n for n in NAMES if n.startswith(DENSE) and "_moe" not in n and not n.startswith(OTHERS)]


def act(name):
    """Another activation."""
    return lambda s: change(s, MLP, activation=name)


def qk_norm(**changes):
    """A mutation of the norm of queries and keys."""
    return attn(qk_norm=renorm(**changes))


def all_short(rope):
    """A rope whose long factors are the short ones."""
    scaling = dataclasses.replace(rope.scaling, long_factor=rope.scaling.short_factor)
    return dataclasses.replace(rope, scaling=scaling)


def one_norm(spec):
    """Both ops read what the attention's norm gives."""

    def shared(sub):
        scale = lambda op: dataclasses.replace(op, norm_in=None)  # noqa: E731
        return dataclasses.replace(sub, ops=tuple(map(scale, sub.ops)), norm_in=sub.ops[0].norm_in)

    return dataclasses.replace(
        spec,
        blocks=tuple(dataclasses.replace(b, subs=tuple(map(shared, b.subs))) for b in spec.blocks),
    )


def one_after_the_other(spec):
    """Attention, then an MLP on the same norm without leaves of its own: no parallel block."""

    def split(block):
        first, second = block.subs[0].ops
        subs = (Sub(ops=(first,), norm_in=block.subs[0].norm_in), Sub(ops=(second,)))
        return dataclasses.replace(block, subs=subs)

    return dataclasses.replace(spec, blocks=tuple(split(b) for b in spec.blocks))


MUTATIONS = {
    ("qwen3", "queries and keys normed after rope"): qk_norm(after_rope=True),
    ("qwen3", "queries and keys by LayerNorm"): qk_norm(type="layer"),
    ("qwen3", "its scale is 1 + w"): qk_norm(offset=1.0),
    ("qwen3", "its eps"): qk_norm(eps=1e-2),
    ("qwen3", "head_dim is not D / N"): attn(scale=6**-0.5),
    ("qwen3_window", "full layers slide"): only("G", window(9)),
    ("qwen3_window", "sliding layers are full"): only("L", attn(mask=Causal())),
    ("qwen3_window", "window 9 -> 10"): only("L", window(10)),
    ("qwen3_window", "one more full layer"): lambda s: dataclasses.replace(s, layers="G*2 L"),
    ("olmo2", "after rope"): qk_norm(after_rope=True),
    ("olmo2", "head by head"): qk_norm(over="heads"),
    ("olmo2", "norms out are 1 + w"): subs(norm_out=renorm(offset=1.0)),
    ("gemma2", "cap of scores off"): attn(softcap=None),
    ("gemma2", "cap of scores 1.25 -> 1.3"): attn(softcap=1.3),
    ("gemma2", "cap of logits off"): part("head", softcap=None),
    ("gemma2", "cap of logits 1.5 -> 1.6"): part("head", softcap=1.6),
    ("gemma2", "scale of scores is H^-1/2"): attn(scale=None),
    ("gemma2", "embedding not scaled"): part("embedding", scale=1.0),
    ("gemma2", "norms in are w"): subs(norm_in=renorm(offset=0.0)),
    ("gemma2", "norms out are w"): subs(norm_out=renorm(offset=0.0)),
    ("gemma2", "final norm is w"): part("final_norm", offset=0.0),
    ("gemma2", "silu"): act("silu"),
    ("gemma2", "sliding layers are full"): only("L", attn(mask=Causal())),
    ("gemma2", "full layers slide"): only("G", window(6)),
    ("gemma2", "window 6 -> 7"): only("L", window(7)),
    ("gemma2", "full layers first"): lambda s: dataclasses.replace(s, layers="G L G"),
    ("gemma3", "norm of queries and keys is w"): qk_norm(offset=0.0),
    ("gemma3", "after rope"): qk_norm(after_rope=True),
    ("gemma3", "scale of scores is H^-1/2"): attn(scale=None),
    ("gemma3", "the global rope on local layers"): only("L", attn(rope=Rope(theta=2000.0))),
    ("gemma3", "the local rope on global layers"): only("G", attn(rope=Rope(theta=30.0))),
    ("gemma3", "embedding not scaled"): part("embedding", scale=1.0),
    ("gemma3", "window 6 -> 5"): only("L", window(5)),
    ("gemma3_hub", "the global rope not scaled"): only("G", rope(scaling=None)),
    ("gemma3_hub", "the local rope scaled"): only("L", rope(scaling=LinearScaling(factor=4.0))),
    ("smollm3", "rope on every layer"): only("N", attn(rope=Rope(theta=2e6))),
    ("smollm3", "no rope on the others"): only("G", attn(rope=None)),
    ("smollm3", "theta"): only("G", attn(rope=Rope(theta=1e4))),
    ("smollm3", "another layer without rope"): lambda s: dataclasses.replace(s, layers="G*4 N"),
    ("smollm3_hub", "sliding layers are full"): only("L", attn(mask=Causal())),
    ("smollm3_hub", "those without rope too"): only("M", attn(mask=Causal())),
    ("granite", "embedding not scaled"): part("embedding", scale=1.0),
    ("granite", "scale of scores is H^-1/2"): attn(scale=None),
    ("granite", "residual not scaled"): subs(scale=1.0),
    ("granite", "logits multiplied"): part("head", scale=0.7),
    ("phi3_partial", "rope on whole heads"): rope(fraction=1.0),
    ("phi3_partial_hub", "rope on three quarters"): rope(fraction=0.75),
    ("phi3_partial_hub", "no window"): attn(mask=Causal()),
    ("phi3_longrope", "not scaled"): rope(scaling=None),
    ("phi3_longrope_hub", "not scaled"): rope(scaling=None),
    ("phi3_longrope_hub", "short past the original"): attn(rope=all_short),
    ("cohere2", "rope pairs i, i + H/2"): only("L", attn(rope=Rope())),
    ("cohere2", "rope on full layers"): only("G", attn(rope=Rope(layout="interleaved"))),
    ("cohere2", "logits not scaled"): part("head", scale=1.0),
    ("cohere2", "RMSNorm"): subs(norm_in=renorm(type="rms")),
    ("cohere2", "a final RMSNorm"): part("final_norm", type="rms"),
    ("cohere2", "one op after the other"): one_after_the_other,
    ("olmo3", "sliding layers are full"): only("L", attn(mask=Causal())),
    ("olmo3", "window 6 -> 7"): only("L", window(7)),
    ("olmo3", "head by head"): qk_norm(over="heads"),
    ("olmo3_hub", "full layers not scaled"): only("G", rope(scaling=None)),
    ("olmo3_hub", "one theta"): only("L", rope(theta=3e3)),
    ("gemma1", "norms in are w"): subs(norm_in=renorm(offset=0.0)),
    ("gemma1", "embedding not scaled"): part("embedding", scale=1.0),
    ("gemma1_hub", "silu"): act("silu"),
    ("gpt_neox", "rope on whole heads"): rope(fraction=1.0),
    ("gpt_neox", "one norm"): one_norm,
    ("gpt_neox", "silu"): act("silu"),
    ("gpt_neox_hub", "theta"): rope(theta=1e4),
    ("gpt_neox_whole", "not scaled"): rope(scaling=None),
    ("phi2", "rope on whole heads"): rope(fraction=1.0),
    ("phi2", "silu"): act("silu"),
    ("gpt2", "no positions"): part("embedding", positions=None),
    ("gpt2", "a rope too"): attn(rope=Rope()),
    ("gpt2", "scores not scaled"): attn(scale=1.0),
    ("gpt2", "RMSNorm"): subs(norm_in=renorm(type="rms")),
    ("gpt2", "silu"): act("silu"),
    ("gpt2_hub", "scores scaled"): attn(scale=None),
    ("ernie4_5", "rope pairs i, i + H/2"): rope(layout="half"),
    ("helium", "rope pairs i, i + H/2"): rope(layout="half"),
    ("helium", "theta"): rope(theta=1e4),
    ("arcee", "relu"): act("relu"),
    ("glm4", "no norms out"): subs(norm_out=None),
    ("glm4", "rope on whole heads"): rope(fraction=1.0),
    ("glm4_hub", "rope pairs i, i + H/2"): rope(layout="half"),
    ("nemotron", "norms in are w"): subs(norm_in=renorm(offset=0.0)),
    ("nemotron", "final norm is w"): part("final_norm", offset=0.0),
    ("nemotron", "RMSNorm"): subs(norm_in=renorm(type="rms", bias=False)),
    ("nemotron", "rope on whole heads"): rope(fraction=1.0),
    ("exaone4", "a rope on full layers"): only("G", attn(rope=Rope())),
    ("exaone4", "sliding layers are full"): only("L", attn(mask=Causal())),
    ("exaone4", "after rope"): only("L", qk_norm(after_rope=True)),
    ("exaone4", "no norms out"): subs(norm_out=None),
    ("exaone4_hub", "no rope"): attn(rope=None),
    ("cohere2", "window 6 -> 7"): only("L", window(7)),
    ("cohere2", "sliding layers are full"): only("L", attn(mask=Causal())),
}


@pytest.mark.parametrize(("name", "what"), MUTATIONS)
def test_a_flipped_feature_moves_the_logits(name, what, models):
    check_moved(models(name), MUTATIONS[name, what], name, what)


def test_the_two_gelus_are_told_apart(models):
    """They differ by less than 5e-4 anywhere, so this feature alone moves less than the others."""
    model, want = models("gemma2"), golden("gemma2")
    moved = relative(logits(act("gelu")(model.spec), model.params, want.ids), want.logits)
    print(f"{moved:.1e}")
    assert moved > 20 * TOLERANCE


@pytest.mark.parametrize("name", OURS)
def test_every_layer_has_the_leaves_of_the_file(name):
    """No tensor fills two leaves, and no leaf is filled twice."""
    checkpoint = open_checkpoint(golden(name).source)
    paths = [entry.path for entry in checkpoint.entries]
    assert len(set(paths)) == len(paths)
    assert sorted(saved_paths(checkpoint.spec)) == sorted(paths)


@pytest.mark.parametrize("name", [n for n in OURS if not n.endswith("_hub")])
def test_a_feature_that_the_family_does_not_know_is_named(name, tmp_path):
    folder = copy(name, tmp_path, num_local_experts=8)
    with pytest.raises(ConfigError, match="unknown key 'num_local_experts'") as caught:
        open_checkpoint(folder)
    assert str(caught.value).startswith(str(folder / "config.json"))


SLIDING, FULL = "sliding_attention", "full_attention"
PROBLEMS = {
    "a kind of layer": ("gemma2", {"layer_types": [SLIDING, FULL, "chunked_attention"]}, "chunked"),
    "too few layers": ("gemma2", {"layer_types": [SLIDING, FULL]}, "has 2 layers"),
    "no layers": ("qwen3", {"num_hidden_layers": 0, "layer_types": []}, "1 to 10000 layers"),
    "very many layers": ("qwen3", {"num_hidden_layers": 2**40}, "1 to 10000 layers"),
    "no scalar": ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0"),
    "both ways": ("gemma2", {"use_bidirectional_attention": True}, "bidirectional"),
    "a cap nobody applies": ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    "a third rope": ("gemma3", {"rope_parameters": {"conv": {}, FULL: {}}}, "'conv'"),
    "a window unused": ("qwen3_window", {"use_sliding_window": False}, "use_sliding_window"),
    "ropes": ("smollm3", {"no_rope_layers": [1, 1, 2, 0, 1]}, "no_rope_layers"),
    "no window": ("smollm3_hub", {"sliding_window": None}, "sliding_window is missing"),
    "no divisor": ("granite", {"logits_scaling": 0.0}, "logits_scaling is 0"),
    "biases": ("phi3_partial", {"attention_bias": True}, "attention_bias"),
    "norms of heads": ("phi2", {"qk_layernorm": True}, "qk_layernorm"),
    "both directions": ("gemma1", {"use_bidirectional_attention": True}, "bidirectional"),
    "heads": ("gpt_neox", {"num_attention_heads": 5}, "no multiple of num_attention_heads 5"),
    "odd rope": (
        "phi3_partial",
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.4}},
        "even",
    ),
    "normed queries": ("cohere2", {"use_qk_norm": True}, "use_qk_norm is True"),
    "scores by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer"),
    "odd heads": ("gpt2", {"n_head": 5}, "no multiple of n_head 5"),
    "no window to slide": ("exaone4", {"sliding_window": 0}, "sliding_window is missing"),
    "a bias nobody has": ("glm4", {"mlp_bias": True}, "unknown key 'mlp_bias'"),
    "an activation": ("nemotron", {"hidden_act": "tanh"}, "hidden_act 'tanh' is unknown"),
    "partial rope": ("qwen3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
}


@pytest.mark.parametrize("what", PROBLEMS)
def test_a_contradiction_is_named(what, tmp_path):
    check_named(PROBLEMS[what], tmp_path)


def test_a_fused_tensor_of_another_shape_is_named_once(tmp_path):
    folder = copy("phi3_partial", tmp_path)
    found = tensors(folder)
    name = "model.layers.0.self_attn.qkv_proj.weight"
    found[name] = np.ascontiguousarray(found[name][:-1])
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"has shape \(39, 24\), not \(40, 24\)") as caught:
        open_checkpoint(folder)
    assert str(caught.value).count(name) == 1


def test_phi3_with_whole_rope_is_saved_as_the_llama_that_it_is(tmp_path):
    changes = {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 1.0}
    folder = copy("phi3_partial", tmp_path, rope_parameters=changes)
    model = jaxllm.load(folder, dtype="float32", store=False)
    model.save(tmp_path / "saved")
    again = jaxllm.load(tmp_path / "saved", dtype="float32", store=False)
    assert json.loads((tmp_path / "saved/config.json").read_text())["model_type"] == "llama"
    assert again.spec == model.spec
    same = jax.tree.map(lambda a, b: bool((a == b).all()), again.params, model.params)
    assert all(jax.tree.leaves(same))


def test_gpt2_files_of_the_bare_body(tmp_path):
    """The first files on the hub have no prefix, and the causal mask beside the weights."""
    folder = copy("gpt2", tmp_path)
    found = {k.removeprefix("transformer."): v for k, v in tensors(folder).items()}
    found["h.0.attn.bias"] = np.ones((1, 1, 48, 48), np.float32)
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    want = golden("gpt2")
    model = jaxllm.load(folder, policy=POLICY, store=False)
    assert relative(logits(model.spec, model.params, want.ids), want.logits) < TOLERANCE


@pytest.mark.parametrize("scale", [None, 0.0, 1e-9, 2.0])
def test_every_family_may_be_asked_to_write_any_spec(scale):
    """A family that cannot say a spec gives None or words that mean another, and does not fail."""
    for spec in SPECS.values():
        spec = attn(scale=scale)(part("head", scale=scale or 1.0)(spec))
        for family in FAMILIES.values():
            config = family.write(spec)
            assert config is None or config["model_type"] in family.model_types


def test_padding_past_the_last_position_changes_nothing(models):
    model, want = models("gpt2"), golden("gpt2")
    assert model.spec.embedding.positions == 48
    padded = np.pad(want.ids, ((0, 0), (0, 64 - want.ids.shape[1])))
    found = logits(model.spec, model.params, padded)
    assert np.isfinite(found).all()
    assert relative(found[:, : want.ids.shape[1]], want.logits) < TOLERANCE


def test_absent_keys_mean_what_the_reference_means(tmp_path):
    """Periods of layer types, with which older files go without a list."""
    wanted = {
        "gemma2": (12, "(L G)*6"),
        "gemma3": (34, "(L*5 G)*5 L*4"),
        "cohere2": (9, "(L*3 G)*2 L"),
        "smollm3": (9, "(G*3 N)*2 G"),
    }
    for name, (layers, pattern) in wanted.items():
        changes = {"layer_types": None, "no_rope_layers": None, "num_hidden_layers": layers}
        folder = copy(name, tmp_path / name, **changes)
        with pytest.raises(WeightsError, match="is missing"):  # the spec is read, weights lack
            open_checkpoint(folder)
        assert spec_of(folder).layers == pattern


def spec_of(folder):
    """The spec of a directory whose weights may be another's."""
    config = json.loads((folder / "config.json").read_text())
    family = next(f for f in FAMILIES.values() if config["model_type"] in f.model_types)
    return family.read(ConfigReader(config, "config.json"))
