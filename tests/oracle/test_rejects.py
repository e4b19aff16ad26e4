"""Files that do not fit: every problem in one error, which names file, keys and tensors."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

import jaxllm
from jaxllm.errors import ConfigError, UnsupportedError, WeightsError
from jaxllm.spec.rope import Rope, YarnScaling
from jaxllm.zoo.families import FAMILIES
from jaxllm.zoo.load import open_checkpoint
from jaxllm.zoo.table import ConfigReader
from tests.oracle.golden import golden, tensors


@pytest.fixture
def folder(tmp_path):
    """A copy of a golden model that may be damaged."""
    place = tmp_path / "model"
    shutil.copytree(golden("llama_bias").source, place)
    return place


def edit(folder, **changes):
    """Change keys of config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def retensor(folder, **changes):
    """Change tensors of model.safetensors by a function of the old value; None removes one."""
    found = tensors(folder)
    for name, function in changes.items():
        if function is None:
            del found[name]
        else:
            found[name] = np.ascontiguousarray(function(found.get(name)))
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})


def rejected(folder, kind):
    """The message that opening the directory raises."""
    with pytest.raises(kind) as caught:
        jaxllm.load(folder, dtype="float32", store=False)
    assert type(caught.value) is kind
    return str(caught.value)


def test_all_problems_of_the_tensors_stand_in_one_error(folder):
    changes = {
        "model.norm.weight": None,
        "model.layers.1.mlp.up_proj.bias": None,
        "model.layers.0.self_attn.q_proj.weight": lambda x: x.T[:-1],
        "model.layers.7.mlp.up_proj.weight": lambda _: np.zeros((3, 4), np.float32),
        "model.embed_tokens.weight": lambda x: x.astype(np.int32),
    }
    retensor(folder, **changes)
    message = rejected(folder, WeightsError)
    assert str(folder) in message
    for expected in (
        "model.norm.weight is missing",
        "model.layers.1.mlp.up_proj.bias is missing",
        "model.layers.0.self_attn.q_proj.weight has shape (31, 32), not (32, 32)",
        "model.layers.7.mlp.up_proj.weight is used by nothing",
        "model.embed_tokens.weight has dtype I32, not a float",
    ):
        assert expected in message
    assert "more" not in message


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.uint16, np.uint32, np.uint64, np.bool_])
def test_whole_numbers_are_no_weights(folder, dtype):
    retensor(folder, **{"lm_head.weight": lambda x: x.astype(dtype)})
    assert "lm_head.weight has dtype" in rejected(folder, WeightsError)


def test_a_longer_list_is_cut(folder):
    changes = dict.fromkeys([name for name in tensors(folder) if "layers.1" in name])
    retensor(folder, **changes)
    assert "and 10 more" in rejected(folder, WeightsError)


def test_all_problems_of_the_config_stand_in_one_error(folder):
    edit(
        folder,
        vocab_size=None,
        hidden_act="swiglu",
        rms_norm_epsilon=1e-5,
        num_hidden_layers="two",
        attention_bias=1,
        rope_parameters={"rope_type": "spiral", "rope_theta": 1e4},
        logit_softcap=30.0,
    )
    message = rejected(folder, ConfigError)
    assert message.startswith(str(folder / "config.json"))
    for expected in (
        "vocab_size is missing",
        "hidden_act 'swiglu' is unknown",
        "'rms_norm_epsilon' (nearest known: rms_norm_eps)",
        "num_hidden_layers is 'two'",
        "attention_bias is 1",
        "rope_type 'spiral'",
        "'logit_softcap'",
    ):
        assert expected in message


ROPE = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
CONTRADICTIONS = {
    "num_key_value_heads": ({"num_key_value_heads": 3}, "no multiple of kv_heads 3"),
    "odd head_dim": ({"head_dim": 7}, "even"),
    "no layers": ({"num_hidden_layers": 0}, "1 to 10000 layers"),
    "no vocabulary": ({"vocab_size": 0}, "vocab 0"),
    "no eps": ({"rms_norm_eps": 0.0}, "eps is positive"),
    "no head": ({"num_attention_heads": 0, "num_key_value_heads": 0}, "positive"),
    "negative": ({"intermediate_size": -4}, "intermediate_size is -4"),
    "scaling factor": ({"rope_parameters": ROPE | {"factor": 0.5}}, "factor is ≥ 1"),
    "no factor": ({"rope_parameters": ROPE | {"factor": None}}, "factor is missing"),
    "unknown in rope": ({"rope_parameters": ROPE | {"beta_fast": 3}}, "'beta_fast'"),
    "rope type": ({"rope_parameters": ROPE | {"rope_type": "yarm"}}, "did you mean 'yarn'"),
    "longrope of no lists": (
        {"rope_parameters": ROPE | {"rope_type": "longrope"}},
        "short_factor is missing",
    ),
    "longrope's lists": (
        {
            "rope_parameters": ROPE
            | {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0] * 5}
        },
        "long_factor of the rope has 5 numbers; 8 rotated dims need 4",
    ),
    "rope theta": ({"rope_parameters": {"rope_theta": 0.0}}, "theta is positive"),
    "rope theta is no number": ({"rope_parameters": {"rope_theta": "1e4"}}, "rope_theta is '1e4'"),
    "two ropes": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "differ; give one"),
    "rope is a list": ({"rope_parameters": [1]}, "rope_parameters is [1]"),
    "layer types": ({"layer_types": ["full_attention", "conv"]}, "layer_types"),
}


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_a_contradiction_names_the_file(folder, what):
    changes, expected = CONTRADICTIONS[what]
    edit(folder, **changes)
    message = rejected(folder, ConfigError)
    assert message.startswith(str(folder / "config.json"))
    assert message.count(str(folder)) == 1
    assert expected in message


def test_problems_of_the_rope_stand_beside_the_others(folder):
    edit(folder, rope_parameters=ROPE | {"beta_fast": 3, "factor": None}, logit_softcap=30.0)
    message = rejected(folder, ConfigError)
    assert all(word in message for word in ("beta_fast", "factor is missing", "logit_softcap"))


def test_a_window_of_another_family_is_refused(folder):
    shutil.copy(golden("qwen2_hub").source / "config.json", folder)
    edit(folder, use_sliding_window=True)
    assert "use_sliding_window" in rejected(folder, ConfigError)


@pytest.mark.parametrize(("kind", "hint"), [("lama", "'llama'"), ("gpt_bigcode", "gpt2"), (3, "3")])
def test_another_model_type_is_named(folder, kind, hint):
    edit(folder, model_type=kind)
    message = rejected(folder, UnsupportedError)
    assert str(folder / "config.json") in message
    assert f"{str(kind)!r}" in message
    assert hint in message


def test_quantized_files_are_refused_by_name(folder):
    edit(folder, quantization_config={"quant_method": "quanto"})
    assert "quantization_config" in rejected(folder, UnsupportedError)


def test_a_config_that_is_none(folder):
    (folder / "config.json").write_text("[1, 2]")
    assert "expected an object" in rejected(folder, WeightsError)
    (folder / "config.json").write_text("{")
    assert "no JSON" in rejected(folder, WeightsError)
    (folder / "config.json").unlink()
    assert "config.json: is missing" in rejected(folder, WeightsError)


def test_what_carries_nothing_is_let_through(folder):
    """Tables that early files hold beside the weights, and a head that repeats a tied embedding."""
    names = [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in (0, 1)]
    retensor(folder, **dict.fromkeys(names, lambda _: np.ones(4, np.float32)))
    open_checkpoint(folder)
    edit(folder, tie_word_embeddings=True)
    assert open_checkpoint(folder).spec.head.tied


GGUF = {
    "block_count": 1,
    "context_length": 64,
    "embedding_length": 32,
    "feed_forward_length": 56,
    "attention.head_count": 4,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "vocab_size": 80,
}


@pytest.mark.parametrize(
    ("keys", "factor"),
    [
        ({}, None),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, 4.0),
        ({"rope.scaling.factor": 4.0}, 4.0),
        ({"rope.scale_linear": 2.0}, 2.0),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 0.0}, None),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 1.0}, None),
    ],
)
def test_scaling_in_gguf_metadata(keys, factor):
    spec = FAMILIES["llama"].read_gguf(ConfigReader(GGUF | keys, "a.gguf"), {})
    scaling = spec.block(0).subs[0].ops[0].op.rope.scaling
    assert (scaling and scaling.factor) == factor


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, "'yarn' is not supported"),
        ({"rope.scaling.factor": 0.5}, "factor is ≥ 1"),
        ({"rope.freq_base": 0.0}, "theta is positive"),
        ({"attention.head_count_kv": 3}, "no multiple of kv_heads 3"),
        ({"feed_forward_length": 0}, "width is positive"),
        ({"expert_count": 8}, "expert_used_count is missing"),
    ],
)
def test_contradictions_in_gguf_metadata_name_the_file(keys, expected):
    with pytest.raises(ConfigError, match=f"^a.gguf: .*{expected}"):
        FAMILIES["llama"].read_gguf(ConfigReader(GGUF | keys, "a.gguf"), {})


@pytest.mark.parametrize(
    ("family", "keys", "expected"),
    [
        ("qwen3", {"rope.scaling.type": "dynamic"}, "'dynamic' is not supported"),
        ("qwen3", {"rope.dimension_count": 4}, "partial_rotary_factor"),
        ("qwen3", {"attention.value_length": 4}, "value_length differs"),
        ("qwen3", {"expert_count": 8}, "unknown key 'expert_count'"),
        ("gemma2", {}, "attention.sliding_window is missing"),
        ("gemma3", {"attention.sliding_window": 0}, "sliding_window is missing"),
        ("phi3", {"rope.scaling.type": "longrope"}, "'longrope' is not supported"),
        ("llama", {"expert_count": 2, "expert_used_count": 3}, "active is 1 to 2"),
        ("mamba", {"ssm.dt_b_c_rms": True}, "ssm.dt_b_c_rms"),
    ],
)
def test_contradictions_in_gguf_metadata_of_other_families(family, keys, expected):
    with pytest.raises(ConfigError, match=f"^a.gguf: .*{expected}"):
        FAMILIES[family].read_gguf(ConfigReader(GGUF | keys, "a.gguf"), {})


def test_a_scaling_of_gguf_metadata_is_that_of_the_config():
    keys = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 16,
        "rope.freq_base": 1e6,
    }
    spec = FAMILIES["qwen3"].read_gguf(ConfigReader(GGUF | keys, "a.gguf"), {})
    rope = spec.block(0).subs[0].ops[0].op.rope
    assert rope == Rope(theta=1e6, scaling=YarnScaling(factor=4.0, original_context=16))


def test_the_largest_gemma_scales_scores_by_the_width_of_a_query():
    """Its files do not say so; the layers tell it."""
    for layers, scale in ((46, 8**-0.5), (1, 16**-0.5)):
        keys = {"attention.key_length": 16, "attention.sliding_window": 4, "block_count": layers}
        spec = FAMILIES["gemma2"].read_gguf(ConfigReader(GGUF | keys, "a.gguf"), {})
        assert spec.block(0).subs[0].ops[0].op.scale == scale
