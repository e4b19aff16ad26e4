"""Qwen2-MoE and Qwen3-MoE: layers with experts between dense ones, by a period or a list.

Qwen2-MoE has an MLP for all tokens beside the experts, weighed by a sigmoid, and windows on some
layers; Qwen3-MoE norms queries and keys head by head, and its window, if any, is every layer's.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxllm.spec.model import Block, Head, ModelSpec
from jaxllm.spec.moe import MoE, Router
from jaxllm.spec.ops import MLP, Attention, Norm, QKNorm
from jaxllm.zoo import decoder, experts
from jaxllm.zoo.decoder import Kind
from jaxllm.zoo.rope import read_rope, write_rope
from jaxllm.zoo.table import ConfigReader, Family

__all__ = ["EXPERTS", "QWEN2_MOE", "QWEN3_MOE"]

EXPERTS = {
    "moe.router": "mlp.gate",
    "moe.gate": "mlp.experts.{}.gate_proj",
    "moe.up": "mlp.experts.{}.up_proj",
    "moe.down": "mlp.experts.{}.down_proj",
}
"""Names of experts in most families."""
_SHARED = {
    "shared.gate": "mlp.shared_expert.gate_proj",
    "shared.up": "mlp.shared_expert.up_proj",
    "shared.down": "mlp.shared_expert.down_proj",
    "shared.out_gate": "mlp.shared_expert_gate",
}
# (has experts, kind of attention) -> name of the block
_BLOCKS: dict[tuple[bool, Kind], str] = {
    (True, "full_attention"): "E",
    (True, "sliding_attention"): "S",
    (False, "full_attention"): "G",
    (False, "sliding_attention"): "L",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Own:
    """What the two generations read each in its way."""

    kinds: list[Kind]
    window: int
    attention: dict[str, Any]
    shared: int | None = None
    defaults: tuple[int, int, int]


def _read2(config: ConfigReader) -> ModelSpec:
    sizes = decoder.read_sizes(config, context=32_768)
    used = config.take("use_sliding_window", bool, False)
    last = config.take("max_window_layers", int, 28)
    default: list[Kind] = [
        decoder.KINDS[used and i % 2 == 0 and i < last] for i in range(sizes.layers)
    ]
    kinds = decoder.read_kinds(config, default)
    window = decoder.window_of(config, kinds, 4096)
    if "sliding_attention" in kinds and not used:
        config.problem("layer_types has sliding_attention, but use_sliding_window is false")
    own = _Own(
        kinds=kinds,
        window=window,
        attention={"qkv_bias": config.take("qkv_bias", bool, True)},
        shared=config.take("shared_expert_intermediate_size", int, 5632),
        defaults=(60, 4, 1408),
    )
    return _make(config, sizes, own)


def _read3(config: ConfigReader) -> ModelSpec:
    # The reference's attention takes hidden_size over heads where the file names no head_dim.
    sizes = decoder.read_sizes(config, context=32_768)
    used = config.take("use_sliding_window", bool, False)
    config.ignore("max_window_layers")
    window = config.take("sliding_window", int, None if config.has("sliding_window") else 4096)
    bias = config.take("attention_bias", bool, False)
    own = _Own(
        kinds=[decoder.KINDS[used and bool(window)]] * sizes.layers,
        window=window or 1,
        attention={"qkv_bias": bias, "out_bias": bias, "qk_norm": QKNorm()},
        defaults=(128, 8, 768),
    )
    return _make(config, sizes, own)


def _make(config: ConfigReader, sizes: decoder.Sizes, own: _Own) -> ModelSpec:
    config.ignore(*experts.IGNORED)
    sparse = experts.read_sparse(config, sizes.layers)
    rope = read_rope(config, context=sizes.context)
    eps = config.take("rms_norm_eps", float, 1e-6)
    activation = decoder.read_activation(config)
    tied = config.take("tie_word_embeddings", bool, False)
    count = config.take("num_experts", int, config.take("num_local_experts", int, own.defaults[0]))
    active = config.take("num_experts_per_tok", int, own.defaults[1])
    width = config.take("moe_intermediate_size", int, own.defaults[2])
    router = Router(renormalize=config.take("norm_topk_prob", bool, False))

    def make() -> ModelSpec:
        norm, shared, parts = Norm(eps=eps), None, dict(own.attention)
        if "qk_norm" in parts:
            parts["qk_norm"] = QKNorm(eps=eps)
        if own.shared is not None:
            shared = MLP(width=own.shared, activation=activation, out_gate=True)
        expert = MLP(width=width, activation=activation)
        moe = MoE(experts=count, active=active, mlp=expert, router=router)
        dense = MLP(width=sizes.ffn, activation=activation)
        kinds = {name: pair for pair, name in _BLOCKS.items()}

        def block(name: str) -> Block:
            has, kind = kinds[name]
            mask = decoder.mask_of(kind, own.window)
            attn = Attention(**decoder.heads_of(sizes), rope=rope, mask=mask, **parts)
            return experts.layer(name, attn, norm, moe if has else dense, shared)

        return decoder.model_of(
            sizes,
            [_BLOCKS[pair] for pair in zip(sparse, own.kinds, strict=True)],
            block,
            ropes=(rope,),
            final_norm=norm,
            head=Head(tied=tied),
        )

    return config.finish(make)


def _write(spec: ModelSpec, kind: str, name: str) -> dict[str, Any] | None:
    mixed = experts.mixed_of(spec)
    if mixed is None:
        return None
    parts = mixed.parts
    windows = decoder.write_kinds(spec, parts)
    sliding = "sliding_attention" in windows["layer_types"]
    config = {
        **decoder.write_sizes(spec, name, parts),
        **write_rope(parts.attn.rope, context=spec.context),
        "model_type": kind,
        "sliding_window": windows["sliding_window"],
        "use_sliding_window": sliding,
        "decoder_sparse_step": 1,
        "mlp_only_layers": experts.dense_layers(mixed.sparse),
        "num_experts": mixed.moe.experts,
        "num_experts_per_tok": mixed.moe.active,
        "moe_intermediate_size": mixed.moe.mlp.width,
        "norm_topk_prob": mixed.moe.router.renormalize,
        "rms_norm_eps": parts.norm.eps,
        "hidden_act": decoder.write_activation(parts.mlp.activation),
    }
    if kind == "qwen3_moe":
        return config | {"attention_bias": parts.attn.out_bias}
    if mixed.shared is None:
        return None
    config |= {"layer_types": windows["layer_types"], "qkv_bias": parts.attn.qkv_bias}
    return config | {"shared_expert_intermediate_size": mixed.shared.width}


QWEN2_MOE = Family(
    model_types=("qwen2_moe",),
    read=_read2,
    write=lambda spec: _write(spec, "qwen2_moe", "Qwen2Moe"),
    names=lambda spec: decoder.entries(spec, decoder.TENSORS | experts.NORMS | EXPERTS | _SHARED),
)
QWEN3_MOE = Family(
    model_types=("qwen3_moe",),
    read=_read3,
    write=lambda spec: _write(spec, "qwen3_moe", "Qwen3Moe"),
    names=lambda spec: decoder.entries(
        spec, decoder.TENSORS | decoder.QK_NORMS | experts.NORMS | EXPERTS
    ),
)
