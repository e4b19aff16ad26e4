"""What the toy models of `specs.py` are built of."""

from typing import Any

from jaxllm.spec.linear_attention import LinearAttention
from jaxllm.spec.mask import And, Causal, Chunk, Global, Or, Window
from jaxllm.spec.model import Block, ModelSpec, NamedOp, Sub, sub
from jaxllm.spec.ops import (
    MLP,
    Attention,
    LatentAttention,
    MoE,
    Norm,
    Router,
    SelectiveScan,
    StateSpaceDual,
)
from jaxllm.spec.rope import LinearScaling, Llama3Scaling, Rope
from jaxllm.spec.state_space import GatedNorm

RMS, OFFSET, LAYER = Norm(), Norm(offset=1.0, eps=1e-6), Norm(type="layer", bias=True)
LOCAL = And(first=Causal(), second=Window(left=2))
CHUNKS = And(first=Causal(), second=Chunk(size=5))
SEGMENTS = And(first=Causal(), second=Chunk(size=4))
STREAMING = And(first=Causal(), second=Or(first=Window(left=2), second=Global(first=2)))
NEAR = Rope(theta=100.0)


def model(*blocks: Block, layers: str, **changes: Any) -> ModelSpec:
    """A toy of width 32 and 64 tokens."""
    base = {"vocab": 64, "width": 32, "context": 64, "final_norm": RMS}
    return ModelSpec(blocks=blocks, layers=layers, **(base | changes))


def pre(name: str, attn: Attention | LatentAttention, mlp: MLP, norm: Norm = RMS) -> Block:
    """A pre-norm layer."""
    return Block(name=name, subs=(sub("attn", attn, norm_in=norm), sub("mlp", mlp, norm_in=norm)))


def heads(count: int, kv: int, **changes: Any) -> Attention:
    """Attention with heads of 8, rotated fast enough for a dozen tokens to tell."""
    return Attention(heads=count, kv_heads=kv, **({"head_dim": 8, "rope": NEAR} | changes))


def experts(name: str, moe: MoE, norm: Norm = RMS, shared: MLP | None = None) -> Block:
    """A pre-norm layer whose feed-forward is a mixture, beside an MLP for all tokens or not."""
    ops = [NamedOp(name="moe", op=moe)]
    if shared is not None:
        ops.append(NamedOp(name="shared", op=shared))
    attn = sub("attn", heads(4, 2), norm_in=norm)
    return Block(name=name, subs=(attn, Sub(ops=tuple(ops), norm_in=norm)))


SOFTMAX = MoE(experts=4, active=2, mlp=MLP(width=24), router=Router(renormalize=True, scale=1.5))
GROUPED = MoE(
    experts=8,
    active=3,
    mlp=MLP(width=16),
    router=Router(
        score="sigmoid",
        renormalize=True,
        scale=2.5,
        groups=4,
        groups_kept=2,
        balance_bias=True,
    ),
)
CLAMPED = MoE(
    experts=4,
    active=2,
    mlp=MLP(width=16, bias=True, clamp=0.7, gain=1.702, up_offset=1.0),
    router=Router(over_chosen=True, bias=True),
)
MLP48 = MLP(width=48)
PLAIN48 = MLP(width=48, gated=False, bias=True, activation="gelu")


def linear(**changes: Any) -> LinearAttention:
    """Linear attention of four heads, two of keys of width 6."""
    sizes = {"heads": 4, "key_heads": 2, "key_dim": 6, "value_dim": 8}
    return LinearAttention(**(sizes | changes))


INTERLEAVED = Rope(theta=100.0, layout="interleaved", scaling=LinearScaling(factor=2.0))
LLAMA3 = Rope(
    theta=100.0,
    scaling=Llama3Scaling(
        factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=32
    ),
)
PARTIAL = Rope(theta=100.0, fraction=0.5)
SELECTIVE = SelectiveScan(channels=24, state=3, dt_rank=2, in_bias=True, inner_eps=1e-5)
DUAL = StateSpaceDual(
    heads=4,
    head_dim=6,
    state=5,
    groups=2,
    conv=3,
    in_bias=True,
    out_bias=True,
    norm=GatedNorm(groups=2),
    dt_min=0.3,
    dt_max=2.0,
    scales=(0.5, 1.5, 2.0, 1.25, 0.75),
)
BARE = StateSpaceDual(heads=4, head_dim=4, state=3, norm=None, conv_bias=False, activation="gelu")
