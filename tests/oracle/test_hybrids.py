"""Families with recurrences: each feature flipped moves the logits, and files that do not fit."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import jaxllm
from jaxllm.core.tree import single_segments
from jaxllm.errors import ConfigError
from jaxllm.nn.api import apply
from jaxllm.spec.cost import kv_bytes_per_token, num_params
from jaxllm.spec.ops import MLP, Attention, Convolution, SelectiveScan, StateSpaceDual
from jaxllm.spec.rope import Rope
from jaxllm.state.dense import dense_state
from jaxllm.state.step import training_step
from jaxllm.zoo.load import open_checkpoint
from tests.oracle.checks import check_moved, check_named
from tests.oracle.golden import TOLERANCE, copy, golden, relative
from tests.oracle.mutate import POLICY, attn, change, only, part, rope, subs

HYBRIDS = (
    "bamba", "falcon_h1", "granite_hybrid", "jamba", "lfm2", "mamba", "mamba2", "nemotron_h",
    "zamba2",
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


def reading(**changes):
    """A mutation of what updates read: what they read -> what they read then."""
    return subs(reads=lambda old: changes.get(old, old))


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
    ("zamba2", "attention without adapters"): attn(adapter_rank=None),
    ("zamba2", "an mlp without adapters"): lambda s: change(s, MLP, adapter_rank=None),
    ("zamba2", "no rope"): attn(rope=None),
    ("zamba2", "scale of scores is H^-1/2"): attn(scale=None),
    ("zamba2", "silu"): lambda s: change(s, MLP, activation="silu"),
    ("zamba2", "the mlp sees x too"): reading(aside="sum"),
    ("zamba2", "the state space sees x alone"): reading(sum="hidden"),
    ("zamba2", "the matrix sees x"): only("H1", reading(aside="hidden")),
    ("zamba2", "sets in another order"): lambda s: dataclasses.replace(s, layers="M H1 M H0 H1"),
    ("zamba2", "one group in the norm"): norm(groups=1),
    ("zamba2_hub", "least step"): dual(dt_min=0.5),
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
    "a kind among transformers": (
        "zamba2",
        {"layers_block_type": ["hybrid"] * 4 + ["rnn"]},
        "'rnn'",
    ),
    "too few kinds": ("zamba2", {"layers_block_type": ["hybrid"]}, "has 1 layers"),
    "no sets": ("zamba2", {"num_mem_blocks": 0}, "num_mem_blocks is 0"),
    "adapters of fewer keys": (
        "zamba2",
        {"num_key_value_heads": 2},
        "use_shared_attention_adapter",
    ),
    "heads of attention": ("zamba2", {"attention_head_dim": 10}, "attention_head_dim 10 is not 2"),
    "head apart": ("zamba2", {"tie_word_embeddings": False}, "tie_word_embeddings is False"),
    "a longer context": ("zamba2", {"use_long_context": True}, "use_long_context is True"),
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


def test_a_shared_set_is_one_copy_and_each_use_has_a_cache():
    model = jaxllm.load(golden("zamba2").source, store=False, dtype="float32")
    assert set(model.params["shared"]) == {"H0", "H1"}
    assert num_params(model.spec) == sum(x.size for x in jax.tree.leaves(model.params))
    state = dense_state(model.spec, 1, 8, dtype="float32", segments=single_segments(5))
    assert [i for i in range(5) if "attn" in state[str(i)]] == [1, 3, 4]


def test_a_shared_set_learns_from_all_its_uses(models):
    """The gradient of one set is the sum of what it is where each layer has a copy."""
    model, ids = models("zamba2"), jnp.asarray(golden("zamba2").ids)

    def loss(shared, spec):
        params = model.params | {"shared": shared}
        hidden, _, _ = apply(spec, params, ids, training_step(*ids.shape), policy=POLICY)
        return jnp.mean(hidden**2)

    def split(spec):
        """The layers 1 and 4, which share H0, with a copy each."""
        blocks = {b.name: b for b in spec.blocks}
        again = [dataclasses.replace(s, share=s.share and "H2") for s in blocks["H0"].subs]
        more = dataclasses.replace(blocks["H0"], name="H2", subs=tuple(again))
        return dataclasses.replace(spec, blocks=(*spec.blocks, more), layers="M H0 M H1 H2")

    shared = model.params["shared"]
    one = jax.grad(loss)(shared, model.spec)["H0"]
    two = jax.grad(loss)(shared | {"H2": shared["H0"]}, split(model.spec))
    total = jax.tree.map(jnp.add, two["H0"], two["H2"])
    errors = jax.tree.map(lambda a, b: relative(a, b), one, total)
    assert max(jax.tree.leaves(errors)) < TOLERANCE
