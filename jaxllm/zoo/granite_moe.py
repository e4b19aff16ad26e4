"""Granite-MoE: experts chosen before the softmax, with the factors of Granite.

Of the two kinds of file, `granitemoeshared` has an MLP of all tokens beside the experts.
"""

from __future__ import annotations

from typing import Any

from jaxllm.spec.model import Block, Embedding, Head, ModelSpec
from jaxllm.spec.moe import MoE, Router
from jaxllm.spec.ops import MLP, Activation, Attention, Norm
from jaxllm.zoo import decoder, experts, recurrent
from jaxllm.zoo.granite import read_factors, write_factors
from jaxllm.zoo.rope import read_rope, write_rope
from jaxllm.zoo.table import ConfigReader, Entry, Family

__all__ = ["EXPERTS", "GRANITE_MOE", "GRANITE_MOE_SHARED", "mixture"]

EXPERTS = {
    "moe_norm": "post_attention_layernorm",
    "moe.router": "block_sparse_moe.router.layer",
    "moe.gate": "block_sparse_moe.input_linear",
    "moe.up": "block_sparse_moe.input_linear",
    "moe.down": "block_sparse_moe.output_linear",
    "shared.gate": "shared_mlp.input_linear",
    "shared.up": "shared_mlp.input_linear",
    "shared.down": "shared_mlp.output_linear",
}
"""Names of experts and of what stands beside them; a tensor has all experts of a layer."""


def mixture(sizes: decoder.Sizes, count: int, active: int, activation: Activation) -> MoE:
    """The experts of a Granite: a softmax over the chosen ones."""
    mlp = MLP(width=sizes.ffn, activation=activation)
    return MoE(experts=count, active=active, mlp=mlp, router=Router(over_chosen=True))


def _read(config: ConfigReader, shared: int) -> ModelSpec:
    """The spec, with an MLP of width `shared` beside the experts unless it is 0."""
    sizes = decoder.read_sizes(config, context=2048)
    config.ignore(*experts.IGNORED)
    rope = read_rope(config, context=sizes.context)
    bias = config.take("attention_bias", bool, False)
    eps = config.take("rms_norm_eps", float, 1e-6)
    activation = decoder.read_activation(config)
    tied = config.take("tie_word_embeddings", bool, False)
    count = config.take("num_local_experts", int, 8)
    active = config.take("num_experts_per_tok", int, 2)
    factors = read_factors(config)

    def make() -> ModelSpec:
        norm = Norm(eps=eps)
        attn = Attention(
            **decoder.heads_of(sizes), qkv_bias=bias, out_bias=bias, scale=factors.scores, rope=rope
        )
        subs = recurrent.pair(
            attn,
            mixture(sizes, count, active, activation),
            norm,
            name="attn",
            scale=factors.residual,
            shared=MLP(width=shared, activation=activation) if shared else None,
        )
        return decoder.model_of(
            sizes,
            ["E"] * sizes.layers,
            lambda name: Block(name=name, subs=subs),
            ropes=(rope,),
            embedding=Embedding(scale=factors.embedding),
            final_norm=norm,
            head=Head(tied=tied, scale=1 / factors.divisor),
        )

    return config.finish(make)


def _write(spec: ModelSpec, kind: str, name: str) -> dict[str, Any] | None:
    mixed = experts.mixed_of(spec)
    if mixed is None or spec.head.scale <= 0:
        return None
    parts = mixed.parts
    shared = {} if mixed.shared is None else {"shared_intermediate_size": mixed.shared.width}
    return {
        **decoder.write_sizes(spec, name, parts),
        **write_rope(parts.attn.rope, context=spec.context),
        **write_factors(spec, parts.attn),
        **shared,
        "model_type": kind,
        "attention_bias": parts.attn.out_bias,
        "num_local_experts": mixed.moe.experts,
        "num_experts_per_tok": mixed.moe.active,
        "rms_norm_eps": parts.norm.eps,
        "hidden_act": decoder.write_activation(mixed.moe.mlp.activation),
    }


def _names(spec: ModelSpec) -> list[Entry]:
    return decoder.entries(spec, decoder.TENSORS | decoder.PRE_NORMS | EXPERTS)


GRANITE_MOE = Family(
    model_types=("granitemoe",),
    read=lambda config: _read(config, 0),
    write=lambda spec: _write(spec, "granitemoe", "GraniteMoe"),
    names=_names,
)
GRANITE_MOE_SHARED = Family(
    model_types=("granitemoeshared",),
    read=lambda config: _read(config, config.take("shared_intermediate_size", int, 0)),
    write=lambda spec: _write(spec, "granitemoeshared", "GraniteMoeShared"),
    names=_names,
)
