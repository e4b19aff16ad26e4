"""Qwen3-Next: three gated DeltaNets to one gated attention, each before experts."""

from __future__ import annotations

from typing import Any

from jaxllm.spec.linear_attention import GatedDecay, LinearAttention, OutNorm
from jaxllm.spec.model import Block, Head, ModelSpec
from jaxllm.spec.moe import MoE, Router
from jaxllm.spec.ops import MLP, Attention, Norm, QKNorm
from jaxllm.zoo import decoder, experts, hybrid
from jaxllm.zoo.qwen_moe import EXPERTS
from jaxllm.zoo.rope import read_rope, write_rope
from jaxllm.zoo.table import ConfigReader, Entry, Family

__all__ = ["FAMILY"]

# (has experts, kind of layer) -> name of the block
_BLOCKS = {
    (True, "full_attention"): "E",
    (True, "linear_attention"): "K",
    (False, "full_attention"): "G",
    (False, "linear_attention"): "L",
}
_NAMES = (
    decoder.TENSORS
    | decoder.QK_NORMS
    | experts.NORMS
    | EXPERTS
    | {
        "attn.out_gate": "self_attn.q_proj",
        "shared.gate": "mlp.shared_expert.gate_proj",
        "shared.up": "mlp.shared_expert.up_proj",
        "shared.down": "mlp.shared_expert.down_proj",
        "shared.out_gate": "mlp.shared_expert_gate",
    }
)
_LINEAR = {
    "linear_norm": "input_layernorm",
    "linear.query": "linear_attn.in_proj_qkvz",
    "linear.key": "linear_attn.in_proj_qkvz",
    "linear.value": "linear_attn.in_proj_qkvz",
    "linear.out_gate": "linear_attn.in_proj_qkvz",
    "linear.beta": "linear_attn.in_proj_ba",
    "linear.decay": "linear_attn.in_proj_ba",
    "linear.conv_query": "linear_attn.conv1d",
    "linear.conv_key": "linear_attn.conv1d",
    "linear.conv_value": "linear_attn.conv1d",
    "linear.a_log": "linear_attn.A_log=",
    "linear.dt": "linear_attn.dt_bias=",
    "linear.out_norm": "linear_attn.norm",
    "linear.out": "linear_attn.out_proj",
}


def _linear(config: ConfigReader, activation: Any, eps: float) -> dict[str, Any]:
    return {
        "heads": config.take("linear_num_value_heads", int, 32),
        "key_heads": config.take("linear_num_key_heads", int, 16),
        "key_dim": config.take("linear_key_head_dim", int, 128),
        "value_dim": config.take("linear_value_head_dim", int, 128),
        "conv": config.take("linear_conv_kernel_dim", int, 4),
        "decay": GatedDecay(),
        "delta": True,
        "activation": activation,
        "l2_eps": 1e-6,
        "out_norm": OutNorm(eps=eps),
        "gate": "silu",
    }


def _experts(config: ConfigReader, activation: Any) -> tuple[MoE, MLP] | None:
    """The experts and the MLP beside them; None where there are none."""
    shared = config.take("shared_expert_intermediate_size", int, 512)
    width = config.take("moe_intermediate_size", int, 512)
    active = config.take("num_experts_per_tok", int, 10)
    count = config.take("num_experts", int, config.take("num_local_experts", int, 512))
    router = Router(renormalize=config.take("norm_topk_prob", bool, True))
    if not count:
        return None
    moe = config.attempt(
        lambda: MoE(
            experts=count,
            active=active,
            mlp=MLP(width=width, activation=activation),
            router=router,
        ),
    )
    beside = config.attempt(lambda: MLP(width=shared, activation=activation, out_gate=True))
    return None if moe is None or beside is None else (moe, beside)


def _read(config: ConfigReader) -> ModelSpec:
    sizes = decoder.read_sizes(config, context=32_768, head_dim=256)
    config.ignore(*experts.IGNORED)
    period = config.take("full_attention_interval", int, 4)
    default = [hybrid.KINDS[(i + 1) % max(period, 1) != 0] for i in range(sizes.layers)]
    kinds = hybrid.read_kinds(config, sizes.layers, default)
    sparse = experts.read_sparse(config, sizes.layers)
    rope = read_rope(config, context=sizes.context, fraction=0.25)
    eps = config.take("rms_norm_eps", float, 1e-6)
    activation = decoder.read_activation(config)
    tied = config.take("tie_word_embeddings", bool, False)
    if config.take("attention_bias", bool, False):
        config.problem("attention_bias is True; the gate of attention has no bias here")
    linear, mixture = _linear(config, activation, eps), _experts(config, activation)
    sparse = sparse if mixture else [False] * sizes.layers

    def make() -> ModelSpec:
        norm = Norm(eps=eps, offset=1.0)
        attn = Attention(
            **decoder.heads_of(sizes), qk_norm=QKNorm(eps=eps, offset=1.0), gate=True, rope=rope
        )
        mixers: dict[str, tuple[str, Any]] = {"full_attention": ("attn", attn)}
        mixers["linear_attention"] = ("linear", LinearAttention(**linear))
        dense = MLP(width=sizes.ffn, activation=activation)
        parts = {name: pair for pair, name in _BLOCKS.items()}

        def block(name: str) -> Block:
            has, kind = parts[name]
            mixer, op = mixers[kind]
            ffn, shared = mixture if has and mixture else (dense, None)
            return experts.layer(name, op, norm, ffn, shared, mixer=mixer)

        return decoder.model_of(
            sizes,
            [_BLOCKS[pair] for pair in zip(sparse, kinds, strict=True)],
            block,
            ropes=(rope,),
            final_norm=norm,
            head=Head(tied=tied),
        )

    return config.finish(make)


def _write(spec: ModelSpec) -> dict[str, Any] | None:
    parts = hybrid.hybrid_of(spec)
    if parts is None:
        return None
    attn, moe, shared = parts.attn, parts.moe, parts.shared
    mlp = parts.mlp or shared
    config = {
        **hybrid.write_sizes(spec, "Qwen3Next", parts),
        **write_rope(attn.rope, context=spec.context),
        "model_type": "qwen3_next",
        "head_dim": attn.head_dim,
        "partial_rotary_factor": 1.0 if attn.rope is None else attn.rope.fraction,
        "decoder_sparse_step": 1,
        "mlp_only_layers": experts.dense_layers(parts.sparse),
        "num_experts": 0,
        "rms_norm_eps": parts.norm.eps,
    }
    if mlp is not None:
        config["hidden_act"] = decoder.write_activation(mlp.activation)
    if moe is None or shared is None:
        return config
    return config | {
        "num_experts": moe.experts,
        "num_experts_per_tok": moe.active,
        "moe_intermediate_size": moe.mlp.width,
        "shared_expert_intermediate_size": shared.width,
        "norm_topk_prob": moe.router.renormalize,
    }


def _names(spec: ModelSpec) -> list[Entry]:
    parts = hybrid.hybrid_of(spec)
    assert parts is not None
    groups = {
        "in_proj_qkvz": parts.linear.key_heads,
        "in_proj_ba": parts.linear.key_heads,
        "self_attn.q_proj": parts.attn.heads,
    }
    return hybrid.entries(spec, _NAMES | _LINEAR, groups)


FAMILY = Family(model_types=("qwen3_next",), read=_read, write=_write, names=_names)
