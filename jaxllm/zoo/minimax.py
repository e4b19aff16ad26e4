"""MiniMax-Text-01: lightning attention and softmax attention before experts, on normed residuals.

Each head of lightning attention forgets at a rate of its own, less from layer to layer; files hold
the rates. What follows from them and from the size of a block stands in files too and is left out.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxllm.spec.linear_attention import ConstantDecay, LinearAttention, OutNorm
from jaxllm.spec.model import Block, Head, ModelSpec, sub
from jaxllm.spec.moe import MoE, Router
from jaxllm.spec.ops import MLP, Attention, Norm
from jaxllm.zoo import decoder, experts, hybrid, mixtral
from jaxllm.zoo.rope import read_rope, write_rope
from jaxllm.zoo.table import ConfigReader, Entry, Family

__all__ = ["FAMILY"]

_BLOCKS = {"full_attention": "G", "linear_attention": "K"}
_FACTORS = ("full_attn", "linear_attn", "mlp")
_NORM_EPS = 1e-6  # of what the heads read, whatever rms_norm_eps is
_LINEAR = {
    "linear_norm": "input_layernorm",
    "linear.query": "self_attn.qkv_proj",
    "linear.key": "self_attn.qkv_proj",
    "linear.value": "self_attn.qkv_proj",
    "linear.rate": "self_attn.slope_rate=",
    "linear.out_gate": "self_attn.output_gate",
    "linear.out_norm": "self_attn.norm",
    "linear.out": "self_attn.out_proj",
}


def _linear(sizes: decoder.Sizes, activation: Any) -> LinearAttention:
    return LinearAttention(
        heads=sizes.heads,
        key_heads=sizes.heads,
        key_dim=sizes.head_dim,
        value_dim=sizes.head_dim,
        decay=ConstantDecay(),
        scale=1.0,
        activation=activation,
        out_norm=OutNorm(eps=_NORM_EPS, over="full"),
        gate="sigmoid",
    )


def _read(config: ConfigReader) -> ModelSpec:
    sizes = decoder.read_sizes(config, context=131_072)
    config.ignore(*experts.IGNORED, "block_size")
    default = [hybrid.KINDS[i % 2] for i in range(sizes.layers)]
    kinds = hybrid.read_kinds(config, sizes.layers, default)
    rope = read_rope(config, context=sizes.context, theta=1e6)
    window = config.take("sliding_window", int, None)
    factors = {
        name: {
            "skip_scale": config.take(f"{name}_alpha_factor", float, 1.0),
            "scale": config.take(f"{name}_beta_factor", float, 1.0),
            "skip_normed": True,
        }
        for name in _FACTORS
    }
    eps = config.take("rms_norm_eps", float, 1e-5)
    activation = decoder.read_activation(config)
    tied = config.take("tie_word_embeddings", bool, False)
    count = config.take("num_local_experts", int, 8)
    active = config.take("num_experts_per_tok", int, 2)

    def make() -> ModelSpec:
        norm = Norm(eps=eps)
        mask = decoder.mask_of(decoder.KINDS[bool(window)], window or 1)
        attn = Attention(**decoder.heads_of(sizes), rope=rope, mask=mask)
        mlp = MLP(width=sizes.ffn, activation=activation)
        moe = MoE(experts=count, active=active, mlp=mlp, router=Router(renormalize=True))
        mixers = {
            "G": sub("attn", attn, norm_in=norm, **factors["full_attn"]),
            "K": sub("linear", _linear(sizes, activation), norm_in=norm, **factors["linear_attn"]),
        }
        ffn = sub("moe", moe, norm_in=norm, **factors["mlp"])
        return decoder.model_of(
            sizes,
            [_BLOCKS[kind] for kind in kinds],
            lambda name: Block(name=name, subs=(mixers[name], ffn)),
            ropes=(rope,),
            final_norm=norm,
            head=Head(tied=tied),
        )

    return config.finish(make)


def _write_factors(spec: ModelSpec) -> dict[str, float]:
    """The factors on what goes past an op, and on its update."""
    kinds = {Attention: "full_attn", LinearAttention: "linear_attn", MoE: "mlp"}
    found: dict[str, float] = {}
    for part in (part for block in spec.blocks for part in block.subs):
        if (name := kinds.get(type(part.ops[0].op))) is not None:
            found[f"{name}_alpha_factor"] = part.skip_scale
            found[f"{name}_beta_factor"] = part.scale
    return found


def _write(spec: ModelSpec) -> dict[str, Any] | None:
    parts = hybrid.hybrid_of(spec)
    if parts is None or parts.moe is None:
        return None
    attn, moe = parts.attn, parts.moe
    window = decoder.window_in(attn.mask)
    return {
        "architectures": ["MiniMaxForCausalLM"],
        "model_type": "minimax",
        "vocab_size": spec.vocab,
        "hidden_size": spec.width,
        "intermediate_size": moe.mlp.width,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": attn.heads,
        "num_key_value_heads": attn.kv_heads,
        "head_dim": attn.head_dim,
        "layer_types": parts.kinds,
        **write_rope(attn.rope, context=spec.context),
        **_write_factors(spec),
        "sliding_window": window,
        "num_local_experts": moe.experts,
        "num_experts_per_tok": moe.active,
        "rms_norm_eps": parts.norm.eps,
        "hidden_act": decoder.write_activation(moe.mlp.activation),
        "tie_word_embeddings": spec.head.tied,
    }


def _names(spec: ModelSpec) -> list[Entry]:
    parts = hybrid.hybrid_of(spec)
    groups = {} if parts is None else {"self_attn.qkv_proj": parts.linear.heads}
    names = decoder.TENSORS | experts.NORMS | mixtral.TENSORS | _LINEAR
    return [
        dataclasses.replace(entry, form="same", ones=(0, 2)) if ".rate" in entry.path else entry
        for entry in hybrid.entries(spec, names, groups)
    ]


FAMILY = Family(
    model_types=("minimax",),
    read=_read,
    write=_write,
    names=_names,
    ignored=tuple(f"model.layers.*.self_attn.{n}_decay" for n in ("query", "key", "diagonal")),
)
