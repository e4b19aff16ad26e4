"""MiniMax-M2: a part of each head is rotated, all heads normed together, experts by sigmoids."""

from __future__ import annotations

from typing import Any

from jaxllm.spec.model import Head, ModelSpec
from jaxllm.spec.moe import MoE, Router
from jaxllm.spec.ops import MLP, Attention, Norm, QKNorm
from jaxllm.zoo import decoder, experts, mixtral
from jaxllm.zoo.rope import read_rope, write_rope
from jaxllm.zoo.table import ConfigReader, Entry, Family

__all__ = ["FAMILY"]

_BALANCE = {"moe.balance": "block_sparse_moe.e_score_correction"}


def _read(config: ConfigReader) -> ModelSpec:
    sizes = decoder.read_sizes(config, context=196_608, head_dim=128)
    config.ignore(
        *experts.IGNORED, "auto_map", "mtp_transformer_layers", "num_mtp_modules", "use_mtp"
    )
    config.fixed(
        qk_norm_type="per_layer",
        use_qk_norm=True,
        scoring_func="sigmoid",
        use_routing_bias=True,
        shared_intermediate_size=0,
    )
    if set(config.take("attn_type_list", list, [1])) != {1}:
        config.problem("attn_type_list has another than 1, softmax attention")
    rotated = config.take("rotary_dim", int, sizes.head_dim)
    fraction = rotated / max(sizes.head_dim, 1)
    rope = read_rope(config, context=sizes.context, theta=5e6, fraction=fraction)
    eps = config.take("rms_norm_eps", float, 1e-6)
    activation = decoder.read_activation(config)
    tied = config.take("tie_word_embeddings", bool, False)
    count = config.take("num_local_experts", int, 256)
    active = config.take("num_experts_per_tok", int, 8)

    def make() -> ModelSpec:
        norm, expert = Norm(eps=eps), MLP(width=sizes.ffn, activation=activation)
        attn = Attention(**decoder.heads_of(sizes), qk_norm=QKNorm(over="full", eps=eps), rope=rope)
        router = Router(score="sigmoid", renormalize=True, balance_bias=True)
        moe = MoE(experts=count, active=active, mlp=expert, router=router)
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
        **decoder.write_sizes(spec, "MiniMaxM2", parts),
        **write_rope(parts.attn.rope, context=spec.context),
        "model_type": "minimax_m2",
        "num_local_experts": mixed.moe.experts,
        "num_experts_per_tok": mixed.moe.active,
        "rms_norm_eps": parts.norm.eps,
        "hidden_act": decoder.write_activation(parts.mlp.activation),
    }


def _names(spec: ModelSpec) -> list[Entry]:
    names = decoder.TENSORS | decoder.QK_NORMS | experts.NORMS | mixtral.TENSORS | _BALANCE
    return [experts.bias_entry(entry) for entry in decoder.entries(spec, names)]


FAMILY = Family(model_types=("minimax_m2",), read=_read, write=_write, names=_names)
