"""OLMoE: 64 small experts, queries and keys normed over all heads together."""

from __future__ import annotations

from typing import Any

from jaxllm.spec.model import Head, ModelSpec
from jaxllm.spec.moe import MoE, Router
from jaxllm.spec.ops import MLP, Attention, Norm, QKNorm
from jaxllm.zoo import decoder, experts
from jaxllm.zoo.qwen_moe import EXPERTS
from jaxllm.zoo.rope import read_rope, write_rope
from jaxllm.zoo.table import ConfigReader, Family

__all__ = ["FAMILY"]


def _read(config: ConfigReader) -> ModelSpec:
    sizes = decoder.read_sizes(config, context=4096)
    config.ignore(*experts.IGNORED)
    rope = read_rope(config, context=sizes.context)
    if config.take("clip_qkv", float, None) is not None:
        config.problem("clip_qkv is not supported; give null")
    bias = config.take("attention_bias", bool, False)
    eps = config.take("rms_norm_eps", float, 1e-5)
    activation = decoder.read_activation(config)
    tied = config.take("tie_word_embeddings", bool, False)
    router = Router(renormalize=config.take("norm_topk_prob", bool, False))
    count = config.take("num_experts", int, 64)
    active = config.take("num_experts_per_tok", int, 8)

    def make() -> ModelSpec:
        norm = Norm(eps=eps)
        attn = Attention(
            **decoder.heads_of(sizes),
            qkv_bias=bias,
            out_bias=bias,
            qk_norm=QKNorm(over="full", eps=eps),
            rope=rope,
        )
        mlp = MLP(width=sizes.ffn, activation=activation)
        moe = MoE(experts=count, active=active, mlp=mlp, router=router)
        return decoder.model_of(
            sizes,
            ["E"] * sizes.layers,
            lambda name: experts.layer(name, attn, norm, moe),
            ropes=(rope,),
            final_norm=norm,
            head=Head(tied=tied),
        )

    return config.finish(make)


def _write(spec: ModelSpec) -> dict[str, Any] | None:
    mixed = experts.mixed_of(spec)
    if mixed is None:
        return None
    parts = mixed.parts
    return {
        **decoder.write_sizes(spec, "Olmoe", parts),
        **write_rope(parts.attn.rope, context=spec.context),
        "model_type": "olmoe",
        "num_experts": mixed.moe.experts,
        "num_experts_per_tok": mixed.moe.active,
        "norm_topk_prob": mixed.moe.router.renormalize,
        "attention_bias": parts.attn.out_bias,
        "rms_norm_eps": parts.norm.eps,
        "hidden_act": decoder.write_activation(parts.mlp.activation),
    }


FAMILY = Family(
    model_types=("olmoe",),
    read=_read,
    write=_write,
    names=lambda spec: decoder.entries(
        spec, decoder.TENSORS | decoder.QK_NORMS | experts.NORMS | EXPERTS
    ),
)
