"""Tiny models of all families against transformers, through the files that transformers saved.

Every test says its greatest relative error with `pytest -rP`.
"""

import json
import shutil

import jax
import numpy as np
import pytest

import jaxllm
from jaxllm.core.policy import Policy
from tests.oracle.golden import NAMES, TOLERANCE, golden, relative, tensors

POLICIES = {"default": None, "scan": Policy(layout="scan", fused=False)}
SAFETENSORS = [name for name in NAMES if golden(name).source.is_dir()]
# Every program costs a second to compile: the plain run holds one of each kind, --slow all pairs.
# One golden of each later family is in the plain run, those of the other dialect are slow.
LATER = (
    "bamba_hub",
    "cohere2_hub",
    "falcon_h1_hub",
    "gemma1_hub",
    "gemma2_hub",
    "gemma3_hub",
    "gemma3_vision_hub",
    "gpt2_hub",
    "gpt_neox_hub",
    "gpt_neox_whole",
    "granite_hub",
    "granite_hybrid",
    "granite_hybrid_hub",
    "granite_hybrid_moe_hub",
    "jamba_hub",
    "jamba_moe_hub",
    "lfm2_hub",
    "mamba_hub",
    "mamba2_hub",
    "nemotron_h_hub",
    "nemotron_h_moe_hub",
    "olmo2_hub",
    "olmo3_hub",
    "phi2_hub",
    "phi3_longrope_hub",
    "phi3_partial_hub",
    "qwen3_window",
    "smollm3_hub",
    "zamba2_hub",
    *("kimi_linear_hub", "minimax_hub", "olmo_hybrid_nope", "qwen3_next_hub"),
    *("arcee_hub", "ernie4_5_hub", "exaone4_hub", "glm4_hub", "helium", "nemotron_hub"),
    *("seed_oss", "seed_oss_hub"),
    *("gguf_gemma2", "gguf_phi3", "gguf_qwen3"),
    *(
        "deepseek_v2_hub",
        "deepseek_v3_hub",
        "glm4_moe_hub",
        "gpt_oss_hub",
        "llama4_hub",
        "minimax_m2_hub",
        "granite_moe_hub",
        "granite_moe_shared",
        "mixtral_hub",
        "olmoe",
        "olmoe_hub",
        "qwen2_moe_hub",
        "qwen3_moe",
        "qwen3_moe_hub",
    ),
)
SOON = tuple(name for name in NAMES if name not in LATER)
LOGITS = {
    "default": SOON,
    "scan": (
        "gguf_f32",
        "llama_bias",
        "llama_gqa_scaled",
        "llama_linear",
        "llama_mqa",
        "llama_odd",
        "mistral_window",
        "qwen2",
        "smollm2",
    ),
}
GREEDY = {
    "default": (
        "llama_gqa_scaled",
        "llama_bias",
        "mistral_window",
        "qwen2",
        "gguf_f32",
        "gemma2",
        "cohere2",
        "gpt2",
        "qwen3_next",
        "olmo_hybrid",
        "minimax",
        "kimi_linear",
        "zamba2",
        "llama_dynamic_hub",
        "llama_longrope_hub",
        "jamba",
        "mamba2",
        "deepseek_v3",
        "llama4",
    ),
    "scan": ("llama_mqa", "llama_odd", "mistral_window"),
}


def pairs(quick):
    """(name, layout) of every golden in both layouts, those that are not quick marked slow."""
    every = [(name, layout) for layout in POLICIES for name in NAMES]
    slow = pytest.mark.slow
    return [pytest.param(n, k, marks=() if n in quick[k] else slow) for n, k in every]


def load(source, layout="default", store=False):
    """A model in float32 in one of the two layouts."""
    policy = POLICIES[layout]
    dtype = "float32" if policy is None else None
    return jaxllm.load(source, dtype=dtype, policy=policy, store=store)


def same_bits(first, second):
    """Whether two parameter trees hold the same paths, dtypes and bits."""
    assert jax.tree.structure(first) == jax.tree.structure(second)
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return all(
        a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs
    )


def own_tensors(folder):
    """The tensors that a model is saved with: no vision tower, no tables that follow from others.

    They have the names of a text model.
    """
    found, inner = tensors(folder), "language_model."
    found = {k: v for k, v in found.items() if not k.endswith("_decay")}
    if not any(name.startswith(inner) for name in found):
        return found
    return {k.removeprefix(inner): v for k, v in found.items() if k.startswith(inner)}


def test_there_is_something_to_check():
    assert len(NAMES) >= 24
    noise = {name: golden(name).provenance["float32_noise"] for name in NAMES}
    assert {n for n, x in noise.items() if x > TOLERANCE / 5} == set()


@pytest.mark.parametrize(("name", "layout"), pairs(LOGITS))
def test_logits(name, layout):
    want = golden(name)
    error = relative(load(want.source, layout).logits(want.ids), want.logits)
    print(f"{name} {layout}: {error:.2e}")
    assert error < TOLERANCE


@pytest.mark.parametrize(("name", "layout"), pairs(GREEDY))
def test_greedy_answers_of_two_unequal_prompts_in_one_batch(name, layout):
    want = golden(name)
    model = load(want.source, layout)
    answers = model.generate_batch(want.prompts, max_tokens=len(want.greedy[0]), raw=True)
    assert [a.token_ids for a in answers] == want.greedy
    assert [a.finish_reason for a in answers] == ["length", "length"]


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n in LATER else ()) for n in SAFETENSORS],
)
def test_saved_files_are_those_of_the_reference(name, tmp_path):
    want = golden(name)
    model = load(want.source)
    model.save(tmp_path)
    before, after = own_tensors(want.source), tensors(tmp_path)
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
    for key, value in before.items():
        assert np.array_equal(after[key], value.astype(np.float32)), key
    again = load(tmp_path)
    assert again.spec == model.spec
    assert same_bits(again.params, model.params)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["torch_dtype"] == "float32"


def test_saving_from_the_stacked_layout_writes_the_same_bytes(tmp_path):
    source = golden("llama_bias").source
    for layout in POLICIES:
        load(source, layout).save(tmp_path / layout)
    files = [(tmp_path / layout / "model.safetensors").read_bytes() for layout in POLICIES]
    assert files[0] == files[1]


GGUF = ("gguf_f32", "gguf_gemma3", "gguf_mamba", "gguf_mixtral", "gguf_q8")
GGUF_LATER = ("gguf_gemma2", "gguf_phi3", "gguf_qwen3")


@pytest.mark.parametrize(
    "name", [*GGUF, *(pytest.param(name, marks=pytest.mark.slow) for name in GGUF_LATER)]
)
def test_a_gguf_file_becomes_the_safetensors_of_the_same_model(name, tmp_path):
    want = golden(name)
    model = load(want.source)
    model.save(tmp_path)
    again = load(tmp_path)
    assert again.spec == model.spec
    assert same_bits(again.params, model.params)


def test_bfloat16_files_stay_as_they_are(tmp_path):
    source = golden("llama_sharded").source
    model = jaxllm.load(source, dtype="bfloat16", store=False)
    model.save(tmp_path)
    before, after = tensors(source), tensors(tmp_path)
    assert {k: (v.dtype, v.tobytes()) for k, v in before.items()} == {
        k: (v.dtype, v.tobytes()) for k, v in after.items()
    }


def test_the_store_changes_nothing_and_an_end_token_ends(tmp_path):
    want = golden("smollm2")
    shutil.copytree(want.source, tmp_path / "model")
    first = load(tmp_path / "model", store=True)
    second = load(tmp_path / "model", store=True)
    assert (first.weights_stored, second.weights_stored) == (False, True)
    assert same_bits(first.params, second.params)
    logits = [model.logits(want.ids) for model in (first, second)]
    assert relative(logits[1], want.logits) < TOLERANCE
    assert np.array_equal(*logits)

    def answer(model):
        return model.generate(want.prompts[0], max_tokens=12)

    assert answer(first).token_ids == answer(second).token_ids == want.greedy[0]
    # The eighth token (and one that never comes) as end tokens; the programs come from the store.
    end = want.greedy[0][7]
    stop = want.greedy[0].index(end) + 1
    config = json.loads((tmp_path / "model/config.json").read_text())
    absent = next(i for i in range(80) if i not in want.greedy[0])
    config["eos_token_id"] = [absent, end]
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    third = answer(load(tmp_path / "model", store=True))
    assert (third.token_ids, third.finish_reason) == (want.greedy[0][:stop], "stop")


def test_both_dialects_of_a_config_say_the_same_model(tmp_path):
    """The words of transformers 5 and those of older files on the hub, for every kind of rope."""
    scaled = ("llama_gqa_scaled", "llama_linear", "llama_yarn", "llama_dynamic", "llama_longrope")
    for name in (*scaled, "mistral_window", "mistral_full"):
        folder = tmp_path / name
        shutil.copytree(golden(name).source, folder)
        config = json.loads((folder / "config.json").read_text())
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
        config["torch_dtype"] = config.pop("dtype")
        (folder / "config.json").write_text(json.dumps(config))
        assert load(folder).spec == load(golden(name).source).spec


def test_parameters_are_float32_on_one_device():
    model = load(golden("llama_mha").source)
    kinds = {(str(leaf.dtype), len(leaf.devices())) for leaf in jax.tree.leaves(model.params)}
    assert kinds == {("float32", 1)}
