"""Models that see: their text part is read, and of the rest nothing is left out unseen."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import jaxllm
from jaxllm.errors import WeightsError
from jaxllm.spec.rope import Rope
from jaxllm.zoo.load import open_checkpoint
from tests.oracle.checks import check_moved, check_named
from tests.oracle.golden import copy, golden, tensors
from tests.oracle.mutate import attn, only, part

NAMES = ("gemma3_vision", "gemma3_vision_hub", "llama4_vision")
MUTATIONS = {
    ("llama4_vision", "no temperature"): attn(temperature=None),
    ("llama4_vision", "queries and keys not normed"): attn(qk_norm=None),
    ("gemma3_vision", "embedding not scaled"): part("embedding", scale=1.0),
    ("gemma3_vision_hub", "the local rope on global layers"): only("G", attn(rope=Rope())),
}


@pytest.mark.parametrize(("name", "what"), MUTATIONS)
def test_a_flipped_feature_moves_the_logits(name, what, models):
    check_moved(models(name), MUTATIONS[name, what], name, what)


@pytest.mark.parametrize("name", NAMES)
def test_a_text_model_of_the_same_words_is_the_same(name, tmp_path):
    """What is saved is a text model, which says so and reads back equal."""
    model = jaxllm.load(golden(name).source, dtype="float32", store=False)
    model.save(tmp_path)
    kind = json.loads((tmp_path / "config.json").read_text())["model_type"]
    assert kind == name.partition("_")[0] + "_text"
    again = jaxllm.load(tmp_path, dtype="float32", store=False)
    assert again.spec == model.spec
    same = jax.tree.map(lambda a, b: bool((a == b).all()), again.params, model.params)
    assert all(jax.tree.leaves(same))


def text(name, **changes):
    """The text part of a golden's config with keys changed."""
    config = json.loads((golden(name).source / "config.json").read_text())
    return {"text_config": config["text_config"] | changes}


PROBLEMS = {
    "no text": ("llama4_vision", {"text_config": None}, "text_config is missing"),
    "text of another kind": (
        "llama4_vision",
        text("llama4_vision", model_type="llama"),
        "text_config.model_type is 'llama', not 'llama4_text'",
    ),
    "two ties": ("gemma3_vision", {"tie_word_embeddings": False}, "tie_word_embeddings is False"),
    "beside": ("gemma3_vision", {"audio_config": {}}, "unknown key 'audio_config'"),
    "inside": (
        "gemma3_vision_hub",
        text("gemma3_vision_hub", index_topk=4),
        "config.json: text_config: unknown key 'index_topk'",
    ),
}


@pytest.mark.parametrize("what", PROBLEMS)
def test_a_contradiction_is_named(what, tmp_path):
    check_named(PROBLEMS[what], tmp_path)


def test_only_the_tower_and_the_projector_are_left_out(tmp_path):
    folder = copy("gemma3_vision", tmp_path)
    more = {"audio_tower.layers.0.weight": np.ones((2, 2), np.float32)}
    save_file(tensors(folder) | more, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"audio_tower.layers.0.weight is used by nothing"):
        open_checkpoint(folder)


def test_a_text_model_has_no_tower(tmp_path):
    """A file that says it has text alone and holds a tower is none that is known."""
    folder = copy("gemma3_vision", tmp_path)
    config = json.loads((folder / "config.json").read_text())["text_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="is missing"):
        open_checkpoint(folder)


def test_the_end_token_of_the_text_part_ends(tmp_path):
    want = golden("gemma3_vision")
    changes = text("gemma3_vision", eos_token_id=want.greedy[0][3])
    folder = copy("gemma3_vision", tmp_path, **changes)
    model = jaxllm.load(folder, dtype="float32", store=False)
    answer = model.generate(want.prompts[0], max_tokens=12)
    stop = want.greedy[0].index(want.greedy[0][3]) + 1
    assert (answer.token_ids, answer.finish_reason) == (want.greedy[0][:stop], "stop")
