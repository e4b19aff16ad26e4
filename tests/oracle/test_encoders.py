"""Tiny encoders against transformers, through the files that transformers saved."""

import dataclasses
import fnmatch
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

import jaxllm
from jaxllm.core.policy import Policy
from jaxllm.errors import ConfigError, UnsupportedError, WeightsError
from jaxllm.spec.mask import Blocks, Causal, Full, Global, Or, Window
from jaxllm.spec.ops import MLP
from jaxllm.zoo.families import FAMILIES
from jaxllm.zoo.load import open_checkpoint
from jaxllm.zoo.safetensors import open_safetensors
from tests.oracle.encoder_golden import NAMES, outputs, rows
from tests.oracle.golden import TOLERANCE, copy, relative, tensors
from tests.oracle.mutate import FACTOR, POLICY, attn, change, only, part, renorm, rope, subs

SCANNED = ("bert_hub", "modernbert")


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


def window(left, right):
    """A window to both sides."""
    return attn(mask=Window(left=left, right=right))


def sees(mask):
    """Another mask."""
    return attn(mask=mask)


def transform(**changes):
    """A mutation of what the head does before the matrix."""
    return lambda s: part("head", transform=dataclasses.replace(s.head.transform, **changes))(s)


NEIGHBOURS = Or(first=Window(left=1, right=1), second=Global(first=1, last=1))
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
    ("modernbert", "local layers see all"): only("L", attn(mask=Full())),
    ("modernbert", "global layers are local"): only("G", attn(mask=Window(left=3, right=3))),
    ("modernbert", "three to the left, two to the right"): only("L", window(3, 2)),
    ("modernbert", "window of four each side"): only("L", window(4, 4)),
    ("modernbert", "the global rope on local layers"): only("L", rope(theta=160_000.0)),
    ("modernbert", "the local rope on global layers"): only("G", rope(theta=10_000.0)),
    ("modernbert", "no norm of the embedding"): part("embedding", norm=None),
    ("modernbert", "no final norm"): lambda s: dataclasses.replace(s, final_norm=None),
    ("modernbert", "silu"): act("silu"),
    ("modernbert", "every second layer is global"): lambda s: dataclasses.replace(
        s, layers="F L G L G"
    ),
    ("modernbert_hub", "no transform"): part("head", transform=None),
    ("modernbert_hub", "no bias of logits"): part("head", bias=False),
    ("longformer", "causal window"): sees(Or(first=Window(left=2), second=Global())),
    ("longformer", "one more each side"): sees(Or(first=Window(left=3, right=3), second=Global())),
    ("longformer", "no global tokens"): attn(
        mask=Window(left=2, right=2), global_projections=False
    ),
    ("longformer", "global tokens by the same projections"): attn(global_projections=False),
    ("longformer", "global tokens by place"): sees(
        Or(first=Window(left=2, right=2), second=Global(first=1))
    ),
    ("longformer", "positions from row 1"): part("embedding", position_offset=1),
    ("longformer_hub", "the windows the other way"): lambda s: dataclasses.replace(
        s, layers="W2 W3"
    ),
    ("bigbird", "everything"): sees(Full()),
    ("bigbird", "other draws"): lambda s: dataclasses.replace(s, layers="B1 B0"),
    ("bigbird", "no draws"): sees(Blocks(size=2, mask=NEIGHBOURS)),
    ("bigbird", "other blocks"): sees(Blocks(size=3, mask=NEIGHBOURS)),
    ("bigbird", "no global keys"): sees(Blocks(size=2, mask=Window(left=1, right=1))),
    ("bigbird_hub", "embedding not scaled"): part("embedding", scale=1.0),
    ("bigbird_hub", "relu"): act("relu"),
    ("modernbert_bias", "gelu in the head"): transform(activation="gelu"),
}


# One of three mutations is in the plain run.
SOME = [
    pytest.param(*pair, marks=() if i % 3 == 0 else pytest.mark.slow)
    for i, pair in enumerate(MUTATIONS)
]


@pytest.mark.parametrize(("name", "what"), SOME)
def test_a_flipped_feature_moves_the_outputs(name, what, models):
    model, want = models(name), rows(name)
    spec = MUTATIONS[name, what](model.spec)
    assert spec != model.spec
    moved = errors(spec, model.params, want)
    print(f"{name}, {what}: {moved}")
    assert max(moved.values()) > FACTOR * TOLERANCE


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
    "a third kind of layer": (
        "modernbert",
        {"layer_types": ["conv"] * 5},
        ConfigError,
        "not supported in this family",
    ),
    "no period": (
        "modernbert_hub",
        {"global_attn_every_n_layers": 0},
        ConfigError,
        "must be positive",
    ),
    "an odd window": ("longformer", {"attention_window": 5}, ConfigError, "must be even"),
    "a window too few": ("longformer", {"attention_window": [4]}, ConfigError, "has 1 layers"),
    "no positions": (
        "longformer",
        {"pad_token_id": 49},
        ConfigError,
        "are no positions",
    ),
    "another attention": (
        "bigbird",
        {"attention_type": "block"},
        ConfigError,
        "block_sparse, original_full",
    ),
    "no blocks": ("bigbird", {"block_size": 0}, ConfigError, "must be positive"),
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


@pytest.mark.parametrize("name", ["bert_hub", "modernbert_hub", "bigbird_hub"])
def test_logits_of_a_model_do_not_depend_on_the_padding_of_programs(name, models):
    """20 tokens run as 32, 37 in blocks of 3 as 39; types are 0 there."""
    model, want = models(name), rows(name)
    plain = dataclasses.replace(
        want, types=np.zeros_like(want.types), lengths=np.full((2,), want.ids.shape[1], np.int32)
    )
    wanted = outputs(model.spec, model.params, plain)["logits"]
    assert relative(model.logits(want.ids), wanted) < TOLERANCE
