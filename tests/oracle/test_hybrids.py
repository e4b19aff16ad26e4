"""Families with recurrences: each feature flipped moves the logits, and files that do not fit."""

import dataclasses

import pytest

import jaxllm
from jaxllm.errors import ConfigError
from jaxllm.spec.cost import kv_bytes_per_token
from jaxllm.spec.ops import MLP, Attention, Convolution, SelectiveScan, StateSpaceDual
from jaxllm.spec.rope import Rope
from jaxllm.zoo.load import open_checkpoint
from tests.oracle.checks import check_moved, check_named
from tests.oracle.golden import copy, golden
from tests.oracle.mutate import attn, change, part, rope, subs

HYBRIDS = (
    "bamba", "falcon_h1", "granite_hybrid", "jamba", "lfm2", "mamba", "mamba2", "nemotron_h"
)  # fmt: skip


def scan(**changes):
    """A mutation of the selective scan."""
    return lambda s: change(s, SelectiveScan, **changes)


def dual(**changes):
    """A mutation of the dual state space."""
    return lambda s: change(s, StateSpaceDual, **changes)


def norm(**changes):
    """A mutation of the dual state space's norm."""
    return dual(norm=lambda old: dataclasses.replace(old, **changes))


def scales(index):
    """One factor of the projections at 1."""
    return dual(scales=lambda old: (*old[:index], 1.0, *old[index + 1 :]))


def named(index, **changes):
    """A mutation of one of the ops that run side by side."""

    def mutate(sub):
        if len(sub.ops) == 1:
            return sub.ops
        changed = dataclasses.replace(sub.ops[index], **changes)
        return tuple(changed if i == index else op for i, op in enumerate(sub.ops))

    def in_sub(sub):
        return dataclasses.replace(sub, ops=mutate(sub))

    def apply(spec):
        blocks = tuple(
            dataclasses.replace(b, subs=tuple(in_sub(s) for s in b.subs)) for b in spec.blocks
        )
        return dataclasses.replace(spec, blocks=blocks)

    return apply


MUTATIONS = {
    ("mamba", "relu"): scan(activation="relu"),
    ("mamba_hub", "silu"): scan(activation="silu"),
    ("jamba", "no norms inside"): scan(inner_eps=None),
    ("jamba", "a rope"): attn(rope=Rope()),
    ("jamba", "silu"): lambda s: scan(activation="silu")(change(s, MLP, activation="silu")),
    ("mamba2", "one group in the norm"): norm(groups=1),
    ("mamba2", "gate after the norm"): norm(before_gate=True),
    ("mamba2", "its eps"): norm(eps=1e-2),
    ("mamba2", "no norm"): dual(norm=None),
    ("mamba2_hub", "no least step"): dual(dt_min=0.0),
    ("mamba2_hub", "no greatest step"): dual(dt_max=None),
    ("bamba", "rope on whole heads"): rope(fraction=1.0),
    ("bamba", "theta"): rope(theta=30.0),
    ("nemotron_h", "least step"): dual(dt_min=1e-3),
    ("nemotron_h", "relu"): lambda s: change(s, MLP, activation="relu"),
    ("nemotron_h", "a rope"): attn(rope=Rope()),
    ("falcon_h1", "factor on z"): scales(0),
    ("falcon_h1", "factor on x"): scales(1),
    ("falcon_h1", "factor on b"): scales(2),
    ("falcon_h1", "factor on c"): scales(3),
    ("falcon_h1", "factor on dt"): scales(4),
    ("falcon_h1", "factor before the state space"): named(0, scale_in=1.0),
    ("falcon_h1", "factor after it"): named(0, scale=1.0),
    ("falcon_h1", "factor before attention"): named(1, scale_in=1.0),
    ("falcon_h1", "factor after attention"): named(1, scale=1.0),
    ("falcon_h1", "factor on keys"): attn(scale=None),
    ("falcon_h1", "factor on the gate"): lambda s: change(s, MLP, gate_scale=1.0),
    ("falcon_h1", "factors after the mlp"): subs(scale=1.0),
    ("falcon_h1", "factor on the embedding"): part("embedding", scale=1.0),
    ("falcon_h1", "factor on the logits"): part("head", scale=1.0),
    ("falcon_h1", "norm after the gate"): norm(before_gate=False),
    ("lfm2", "no norm of queries and keys"): attn(qk_norm=None),
    ("lfm2", "theta"): rope(theta=1e4),
    ("granite_hybrid", "residuals not scaled"): subs(scale=1.0),
    ("granite_hybrid", "a rope"): attn(rope=Rope()),
    ("granite_hybrid", "scale of scores"): attn(scale=None),
}


@pytest.mark.parametrize(("name", "what"), MUTATIONS)
def test_a_flipped_feature_moves_the_logits(name, what, models):
    check_moved(models(name), MUTATIONS[name, what], name, what)


def test_both_dialects_say_the_same_kinds_of_op():
    for name in HYBRIDS:
        both = [open_checkpoint(golden(n).source).spec for n in (name, f"{name}_hub")]
        kinds = [{type(o.op) for b in s.blocks for u in b.subs for o in u.ops} for s in both]
        assert kinds[0] == kinds[1]
        assert kinds[0] & {SelectiveScan, StateSpaceDual, Convolution}
        assert (Attention in kinds[0]) == ("mamba" not in name)


PROBLEMS = {
    "channels": ("mamba", {"intermediate_size": 50}, "intermediate_size is not expand"),
    "no state": ("mamba", {"state_size": 0}, "state"),
    "an activation": ("mamba", {"hidden_act": "tanh"}, "hidden_act 'tanh' is unknown"),
    "head width": ("mamba2", {"head_dim": 7}, "7 x 6 heads are not 48 channels"),
    "groups": ("mamba2", {"n_groups": 4}, "no multiple of groups 4"),
    "limits": ("mamba2", {"time_step_limit": [0.5, 0.1]}, "time_step_limit"),
    "limits of another kind": ("mamba2", {"time_step_limit": ["a", 1]}, "time_step_limit"),
    "offset": ("jamba", {"attn_layer_offset": 3}, "not below attn_layer_period 3"),
    "a layer too many": ("bamba", {"attn_layer_indices": [3]}, "attn_layer_indices"),
    "a kind of layer": ("nemotron_h", {"layers_block_type": ["mlp", "rnn"]}, "'rnn'"),
    "layers": ("nemotron_h_hub", {"num_hidden_layers": 7}, "num_hidden_layers is not 4"),
    "biases": ("nemotron_h", {"attention_bias": True}, "attention_bias is True"),
    "tied": ("nemotron_h", {"tie_word_embeddings": True}, "tie_word_embeddings is True"),
    "factors": ("falcon_h1", {"ssm_multipliers": [1.0, 2.0]}, "ssm_multipliers"),
    "conv layers": ("lfm2", {"layer_types": ["conv", "gru", "conv"]}, "'gru'"),
    "positions": ("granite_hybrid", {"position_embedding_type": "alibi"}, "alibi"),
    "no divisor": ("granite_hybrid", {"logits_scaling": 0.0}, "logits_scaling is 0"),
}


@pytest.mark.parametrize("what", PROBLEMS)
def test_a_contradiction_is_named(what, tmp_path):
    check_named(PROBLEMS[what], tmp_path)


@pytest.mark.parametrize("name", HYBRIDS)
def test_an_unknown_key_is_named(name, tmp_path):
    with pytest.raises(ConfigError, match="unknown key 'rnn_width'"):
        open_checkpoint(copy(name, tmp_path, rnn_width=8))


def test_a_model_without_attention_keeps_its_programs_as_its_text_grows():
    """Its state has no slots: past any number of tokens nothing grows and nothing is compiled."""
    model = jaxllm.load(golden("mamba2").source, store=False, dtype="float32")
    assert kv_bytes_per_token(model.spec, 4) == 0
    answer = model.generate(golden("mamba2").prompts[0], max_tokens=300)
    assert answer.token_ids[:12] == golden("mamba2").greedy[0]
    names = list(model.generator.loaded)
    assert not any(name.startswith("model-grow") for name in names)
    assert sum("decode" in name for name in names) == 1
