"""Mixtral: a Mistral whose feed-forward is the best two of eight experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.spec.model import Head, ModelSpec
from jaxllm.spec.moe import MoE, Router
from jaxllm.spec.ops import MLP, Attention, Norm
from jaxllm.zoo import decoder, experts, gguf_config
from jaxllm.zoo.rope import read_rope, write_rope
from jaxllm.zoo.table import ConfigReader, Family

__all__ = ["FAMILY", "GGUF_EXPERTS", "TENSORS", "read_gguf"]

TENSORS = {
    "moe.router": "block_sparse_moe.gate",
    "moe.gate": "block_sparse_moe.experts.{}.w1",
    "moe.up": "block_sparse_moe.experts.{}.w3",
    "moe.down": "block_sparse_moe.experts.{}.w2",
}
"""Names of the router and of experts."""


def _read(config: ConfigReader) -> ModelSpec:
    sizes = decoder.read_sizes(config, context=131_072)
    config.ignore(*experts.IGNORED)
    rope = read_rope(config, context=sizes.context, theta=1e6)
    window = config.take("sliding_window", int, None)
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
        **decoder.write_sizes(spec, "Mixtral", parts),
        **write_rope(parts.attn.rope, context=spec.context),
        "model_type": "mixtral",
        "sliding_window": decoder.write_kinds(spec, parts)["sliding_window"],
        "num_local_experts": mixed.moe.experts,
        "num_experts_per_tok": mixed.moe.active,
        "rms_norm_eps": parts.norm.eps,
        "hidden_act": decoder.write_activation(parts.mlp.activation),
    }


GGUF_EXPERTS = {
    "moe_norm": "ffn_norm",
    "moe.router": "ffn_gate_inp",
    "moe.gate": "ffn_gate_exps",
    "moe.up": "ffn_up_exps",
    "moe.down": "ffn_down_exps",
}
"""Names of experts in GGUF; a tensor has all of a layer."""


def read_gguf(config: ConfigReader, tensors: Mapping[str, Any]) -> ModelSpec:
    """The architecture `llama` with experts."""
    data = gguf_config.read_common(config, tensors) | {
        "model_type": "mixtral",
        "num_local_experts": config.take("expert_count", int),
        "num_experts_per_tok": config.take("expert_used_count", int),
    }
    data.setdefault("rope_theta", 1e4)  # of the architecture
    window = config.take("attention.sliding_window", int, 0)
    return _read(config.translated(data | {"sliding_window": window or None}))


FAMILY = Family(
    model_types=("mixtral",),
    read=_read,
    write=_write,
    names=lambda spec: decoder.entries(spec, decoder.TENSORS | experts.NORMS | TENSORS),
)
