"""Tiny encoders against transformers, through the files that transformers saved."""

import dataclasses
import fnmatch
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

import jaxllm
from jaxllm.core.policy import Policy
from jaxllm.errors import ConfigError, UnsupportedError, WeightsError
from jaxllm.spec.mask import Causal
from jaxllm.spec.ops import MLP
from jaxllm.zoo.families import FAMILIES
from jaxllm.zoo.load import open_checkpoint
from jaxllm.zoo.safetensors import open_safetensors
from tests.oracle.encoder_golden import NAMES, outputs, rows
from tests.oracle.golden import TOLERANCE, relative, tensors
from tests.oracle.mutate import FACTOR, POLICY, attn, change, part, renorm, subs

SCANNED = ("bert", "bert_hub")


@pytest.fixture(scope="module")
def models():
    """name -> loaded model, each loaded once."""
    held = {}

    def get(name):
        if name not in held:
            held[name] = jaxllm.load(rows(name).source, policy=POLICY, store=False)
        return held[name]

    return get


def errors(spec, params, want, policy=POLICY):
    """Greatest relative error of hidden states and of logits."""
    found = outputs(spec, params, want, policy)
    return {k: relative(v, getattr(want, k)) for k, v in found.items()}


@pytest.mark.parametrize("name", NAMES)
def test_hidden_states_and_logits(name, models):
    want, model = rows(name), models(name)
    found = errors(model.spec, model.params, want)
    print(name, {k: f"{v:.1e}" for k, v in found.items()})
    assert set(found) == ({"hidden"} if want.logits is None else {"hidden", "logits"})
    assert max(found.values()) < TOLERANCE
    assert want.provenance["float32_noise"] < TOLERANCE / 5


@pytest.mark.parametrize("name", SCANNED)
def test_stacked_and_fused_layouts_agree(name):
    want = rows(name)
    for changes in (
        {"layout": "scan"},
        {"layout": "unrolled", "fused": True, "matrices": "out_in"},
    ):
        policy = Policy(**changes)
        model = jaxllm.load(want.source, policy=policy, store=False)
        assert max(errors(model.spec, model.params, want, policy).values()) < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_saved_files_are_those_of_the_reference(name, models, tmp_path):
    """But for what the family reads over, such as poolers."""
    model = models(name)
    model.save(tmp_path)
    kind = json.loads((rows(name).source / "config.json").read_text())["model_type"]
    family = next(f for f in FAMILIES.values() if kind in f.model_types)
    over = lambda key: any(fnmatch.fnmatchcase(key, g) for g in family.ignored)  # noqa: E731
    before, after = tensors(rows(name).source), tensors(tmp_path)
    assert set(after) <= set(before)
    assert all(over(key) for key in set(before) - set(after))
    for key, value in after.items():
        assert np.array_equal(value, before[key]), key
    again = jaxllm.load(tmp_path, policy=POLICY, store=False)
    assert again.spec == model.spec
    assert relative(outputs(again.spec, again.params, rows(name))["hidden"], rows(name).hidden) < (
        TOLERANCE
    )


def act(name):
    """Another activation."""
    return lambda s: change(s, MLP, activation=name)


def transform(**changes):
    """A mutation of what the head does before the matrix."""
    return lambda s: part("head", transform=dataclasses.replace(s.head.transform, **changes))(s)


MUTATIONS = {
    ("bert", "causal"): attn(mask=Causal()),
    ("bert", "positions one on"): lambda s: dataclasses.replace(
        s, context=40, embedding=dataclasses.replace(s.embedding, position_offset=1)
    ),
    ("bert", "no types"): part("embedding", types=None),
    ("bert", "no norm of the embedding"): part("embedding", norm=None),
    ("bert", "scaled embedding"): part("embedding", scale=24**0.5),
    ("bert", "silu"): act("silu"),
    ("bert", "norms before"): subs(norm_after=None),
    ("bert", "RMSNorm"): subs(norm_after=renorm(type="rms", bias=False)),
    ("bert", "eps"): subs(norm_after=renorm(eps=1e-2)),
    ("bert", "scale of scores"): attn(scale=1.0),
    ("bert_hub", "no transform"): part("head", transform=None),
    ("bert_hub", "transform by relu"): transform(activation="relu"),
    ("bert_hub", "no bias of logits"): part("head", bias=False),
    ("bert_untied", "tied"): part("head", tied=True),
}


@pytest.mark.parametrize(("name", "what"), MUTATIONS)
def test_a_flipped_feature_moves_the_outputs(name, what, models):
    model, want = models(name), rows(name)
    spec = MUTATIONS[name, what](model.spec)
    assert spec != model.spec
    moved = errors(spec, model.params, want)
    print(f"{name}, {what}: {moved}")
    assert max(moved.values()) > FACTOR * TOLERANCE


def copy(name, tmp_path, **changes):
    """A copy of a golden model with keys of its config changed; None removes one."""
    folder = tmp_path / "model"
    shutil.copytree(rows(name).source, folder)
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


def rewrite(folder, change_names):
    """The tensors of a directory under other names; None drops one."""
    found = {change_names(k): v for k, v in tensors(folder).items()}
    found.pop(None, None)
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})


def test_names_of_early_files_and_a_body_within_a_larger_file(tmp_path, models):
    """`gamma` and `beta`; a prefix without a head; buffers that carry nothing."""
    folder = copy("bert_hub", tmp_path, architectures=["BertForTokenClassification"])

    def older(name):
        if name.startswith("cls."):
            return None
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        )

    rewrite(folder, older)
    assert "bert.embeddings.LayerNorm.gamma" in open_safetensors(folder).tensors
    model, want = jaxllm.load(folder, policy=POLICY, store=False), rows("bert_hub")
    assert not model.spec.head.logits
    assert errors(model.spec, model.params, want)["hidden"] < TOLERANCE


def test_the_tensors_say_whether_there_is_a_head(tmp_path):
    folder = copy("bert_hub", tmp_path, architectures=None)
    assert open_checkpoint(folder).spec.head.logits
    rewrite(folder, lambda name: None if name.startswith("cls.") else name)
    assert not open_checkpoint(folder).spec.head.logits


PROBLEMS = {
    "a decoder": ("bert", {"is_decoder": True}, ConfigError, "is_decoder"),
    "relative positions": (
        "bert",
        {"position_embedding_type": "relative_key"},
        ConfigError,
        "relative_key",
    ),
    "odd heads": ("bert", {"num_attention_heads": 5}, ConfigError, "no multiple"),
    "an unknown key": ("bert", {"num_experts": 5}, ConfigError, "unknown key 'num_experts'"),
    "no layers": ("bert", {"num_hidden_layers": 0}, ConfigError, "1 to 10000"),
    "more positions": ("bert", {"max_position_embeddings": 50}, WeightsError, "position_embedd"),
    "more types": ("bert", {"type_vocab_size": 3}, WeightsError, "token_type_embeddings"),
}


@pytest.mark.parametrize("what", PROBLEMS)
def test_a_contradiction_is_named(what, tmp_path):
    name, changes, kind, expected = PROBLEMS[what]
    folder = copy(name, tmp_path, **changes)
    with pytest.raises(kind, match=expected) as caught:
        open_checkpoint(folder)
    assert str(folder) in str(caught.value)


def test_a_head_for_another_task_is_not_dropped_in_silence(tmp_path):
    folder = copy("bert", tmp_path)
    found = tensors(folder) | {"classifier.weight": np.ones((2, 24), np.float32)}
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"classifier.weight is used by nothing"):
        open_checkpoint(folder)


def test_an_encoder_neither_generates_nor_scores(models):
    model = models("bert")
    for ask in (model.generate, lambda p: model.generate_batch([p])):
        with pytest.raises(UnsupportedError, match="encoder"):
            ask([3, 4, 5])
    with pytest.raises(UnsupportedError, match="no logits"):
        model.logits([[3, 4, 5]])


@pytest.mark.parametrize("name", ["bert_hub"])
def test_logits_of_a_model_do_not_depend_on_the_padding_of_programs(name, models):
    """20 tokens run as 32; types are 0 there."""
    model, want = models(name), rows(name)
    plain = dataclasses.replace(
        want, types=np.zeros_like(want.types), lengths=np.full((2,), want.ids.shape[1], np.int32)
    )
    wanted = outputs(model.spec, model.params, plain)["logits"]
    assert relative(model.logits(want.ids), wanted) < TOLERANCE
