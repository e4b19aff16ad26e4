"""OLMo-Hybrid: gated DeltaNets in pre-norm layers, attention in layers with norms after each op."""

from __future__ import annotations

from typing import Any

from jaxllm.spec.linear_attention import GatedDecay, LinearAttention, OutNorm
from jaxllm.spec.model import Block, Head, ModelSpec, sub
from jaxllm.spec.ops import MLP, Attention, Norm, QKNorm
from jaxllm.spec.rope import Rope
from jaxllm.zoo import decoder, hybrid
from jaxllm.zoo.rope import read_rope, write_rope
from jaxllm.zoo.table import ConfigReader, Entry, Family

__all__ = ["FAMILY"]

_NAMES = (
    decoder.TENSORS
    | decoder.QK_NORMS
    | {
        # As transformers 5 saves them; the second file dialect is in FAMILY.
        "attn_out_norm": "feedforward_layer_norm",
        "mlp_out_norm": "post_feedforward_layernorm",
        "linear_norm": "attention_layer_norm",
        "mlp_norm": "feedforward_layer_norm",
        "linear.query": "linear_attn.q_proj",
        "linear.key": "linear_attn.k_proj",
        "linear.value": "linear_attn.v_proj",
        "linear.out_gate": "linear_attn.g_proj",
        "linear.beta": "linear_attn.b_proj",
        "linear.decay": "linear_attn.a_proj",
        "linear.conv_query": "linear_attn.q_conv1d",
        "linear.conv_key": "linear_attn.k_conv1d",
        "linear.conv_value": "linear_attn.v_conv1d",
        "linear.a_log": "linear_attn.A_log=",
        "linear.dt": "linear_attn.dt_bias=",
        "linear.out_norm": "linear_attn.o_norm",
        "linear.out": "linear_attn.o_proj",
    }
)
_INIT = ("a_log_max", "a_log_min", "dt_init_floor", "dt_max", "dt_min")


def _rope(config: ConfigReader, context: int) -> Rope | None:
    """A base of null is no rope, as in the published model; an absent one is 10,000."""
    parameters = config.take("rope_parameters", dict, {})
    if "rope_theta" in parameters and parameters["rope_theta"] is None:
        config.ignore("rope_theta", "rope_scaling")
        return None
    return read_rope(config, context=context)


def _linear(config: ConfigReader, sizes: decoder.Sizes, activation: Any) -> dict[str, Any]:
    keys = config.take("linear_num_key_heads", int, sizes.heads)
    width = config.take("linear_key_head_dim", int, int(0.75 * sizes.width / max(keys, 1)))
    return {
        "heads": config.take("linear_num_value_heads", int, sizes.heads),
        "key_heads": keys,
        "key_dim": width,
        "value_dim": config.take("linear_value_head_dim", int, 2 * width),
        "conv": config.take("linear_conv_kernel_dim", int, 4),
        "beta_max": 2.0 if config.take("linear_allow_neg_eigval", bool, True) else 1.0,
        "decay": GatedDecay(),
        "delta": True,
        "activation": activation,
        "l2_eps": 1e-6,
        "out_norm": OutNorm(eps=1e-5),  # of the reference's kernel, whatever rms_norm_eps is
        "gate": "silu",
    }


def _default_kinds(layers: int) -> list[str]:
    """Every fourth layer is attention, or the last where there are fewer."""
    kinds = [hybrid.KINDS[i % 4 != 3] for i in range(layers)]
    return kinds if "full_attention" in kinds else [*kinds[:-1], "full_attention"]


def _read(config: ConfigReader) -> ModelSpec:
    sizes = decoder.read_sizes(config, context=65_536)
    config.ignore(*(f"linear_{name}" for name in _INIT))
    kinds = hybrid.read_kinds(config, sizes.layers, _default_kinds(sizes.layers))
    rope = _rope(config, sizes.context)
    bias = config.take("attention_bias", bool, False)
    eps = config.take("rms_norm_eps", float, 1e-6)
    activation = decoder.read_activation(config)
    tied = config.take("tie_word_embeddings", bool, False)
    linear = _linear(config, sizes, activation)

    def make() -> ModelSpec:
        norm, mlp = Norm(eps=eps), MLP(width=sizes.ffn, activation=activation)
        attn = Attention(
            **decoder.heads_of(sizes),
            qkv_bias=bias,
            out_bias=bias,
            qk_norm=QKNorm(over="full", eps=eps),
            rope=rope,
        )
        after = (sub("attn", attn, norm_out=norm), sub("mlp", mlp, norm_out=norm))
        mixer = sub("linear", LinearAttention(**linear), norm_in=norm)
        before = (mixer, sub("mlp", mlp, norm_in=norm))
        return decoder.model_of(
            sizes,
            ["G" if kind == "full_attention" else "K" for kind in kinds],
            lambda name: Block(name=name, subs=after if name == "G" else before),
            ropes=(rope,),
            final_norm=norm,
            head=Head(tied=tied),
        )

    return config.finish(make)


def _write(spec: ModelSpec) -> dict[str, Any] | None:
    parts = hybrid.hybrid_of(spec)
    if parts is None or parts.mlp is None:
        return None
    rope = write_rope(parts.attn.rope, context=spec.context)
    if parts.attn.rope is None:
        none = {"rope_theta": None, "rope_type": "default"}
        rope = {"max_position_embeddings": spec.context, "rope_parameters": none}
    return {
        **hybrid.write_sizes(spec, "OlmoHybrid", parts),
        **rope,
        "model_type": "olmo_hybrid",
        "attention_bias": parts.attn.out_bias,
        "linear_allow_neg_eigval": parts.linear.beta_max == 2,
        "rms_norm_eps": parts.norm.eps,
        "hidden_act": decoder.write_activation(parts.mlp.activation),
    }


def _names(spec: ModelSpec) -> list[Entry]:
    return hybrid.entries(spec, _NAMES, {})


FAMILY = Family(
    model_types=("olmo_hybrid",),
    read=_read,
    write=_write,
    names=_names,
    older={
        ".attention_layer_norm.weight": ".input_layernorm.weight",
        ".feedforward_layer_norm.weight": ".post_attention_layernorm.weight",
    },
)
