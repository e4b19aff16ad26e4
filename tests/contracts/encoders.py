"""Toy encoders, and masks that look at ends or draws; `specs` holds them among the others."""

from typing import Any

from jaxllm.spec.mask import Blocks, Causal, Full, Global, Or, Prefix, Random, Window
from jaxllm.spec.model import Block, Embedding, Head, ModelSpec, Transform, sub
from jaxllm.spec.ops import MLP, Attention, LengthProjection, Norm
from jaxllm.spec.rope import Rope

LAYER, BARE = Norm(type="layer", bias=True, eps=1e-12), Norm(type="layer")
BLOCKS = Blocks(
    size=1,
    mask=Or(
        first=Window(left=1, right=1),
        second=Or(first=Global(first=1, last=1), second=Random(count=1, seed=3)),
    ),
)


def heads(kv: int, **changes: Any) -> Attention:
    """Four heads of 8 that see everything."""
    return Attention(heads=4, kv_heads=kv, head_dim=8, **({"mask": Full(), "rope": None} | changes))


def post(name: str, **changes: Any) -> Block:
    """A layer of BERT: biases, a norm after each update."""
    mlp = MLP(width=48, gated=False, bias=True, activation="gelu")
    attn = heads(4, **({"qkv_bias": True, "out_bias": True} | changes))
    return Block(name=name, subs=(sub("attn", attn, norm_after=LAYER),
                                  sub("mlp", mlp, norm_after=LAYER)))  # fmt: skip


def pre(name: str, first: bool = False, **changes: Any) -> Block:
    """A layer of ModernBERT; the first has no norm before its attention."""
    mlp = MLP(width=40, activation="gelu")
    attn = sub("attn", heads(4, **changes), norm_in=None if first else BARE)
    return Block(name=name, subs=(attn, sub("mlp", mlp, norm_in=BARE)))


def model(*blocks: Block, layers: str, **changes: Any) -> ModelSpec:
    """A toy of width 32 and 64 tokens with a norm on its embedding."""
    base = {
        "embedding": Embedding(positions=64, types=2, norm=LAYER),
        "head": Head(tied=True, bias=True, transform=Transform(norm=LAYER)),
    }
    return ModelSpec(
        vocab=64, width=32, context=64, blocks=blocks, layers=layers, **(base | changes)
    )


NEAR, FAR = Rope(theta=100.0), Rope(theta=1000.0)
SIDES = Window(left=2, right=2)
ENCODERS: dict[str, ModelSpec] = {
    "bert": model(
        post("B"),
        layers="B*2",
        embedding=Embedding(positions=67, position_offset=3, types=2, norm=LAYER),
    ),
    "modernbert": model(
        pre("F", first=True, rope=FAR),
        pre("L", rope=NEAR, mask=SIDES),
        pre("G", rope=FAR),
        layers="F L*2 G",
        embedding=Embedding(norm=BARE),
        final_norm=BARE,
        head=Head(transform=Transform(norm=BARE, bias=False)),
    ),
    "longformer": model(
        post("B", global_projections=True, mask=Or(first=SIDES, second=Global(first=2))),
        layers="B*2",
    ),
    # Draws of each head, with fewer key heads than heads.
    "bigbird": model(
        Block(name="B", subs=(sub("attn", heads(2, mask=BLOCKS), norm_after=LAYER),)), layers="B B"
    ),
    "linformer": model(
        post("B", length_projection=LengthProjection(length=64, rows=5)), layers="B*2"
    ),
    "prefix": model(
        pre("P", rope=NEAR, mask=Or(first=Causal(), second=Prefix(first=4))),
        layers="P*2",
    ),
}
