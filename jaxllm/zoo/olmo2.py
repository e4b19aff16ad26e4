"""OLMo 2: norms after each op in place of before, and of all heads' queries and keys together."""

from __future__ import annotations

from typing import Any

from jaxllm.spec.model import Block, Head, ModelSpec, sub
from jaxllm.spec.ops import MLP, Attention, Norm, QKNorm
from jaxllm.zoo import decoder
from jaxllm.zoo.rope import read_rope, write_rope
from jaxllm.zoo.table import ConfigReader, Family

__all__ = ["FAMILY"]

_NORMS = {
    "attn_out_norm": "post_attention_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
}


def _read(config: ConfigReader) -> ModelSpec:
    sizes = decoder.read_sizes(config, context=2048)
    rope = read_rope(config, context=sizes.context)
    bias = config.take("attention_bias", bool, False)
    eps = config.take("rms_norm_eps", float, 1e-5)
    activation = decoder.read_activation(config)
    tied = config.take("tie_word_embeddings", bool, False)

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
        subs = (sub("attn", attn, norm_out=norm), sub("mlp", mlp, norm_out=norm))
        return decoder.model_of(
            sizes,
            ["G"] * sizes.layers,
            lambda name: Block(name=name, subs=subs),
            ropes=(rope,),
            final_norm=norm,
            head=Head(tied=tied),
        )

    return config.finish(make)


def _write(spec: ModelSpec) -> dict[str, Any] | None:
    parts = decoder.parts_of(spec)
    if parts is None:
        return None
    return {
        **decoder.write_sizes(spec, "Olmo2", parts),
        **write_rope(parts.attn.rope, context=spec.context),
        "model_type": "olmo2",
        "attention_bias": parts.attn.out_bias,
        "rms_norm_eps": parts.norm.eps,
        "hidden_act": decoder.write_activation(parts.mlp.activation),
    }


FAMILY = Family(
    model_types=("olmo2",),
    read=_read,
    write=_write,
    names=lambda spec: decoder.entries(spec, decoder.TENSORS | decoder.QK_NORMS | _NORMS),
)
