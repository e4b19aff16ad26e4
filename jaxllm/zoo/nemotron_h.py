"""Nemotron-H: one op a layer (dual state space, attention without rope, plain feed-forward)."""

from __future__ import annotations

from typing import Any

from jaxllm.spec.model import Block, Head, ModelSpec, sub
from jaxllm.spec.ops import MLP, Attention, Norm, StateSpaceDual
from jaxllm.spec.state_space import GatedNorm
from jaxllm.zoo import decoder, recurrent
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
}
_WRITTEN = {"M": "linear_attention", "A": "full_attention", "F": "mlp"}
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
}
_IGNORED = (
    *recurrent.IGNORED,
    "auto_map",
    "expand",
    "mamba_ssm_cache_dtype",
    "residual_in_fp32",
    "time_step_limit",  # the reference takes time_step_min for the least step
    "time_step_max",
    # Of experts and of prediction of several tokens, which no layer of these uses.
    "moe_intermediate_size",
    "moe_latent_size",
    "moe_shared_expert_intermediate_size",
    "moe_shared_expert_overlap",
    "mtp_hybrid_override_pattern",
    "mtp_layers_block_type",
    "n_group",
    "n_routed_experts",
    "n_shared_experts",
    "norm_topk_prob",
    "num_experts_per_tok",
    "num_nextn_predict_layers",
    "output_router_logits",
    "routed_scaling_factor",
    "topk_group",
)


def _layers(config: ConfigReader) -> list[str]:
    """The block of each layer, from a list of kinds or a text of letters."""
    text = config.take("hybrid_override_pattern", str, "")
    kinds = config.take("layers_block_type", list, None)
    if kinds is None:
        found = [_LETTERS.get(letter) for letter in text]
        unknown = sorted(set(text) - set(_LETTERS))
    else:
        found = [_KINDS.get(str(kind), "E" if kind == "moe" else None) for kind in kinds]
        unknown = sorted({repr(k) for k, name in zip(kinds, found, strict=True) if name is None})
    if unknown or not found:
        config.problem(f"layers of kinds {', '.join(unknown) or 'none'} are not known")
    if "E" in found:
        config.problem("layers of experts (moe, E) are not supported yet")
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
    mlp_bias = config.take("mlp_bias", bool, False)
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
            "F": sub(
                "mlp", MLP(width=ffn, activation=activation, gated=False, bias=mlp_bias), **norm
            ),
        }
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
    mixer, attn, mlp = (ops.get(kind) for kind in (StateSpaceDual, Attention, MLP))
    if mixer is None or spec.final_norm is None or set(spec.pattern.names) - set(_WRITTEN):
        return None
    attn = attn or Attention(heads=1, kv_heads=1, head_dim=1)
    mlp = mlp or MLP(width=1, activation="relu2")
    return {
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


def _names(spec: ModelSpec) -> list[Entry]:
    names = _NAMES | recurrent.dual_names("mixer")
    return recurrent.entries(spec, names, layer=_PREFIX + "layers.{}.")


FAMILY = Family(
    model_types=("nemotron_h",),
    read=_read,
    write=_write,
    names=_names,
    ignored=("mtp.*",),
    prefix=_PREFIX,
)
