"""Gemma (the first): a Llama with scaled embeddings, norms that act as 1 + w, and gelu by tanh."""

from __future__ import annotations

from typing import Any

from jaxllm.spec.model import Block, Embedding, Head, ModelSpec, sub
from jaxllm.spec.ops import MLP, Attention, Norm
from jaxllm.zoo import decoder
from jaxllm.zoo.rope import read_rope, write_rope
from jaxllm.zoo.table import ConfigReader, Family

__all__ = ["FAMILY"]


def _read(config: ConfigReader) -> ModelSpec:
    sizes = decoder.read_sizes(config, context=8192, head_dim=256)
    config.ignore("hidden_activation")  # which the reference does not read
    rope = read_rope(config, context=sizes.context)
    bias = config.take("attention_bias", bool, False)
    eps = config.take("rms_norm_eps", float, 1e-6)
    activation = decoder.read_activation(config, default="gelu_pytorch_tanh")
    activation = "gelu_tanh" if activation == "gelu" else activation  # what first files meant
    tied = config.take("tie_word_embeddings", bool, True)
    if config.take("use_bidirectional_attention", bool, False):
        config.problem("use_bidirectional_attention is not supported")

    def make() -> ModelSpec:
        norm = Norm(eps=eps, offset=1.0)
        attn = Attention(**decoder.heads_of(sizes), qkv_bias=bias, out_bias=bias, rope=rope)
        mlp = MLP(width=sizes.ffn, activation=activation)
        subs = (sub("attn", attn, norm_in=norm), sub("mlp", mlp, norm_in=norm))
        return decoder.model_of(
            sizes,
            ["G"] * sizes.layers,
            lambda name: Block(name=name, subs=subs),
            ropes=(rope,),
            embedding=Embedding(scale=sizes.width**0.5),
            final_norm=norm,
            head=Head(tied=tied),
        )

    return config.finish(make)


def _write(spec: ModelSpec) -> dict[str, Any] | None:
    parts = decoder.parts_of(spec)
    if parts is None:
        return None
    return {
        **decoder.write_sizes(spec, "Gemma", parts),
        **write_rope(parts.attn.rope, context=spec.context),
        "model_type": "gemma",
        "attention_bias": parts.attn.out_bias,
        "rms_norm_eps": parts.norm.eps,
        "hidden_act": decoder.write_activation(parts.mlp.activation),
    }


FAMILY = Family(
    model_types=("gemma",),
    read=_read,
    write=_write,
    names=lambda spec: decoder.entries(spec, decoder.TENSORS | decoder.PRE_NORMS),
)
