"""Kimi Linear: delta attention with a decay a channel, latent attention without rope, experts.

Two dialects: files on the hub have the sizes of delta attention and the numbers of layers, from 1
on, in `linear_attn_config`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxllm.spec.linear_attention import GatedDecay, LinearAttention, OutNorm
from jaxllm.spec.model import Block, Head, ModelSpec
from jaxllm.spec.moe import MoE, Router
from jaxllm.spec.ops import MLP, LatentAttention, Norm
from jaxllm.zoo import decoder, deepseek, experts, hybrid, mixtral
from jaxllm.zoo.table import ConfigReader, Entry, Family

__all__ = ["FAMILY"]

# (has experts, kind of layer) -> name of the block
_BLOCKS = {
    (True, "full_attention"): "E",
    (True, "linear_attention"): "K",
    (False, "full_attention"): "G",
    (False, "linear_attention"): "L",
}
_FFN = "block_sparse_moe."
_NAMES = (
    decoder.TENSORS
    | experts.NORMS
    | mixtral.TENSORS
    | deepseek.LATENT
    | {
        # As transformers 5 saves them; the second file dialect is in FAMILY.
        "mlp.gate": f"{_FFN}gate_proj",
        "mlp.up": f"{_FFN}up_proj",
        "mlp.down": f"{_FFN}down_proj",
        "moe.balance": f"{_FFN}gate.e_score_correction",
        "shared.gate": f"{_FFN}shared_experts.gate_proj",
        "shared.up": f"{_FFN}shared_experts.up_proj",
        "shared.down": f"{_FFN}shared_experts.down_proj",
        "linear_norm": "input_layernorm",
        "linear.query": "self_attn.q_proj",
        "linear.key": "self_attn.k_proj",
        "linear.value": "self_attn.v_proj",
        "linear.conv_query": "self_attn.q_conv1d",
        "linear.conv_key": "self_attn.k_conv1d",
        "linear.conv_value": "self_attn.v_conv1d",
        "linear.beta": "self_attn.b_proj",
        "linear.decay_a": "self_attn.f_a_proj",
        "linear.decay_b": "self_attn.f_b_proj",
        "linear.dt": "self_attn.dt_bias=",
        "linear.a_log": "self_attn.A_log=",
        "linear.out_gate_a": "self_attn.g_a_proj",
        "linear.out_gate_b": "self_attn.g_b_proj",
        "linear.out_norm": "self_attn.o_norm",
        "linear.out": "self_attn.o_proj",
    }
)
_KINDS = ("dense", "sparse")


def _linear(config: ConfigReader, layers: int) -> tuple[tuple[int, int, int], list[str]]:
    """(heads, their width, width of the convolutions), and `layer_types` by default."""
    default = [hybrid.KINDS[not i or i % 4 != 0] for i in range(layers)]
    inner = ConfigReader(config.take("linear_attn_config", dict, {}), "linear_attn_config")
    sizes = (
        inner.take("num_heads", int, config.take("linear_num_heads", int, 32)),
        inner.take("head_dim", int, config.take("linear_head_dim", int, 128)),
        inner.take("short_conv_kernel_size", int, config.take("linear_conv_kernel_dim", int, 4)),
    )
    full = inner.take("full_attn_layers", list, None)
    delta = inner.take("kda_layers", list, None)
    if full is not None and delta is not None:
        if sorted(map(str, full + delta)) != sorted(map(str, range(1, layers + 1))):
            inner.problem(f"full_attn_layers and kda_layers are not the layers 1 to {layers}")
        default = [hybrid.KINDS[i + 1 not in full] for i in range(layers)]
    config.attempt(inner.finish)
    return sizes, default


def _sparse(config: ConfigReader, layers: int) -> list[bool]:
    dense = config.take("first_k_dense_replace", int, 1)
    default = [_KINDS[i >= dense] for i in range(layers)]
    kinds = config.take("mlp_layer_types", list, default)
    if len(kinds) != layers or any(kind not in _KINDS for kind in kinds):
        config.problem(f"mlp_layer_types is {kinds!r}; it must say dense or sparse of each layer")
        kinds = default
    return [kind == "sparse" for kind in kinds]


def _either(config: ConfigReader, name: str, other: str, default: int) -> int:
    """A key that has two names, of which files have one."""
    return config.take(name, int, config.take(other, int, default))


def _router(config: ConfigReader) -> Router | None:
    config.fixed(moe_router_activation_func="sigmoid", moe_layer_freq=1, topk_method="noaux_tc")
    parts = {
        "renormalize": config.take(
            "moe_renormalize", bool, config.take("norm_topk_prob", bool, True)
        ),
        "scale": config.take("routed_scaling_factor", float, 2.446),
        "groups": _either(config, "num_expert_group", "n_group", 1),
        "groups_kept": config.take("topk_group", int, 1),
    }
    return config.attempt(lambda: Router(score="sigmoid", balance_bias=True, **parts))


def _read(config: ConfigReader) -> ModelSpec:
    config.ignore(
        *experts.IGNORED, "auto_map", "head_dim", "num_nextn_predict_layers", "rope_scaling",
        "rope_theta", "use_grouped_topk",
    )  # fmt: skip
    config.fixed(mla_use_nope=True)
    context = config.take("model_max_length", int, 1_048_576)
    sizes = decoder.read_sizes(config, context=context)
    (heads, width, conv), default = _linear(config, sizes.layers)
    kinds = hybrid.read_kinds(config, sizes.layers, default)
    sparse = _sparse(config, sizes.layers)
    latent = deepseek.read_latent(config, q_rank=None)
    router = _router(config)
    inner = config.take("moe_intermediate_size", int, 1024)
    count = _either(config, "num_experts", "num_local_experts", 256)
    active = _either(config, "num_experts_per_token", "num_experts_per_tok", 8)
    shared = _either(config, "num_shared_experts", "n_shared_experts", 1)
    eps = config.take("rms_norm_eps", float, 1e-5)
    activation = decoder.read_activation(config)
    tied = config.take("tie_word_embeddings", bool, False)

    def make() -> ModelSpec:
        assert router is not None  # a problem was left where there is none
        norm = Norm(eps=eps)
        linear = LinearAttention(
            heads=heads,
            key_heads=heads,
            key_dim=width,
            value_dim=width,
            decay=GatedDecay(over="channel", rank=width),
            delta=True,
            conv=conv,
            activation=activation,
            l2_eps=1e-6,
            out_norm=OutNorm(eps=eps),
            gate="sigmoid",
            gate_rank=width,
        )
        attn = LatentAttention(heads=sizes.heads, rope=None, **latent)
        mixers = {"full_attention": ("attn", attn), "linear_attention": ("linear", linear)}
        expert = MLP(width=inner, activation=activation)
        moe = MoE(experts=count, active=active, mlp=expert, router=router)
        beside = MLP(width=inner * shared, activation=activation)
        dense = MLP(width=sizes.ffn, activation=activation)
        parts = {name: pair for pair, name in _BLOCKS.items()}

        def block(name: str) -> Block:
            has, kind = parts[name]
            mixer, op = mixers[kind]
            ffn = (moe, beside) if has else (dense, None)
            return experts.layer(name, op, norm, *ffn, mixer=mixer)

        return decoder.model_of(
            sizes,
            [_BLOCKS[pair] for pair in zip(sparse, kinds, strict=True)],
            block,
            ropes=(),
            final_norm=norm,
            head=Head(tied=tied),
        )

    return config.finish(make)


def _write(spec: ModelSpec) -> dict[str, Any] | None:
    parts = hybrid.hybrid_of(spec, LatentAttention)
    if parts is None or parts.moe is None or parts.shared is None:
        return None
    attn, linear, moe = parts.attn, parts.linear, parts.moe
    return {
        "architectures": ["KimiLinearForCausalLM"],
        "model_type": "kimi_linear",
        "vocab_size": spec.vocab,
        "hidden_size": spec.width,
        "intermediate_size": (parts.mlp or moe.mlp).width,
        "num_hidden_layers": spec.num_layers,
        "model_max_length": spec.context,
        "layer_types": parts.kinds,
        "mlp_layer_types": [_KINDS[has] for has in parts.sparse],
        **deepseek.write_latent(attn),
        "linear_num_heads": linear.heads,
        "linear_head_dim": linear.key_dim,
        "linear_conv_kernel_dim": linear.conv,
        "moe_intermediate_size": moe.mlp.width,
        "num_experts": moe.experts,
        "num_experts_per_token": moe.active,
        "num_shared_experts": parts.shared.width // moe.mlp.width,
        "moe_renormalize": moe.router.renormalize,
        "routed_scaling_factor": moe.router.scale,
        "num_expert_group": moe.router.groups,
        "topk_group": moe.router.groups_kept,
        "rms_norm_eps": parts.norm.eps,
        "hidden_act": decoder.write_activation(moe.mlp.activation),
        "tie_word_embeddings": spec.head.tied,
    }


def _names(spec: ModelSpec) -> list[Entry]:
    return [
        dataclasses.replace(entry, ones=(2, 1)) if entry.path.endswith("a_log") else entry
        for entry in map(experts.bias_entry, hybrid.entries(spec, _NAMES, {}))
    ]


FAMILY = Family(
    model_types=("kimi_linear",),
    read=_read,
    write=_write,
    names=_names,
    older={
        f".{_FFN}{name}_proj.weight": f".mlp.{name}_proj.weight" for name in ("gate", "up", "down")
    },
)
