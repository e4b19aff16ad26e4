"""Nemotron-H: one op a layer (dual state space, attention without rope, plain MLP or experts)."""

from __future__ import annotations

from typing import Any

from jaxllm.spec.model import Block, Head, ModelSpec, NamedOp, Sub, sub
from jaxllm.spec.ops import MLP, Attention, MoE, Norm, Router, StateSpaceDual
from jaxllm.spec.state_space import GatedNorm
from jaxllm.zoo import decoder, experts, recurrent
from jaxllm.zoo.table import ConfigReader, Entry, Family

__all__ = ["FAMILY"]

_PREFIX = "backbone."
_LETTERS = {"M": "M", "*": "A", "-": "F", "E": "E"}
_KINDS = {
    "linear_attention": "M",
    "mamba": "M",
    "full_attention": "A",
    "attention": "A",
    "mlp": "F",
    "moe": "E",
}
_WRITTEN = {"M": "linear_attention", "A": "full_attention", "F": "mlp", "E": "moe"}
_NAMES = {
    "embed.table": _PREFIX + "embeddings",
    "final_norm": _PREFIX + "norm_f",
    "head.kernel": "lm_head",
    "ssm_norm": "norm",
    "attn_norm": "norm",
    "mlp_norm": "norm",
    "attn.q": "mixer.q_proj",
    "attn.k": "mixer.k_proj",
    "attn.v": "mixer.v_proj",
    "attn.o": "mixer.o_proj",
    "mlp.up": "mixer.up_proj",
    "mlp.down": "mixer.down_proj",
    "moe_norm": "norm",
    "moe.router": "mixer.gate",
    "moe.balance": "mixer.gate.e_score_correction",
    "moe.latent_down": "mixer.fc1_latent_proj",
    "moe.latent_up": "mixer.fc2_latent_proj",
    "moe.up": "mixer.experts.{}.up_proj",
    "moe.down": "mixer.experts.{}.down_proj",
    "shared.up": "mixer.shared_experts.up_proj",
    "shared.down": "mixer.shared_experts.down_proj",
}
_IGNORED = (
    *recurrent.IGNORED,
    "auto_map",
    "expand",
    "mamba_ssm_cache_dtype",
    "residual_in_fp32",
    "time_step_limit",  # the reference takes time_step_min for the least step
    "time_step_max",
    "moe_shared_expert_overlap",
    "output_router_logits",
    # Of the prediction of several tokens, which is left out.
    "mtp_hybrid_override_pattern",
    "mtp_layers_block_type",
    "num_nextn_predict_layers",
)


def _layers(config: ConfigReader) -> list[str]:
    """The block of each layer, from a list of kinds or a text of letters."""
    text = config.take("hybrid_override_pattern", str, "")
    kinds = config.take("layers_block_type", list, None)
    if kinds is None:
        found = [_LETTERS.get(letter) for letter in text]
        unknown = sorted(set(text) - set(_LETTERS))
    else:
        found = [_KINDS.get(str(kind)) for kind in kinds]
        unknown = sorted({repr(k) for k, name in zip(kinds, found, strict=True) if name is None})
    if unknown or not found:
        config.problem(f"layers of kinds {', '.join(unknown) or 'none'} are not known")
    if config.take("num_hidden_layers", int, len(found)) != len(found):
        config.problem(f"num_hidden_layers is not {len(found)}, as many as kinds are given")
    return [name or "F" for name in found]


def _mixer(config: ConfigReader, eps: float) -> StateSpaceDual | None:
    bias, groups = config.take("use_bias", bool, False), config.take("n_groups", int, 8)
    if config.take("mamba_proj_bias", bool, bias) != bias:
        config.problem("mamba_proj_bias is not use_bias, which the reference reads")
    parts = {
        "heads": config.take("mamba_num_heads", int, 128),
        "head_dim": config.take("mamba_head_dim", int, 64),
        "state": config.take("ssm_state_size", int, 128),
        "groups": groups,
        "conv": config.take("conv_kernel", int, 4),
        "conv_bias": config.take("use_conv_bias", bool, True),
        "in_bias": bias,
        "out_bias": bias,
        "dt_min": config.take("time_step_min", float, 1e-3),
        "activation": decoder.read_activation(config, "mamba_hidden_act"),
    }
    return config.attempt(lambda: StateSpaceDual(**parts, norm=GatedNorm(eps=eps, groups=groups)))


def _experts(config: ConfigReader, plain: dict[str, Any], *, used: bool) -> tuple[NamedOp, ...]:
    """The mixture and the MLP beside it, or nothing where no layer has them."""
    count, active = (
        config.take("n_routed_experts", int, 8),
        config.take("num_experts_per_tok", int, 2),
    )
    width = config.take("moe_intermediate_size", int, 7688)
    shared = config.take("moe_shared_expert_intermediate_size", int, 7688)
    latent = config.take("moe_latent_size", int, None)
    router = {
        "renormalize": config.take("norm_topk_prob", bool, True),
        "scale": config.take("routed_scaling_factor", float, 1.0),
        "groups": config.take("n_group", int, 1),
        "groups_kept": config.take("topk_group", int, 1),
    }
    if not used:
        config.ignore("n_shared_experts")
        return ()
    config.fixed(n_shared_experts=1)

    def make() -> tuple[NamedOp, ...]:
        moe = MoE(
            experts=count,
            active=active,
            mlp=MLP(width=width, **dict(plain, bias=False)),
            router=Router(score="sigmoid", balance_bias=True, **router),
            latent=latent,
            latent_bias=latent is not None and plain["bias"],
        )
        beside = MLP(width=shared, **plain)
        return (NamedOp(name="moe", op=moe), NamedOp(name="shared", op=beside))

    return config.attempt(make) or ()


def _read(config: ConfigReader) -> ModelSpec:
    config.ignore(*decoder.IGNORED_KEYS, *_IGNORED)
    vocab, width = config.take("vocab_size", int), config.take("hidden_size", int)
    context = config.take("max_position_embeddings", int, 4096)
    names = _layers(config)
    eps = config.take("layer_norm_epsilon", float, 1e-5)
    mixer = _mixer(config, eps)
    heads = config.take("num_attention_heads", int, 32)
    kv_heads = config.take("num_key_value_heads", int, 8)
    head_dim = config.take("head_dim", int, config.take("attention_head_dim", int, 128))
    ffn = config.take("intermediate_size", int, 21_504)
    activation = decoder.read_activation(config, "mlp_hidden_act", "relu2")
    plain: dict[str, Any] = {
        "activation": activation,
        "gated": False,
        "bias": config.take("mlp_bias", bool, False),
    }
    mixture = _experts(config, plain, used="E" in names)
    # The reference has neither in any case.
    config.fixed(attention_bias=False, tie_word_embeddings=False)
    if config.take("sliding_window", int, 0):
        config.problem("sliding_window is not supported in this family")

    def make() -> ModelSpec:
        assert mixer is not None  # a problem was left where there is none
        norm = {"norm_in": Norm(eps=eps)}
        subs = {
            "M": sub("ssm", mixer, **norm),
            "A": sub(
                "attn",
                Attention(heads=heads, kv_heads=kv_heads, head_dim=head_dim, rope=None),
                **norm,
            ),
            "F": sub("mlp", MLP(width=ffn, **plain), **norm),
        }
        if mixture:
            subs["E"] = Sub(ops=mixture, norm_in=norm["norm_in"])
        return ModelSpec(
            vocab=vocab,
            width=width,
            context=context,
            final_norm=norm["norm_in"],
            head=Head(),
            **decoder.layers_of(names, lambda name: Block(name=name, subs=(subs[name],))),
        )

    return config.finish(make)


def _write(spec: ModelSpec) -> dict[str, Any] | None:
    ops = recurrent.ops_of(spec)
    mixer, attn = ops.get(StateSpaceDual), ops.get(Attention)
    if mixer is None or spec.final_norm is None or set(spec.pattern.names) - set(_WRITTEN):
        return None
    attn = attn or Attention(heads=1, kv_heads=1, head_dim=1)
    plain = [named.op for b in spec.blocks if b.name == "F" for named in b.subs[0].ops]
    mlp = next((op for op in plain if isinstance(op, MLP)), MLP(width=1, activation="relu2"))
    config = {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "vocab_size": spec.vocab,
        "hidden_size": spec.width,
        "max_position_embeddings": spec.context,
        "num_hidden_layers": spec.num_layers,
        "layers_block_type": [_WRITTEN[name] for name in spec.pattern.names],
        "layer_norm_epsilon": spec.final_norm.eps,
        "mamba_num_heads": mixer.heads,
        "mamba_head_dim": mixer.head_dim,
        "ssm_state_size": mixer.state,
        "n_groups": mixer.groups,
        "conv_kernel": mixer.conv,
        "use_conv_bias": mixer.conv_bias,
        "use_bias": mixer.in_bias,
        "time_step_min": mixer.dt_min,
        "mamba_hidden_act": decoder.write_activation(mixer.activation),
        "num_attention_heads": attn.heads,
        "num_key_value_heads": attn.kv_heads,
        "head_dim": attn.head_dim,
        "intermediate_size": mlp.width,
        "mlp_hidden_act": decoder.write_activation(mlp.activation),
        "mlp_bias": mlp.bias,
    }
    return config | _write_experts(spec)


def _write_experts(spec: ModelSpec) -> dict[str, Any]:
    """The keys of `_experts`."""
    block = next((b for b in spec.blocks if b.name == "E"), None)
    match () if block is None else tuple(named.op for named in block.subs[0].ops):
        case (MoE() as moe, MLP() as shared):
            return {
                "n_routed_experts": moe.experts,
                "num_experts_per_tok": moe.active,
                "moe_intermediate_size": moe.mlp.width,
                "moe_shared_expert_intermediate_size": shared.width,
                "moe_latent_size": moe.latent,
                "norm_topk_prob": moe.router.renormalize,
                "routed_scaling_factor": moe.router.scale,
                "n_group": moe.router.groups,
                "topk_group": moe.router.groups_kept,
                "mlp_hidden_act": decoder.write_activation(shared.activation),
                "mlp_bias": shared.bias,
            }
    return {}


def _names(spec: ModelSpec) -> list[Entry]:
    names = _NAMES | recurrent.dual_names("mixer")
    found = recurrent.entries(spec, names, layer=_PREFIX + "layers.{}.")
    return [experts.bias_entry(entry) for entry in found]


FAMILY = Family(
    model_types=("nemotron_h",),
    read=_read,
    write=_write,
    names=_names,
    ignored=("mtp.*",),
    prefix=_PREFIX,
)
