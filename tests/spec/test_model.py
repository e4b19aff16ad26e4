"""Specs: JSON both ways, unknown keys, contradictions."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.core.config import from_dict, nearest, to_dict
from jaxllm.errors import ConfigError
from jaxllm.spec.mask import (
    And,
    Blocks,
    Causal,
    Chunk,
    Full,
    Global,
    Mask,
    Or,
    Prefix,
    Random,
    Window,
)
from jaxllm.spec.model import Block, Embedding, Head, ModelSpec, NamedOp, Sub, sub
from jaxllm.spec.ops import (
    MLP,
    Attention,
    InfiniAttention,
    LengthProjection,
    Memory,
    MoE,
    Norm,
    Temperature,
)
from jaxllm.spec.rope import Llama3Scaling, Rope
from jaxllm.zoo.families import PRESETS
from tests.contracts.encoders import heads
from tests.contracts.specs import CHUNKS, SPECS

ALL = {**SPECS, **PRESETS}


@pytest.mark.parametrize("name", ALL)
def test_json_round_trip(name):
    spec = ALL[name]
    again = ModelSpec.from_json(spec.to_json())
    assert again == spec
    assert hash(again) == hash(spec)
    assert again.to_json() == spec.to_json()
    assert json.loads(spec.to_json())["layers"] == spec.layers


def test_no_two_toys_are_equal():
    texts = {spec.to_json() for spec in ALL.values()}
    assert len(texts) == len(ALL) == len(set(ALL.values()))


ends = st.integers(0, 9)
sizes = st.integers(1, 5)
leaves = st.one_of(
    st.just(Causal()),
    st.just(Full()),
    st.builds(Window, left=ends, right=ends),
    st.builds(Chunk, size=sizes),
    st.builds(Global, first=sizes, last=ends),
    st.builds(Prefix, first=sizes),
)
masks = st.recursive(
    leaves,
    lambda m: st.one_of(
        st.builds(And, first=m, second=m),
        st.builds(Or, first=m, second=m),
        st.builds(Blocks, size=sizes, mask=m),
    ),
    max_leaves=5,
)


@settings(max_examples=50, deadline=None)
@given(masks)
def test_any_mask_goes_through_json(mask):
    data = json.loads(json.dumps(to_dict(mask)))
    assert from_dict(Mask, data) == mask


def broken(change):
    """The JSON of a toy with one change at a dotted path."""
    data = json.loads(SPECS["mha"].to_json())
    node = data
    *path, last = change[0].split(".")
    for key in path:
        node = node[int(key) if key.isdecimal() else key]
    if change[1] is ...:
        del node[last]
    else:
        node[last] = change[1]
    return json.dumps(data)


OP = "blocks.0.subs.0.ops.0.op"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("vocabs", 3), "did you mean 'vocab'"),
        ((f"{OP}.head", 3), "did you mean 'heads'"),
        ((f"{OP}.rope.thet", 3), "did you mean 'theta'"),
        ((f"{OP}.rope.scaling.kind", "yarm"), "unknown kind 'yarm'; did you mean 'yarn'"),
        ((f"{OP}.rope.scaling.kind", "yarn"), "missing key 'original_context'"),
        ((f"{OP}.kind", "atention"), "did you mean 'attention'"),
        ((f"{OP}.heads", ...), "missing key 'heads'"),
        (("vocab", "64"), "expected int"),
        (("vocab", True), "expected int"),
        (("vocab", 64.0), "expected int"),
        (("layers", 3), "expected str"),
        (("blocks", {}), "expected a list"),
        (("head", []), "expected an object"),
        ((f"{OP}.rope.layout", "halves"), "not one of half, interleaved"),
        (("blocks.0.subs.0.norm_in", "rms"), "expected an object"),
        (("blocks.0.subs", []), "at least one sub"),
        (("blocks.0.subs.0.ops", []), "at least one op"),
        (("blocks.0.subs.0.ops.0.name", "a b"), "no identifier"),
        (("blocks.0.subs.1.ops.0.name", "attn"), "names used twice"),
        (("layers", "H*3"), "unknown block 'H'"),
        (("layers", "G*3)"), "without '('"),
        (("vocab", 0), "positive"),
        (("context", 0), "positive"),
        ((f"{OP}.kv_heads", 3), "no multiple"),
        ((f"{OP}.head_dim", 7), "even"),
        ((f"{OP}.heads", 0), "positive"),
        ((f"{OP}.mask", {"kind": "window", "left": -1}), "left and right"),
    ],
)
def test_wrong_json_says_what_and_where(change, said):
    with pytest.raises(ConfigError) as caught:
        ModelSpec.from_json(broken(change))
    assert said in str(caught.value)


NESTED = '{"kind": "or", "first": ' * 50_000


@pytest.mark.parametrize("text", ["", "{", "3", "[]", "null", '"x"', "{}", "[" * 100_000, NESTED])
def test_no_spec_at_all(text):
    with pytest.raises(ConfigError, match="spec"):
        ModelSpec.from_json(text)


@pytest.mark.parametrize(
    "make",
    [
        lambda: MLP(width=0),
        lambda: Norm(eps=0.0),
        lambda: Head(softcap=-1.0),
        lambda: Window(left=1, right=-1),
        lambda: Global(first=-1),
        lambda: Prefix(first=-1),
        lambda: Random(count=0),
        lambda: Random(count=1, seed=-1),
        lambda: Blocks(size=0, mask=Full()),
        lambda: Blocks(size=2, mask=Or(first=Full(), second=Global())),
        lambda: Blocks(size=2, mask=Prefix()),
        lambda: LengthProjection(length=4, rows=5),
        lambda: heads(4, mask=Causal(), length_projection=LengthProjection(length=4, rows=2)),
        lambda: heads(4, global_projections=True),
        lambda: heads(4, global_projections=True, mask=Global(), rope=Rope()),
        lambda: heads(4, global_projections=True, mask=Blocks(size=2, mask=Global(first=1))),
        lambda: Head(logits=False, tied=True),
        lambda: Head(logits=False, bias=True),
        lambda: Embedding(types=0),
        lambda: Embedding(position_offset=-1),
        lambda: dataclasses.replace(
            SPECS["bert"], embedding=Embedding(positions=64, position_offset=1)
        ),
        lambda: Llama3Scaling(
            factor=2.0, low_freq_factor=4.0, high_freq_factor=4.0, original_context=8
        ),
        lambda: Llama3Scaling(
            factor=2.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=0
        ),
        lambda: Rope(fraction=2.0),
        lambda: dataclasses.replace(SPECS["mha"], blocks=SPECS["mha"].blocks * 2),
        lambda: Block(name="G", subs=()),
        lambda: InfiniAttention(local=heads(4)),
        lambda: InfiniAttention(local=heads(4, mask=CHUNKS, sinks=True)),
        lambda: Memory(heads=1, keys=0, active=1, key_dim=4),
        lambda: Memory(heads=1, keys=2, active=5, key_dim=4),
        lambda: Memory(heads=1, keys=2, active=1, key_dim=3),
        lambda: Memory(heads=1, keys=2, active=1, key_dim=4, gated=True),
        lambda: Memory(heads=1, keys=2, active=1, key_dim=4, share="a.b"),
        lambda: dataclasses.replace(
            SPECS["memory"],
            blocks=(
                *SPECS["memory"].blocks,
                Block(
                    name="X",
                    subs=(sub("m", Memory(heads=1, keys=5, active=1, key_dim=4, share="pool")),),
                ),
            ),
        ),
        lambda: MoE(experts=2, active=1, mlp=MLP(width=4), latent=0),
        lambda: MoE(experts=2, active=1, mlp=MLP(width=4), latent_bias=True),
        lambda: Temperature(scale=1.0, period=0.0),
        lambda: Sub(ops=(NamedOp(name="mlp", op=MLP(width=4), norm_in=Norm()),)),
        lambda: sub("mlp", MLP(width=4), skip_normed=True),
        lambda: sub("mlp", MLP(width=4), skip_normed=True, norm_in=Norm(), reads="sum"),
        lambda: sub("mlp", MLP(width=4), aside=True, skip_scale=2.0),
        lambda: sub("mlp", MLP(width=4), aside=True, norm_after=Norm()),
        lambda: sub("mlp", MLP(width=4), reads="embedded"),
        lambda: sub("mlp", MLP(width=4), share="a b"),
        lambda: sub("moe", MoE(experts=2, active=1, mlp=MLP(width=4)), share="A"),
        lambda: sub("attn", Attention(heads=1, kv_heads=1, head_dim=4, out_width=32)),
        lambda: Block(name="G", subs=(sub("mlp", MLP(width=4), reads="aside"),)),
        lambda: MLP(width=4, adapter_rank=0),
        lambda: Attention(heads=1, kv_heads=1, head_dim=4, out_width=0),
        lambda: dataclasses.replace(
            SPECS["shared"],
            blocks=tuple(
                dataclasses.replace(
                    b, subs=tuple(dataclasses.replace(s, share=s.share and "A") for s in b.subs)
                )
                if b.name == "A"
                else dataclasses.replace(
                    b,
                    subs=tuple(
                        dataclasses.replace(s, share=s.share and "A", scale=0.5) for s in b.subs
                    ),
                )
                for b in SPECS["shared"].blocks
            ),
        ),
        lambda: dataclasses.replace(SPECS["shared"], width=64),
    ],
)
def test_contradictions_are_errors(make):
    with pytest.raises(ConfigError):
        make()


def test_specs_are_data():
    block = Block(name="G", subs=(sub("mlp", MLP(width=4), norm_in=Norm()),))
    spec = ModelSpec(vocab=8, width=4, blocks=(block,), layers="G*2", context=16)
    assert (spec.num_layers, spec.block(1), spec.segments) == (2, block, spec.pattern.segments)
    assert block.subs[0].norms == {"mlp_norm": Norm()}
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.vocab = 9
    assert Attention(heads=1, kv_heads=1, head_dim=16).query_scale == 0.25
    assert Attention(heads=1, kv_heads=1, head_dim=16, scale=3.0).query_scale == 3.0


def test_nearest():
    assert nearest("hart", ["heart", "lung"]) == "did you mean 'heart'? allowed: heart, lung"
    assert nearest("zzz", ["heart", "lung"]) == "allowed: heart, lung"


def test_latent_attention_remembers_token_by_token():
    assert SPECS["latent"].has_slots
    assert len(SPECS["latent"].masks) == 2
