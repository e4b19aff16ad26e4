"""Zamba2: dual state spaces, into some of which goes what a shared transformer makes of x as well.

A few sets of parameters of attention and MLP take turns; each use has adapters of its own, and a
matrix after it. The transformer reads x and the embedding side by side. A shared set stands in
files at the first layer that uses it, with the adapters of all.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxllm.spec.model import Block, Head, ModelSpec, sub
from jaxllm.spec.ops import MLP, Attention, Linear, Norm, StateSpaceDual
from jaxllm.spec.rope import Rope
from jaxllm.spec.state_space import GatedNorm
from jaxllm.zoo import decoder, recurrent
from jaxllm.zoo.rope import read_rope, write_rope
from jaxllm.zoo.table import ConfigReader, Entry, Family

__all__ = ["FAMILY"]

_KINDS = {"linear_attention": False, "mamba": False, "hybrid": True}
_EPS = 1e-5  # of the norm inside of the state space, whatever rms_norm_eps is
_IGNORED = (
    *recurrent.IGNORED,
    "attention_hidden_size",
    "hybrid_layer_ids",
    "kv_channels",
    "mamba_headdim",
    "num_query_groups",
    "time_step_limit",  # the reference takes time_step_min for the least step
    "time_step_max",
    "use_mem_eff_path",
)
_SHARED = {
    "attn_norm": "input_layernorm",
    "mlp_norm": "pre_ff_layernorm",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj",
    "mlp.gate": "feed_forward.gate_up_proj",
    "mlp.up": "feed_forward.gate_up_proj",
    "mlp.down": "feed_forward.down_proj",
}
_ADAPTERS = {
    **{f"attn.{x}_adapter_a": f"self_attn.linear_{x}_adapter_list.#.0" for x in "qkv"},
    **{f"attn.{x}_adapter_b": f"self_attn.linear_{x}_adapter_list.#.1" for x in "qkv"},
    "mlp.adapter_a": "feed_forward.gate_up_proj_adapter_list.#.0",
    "mlp.gate_adapter_b": "feed_forward.gate_up_proj_adapter_list.#.1",
    "mlp.up_adapter_b": "feed_forward.gate_up_proj_adapter_list.#.1",
}


def _layers(config: ConfigReader, layers: int) -> list[bool]:
    """Which layers have a shared transformer."""
    plain, one = ["linear_attention"], ["hybrid"]
    default = plain + (plain * 5 + one) * 7 + plain * 4 + one + plain * 3 + one + plain * 2
    kinds = config.take("layers_block_type", list, default)
    unknown = sorted({repr(kind) for kind in kinds if kind not in _KINDS})
    if unknown:
        config.problem(f"layers_block_type {', '.join(unknown)} are not supported in this family")
    if len(kinds) != layers:
        config.problem(f"layers_block_type has {len(kinds)} layers, num_hidden_layers is {layers}")
    return [_KINDS.get(str(kind), False) for kind in kinds]


def _mixer(config: ConfigReader, width: int, *, bias: bool) -> StateSpaceDual | None:
    # The reference's convolution has a bias in any case.
    config.fixed(use_conv_bias=True)
    channels = config.take("mamba_expand", int, 2) * width
    heads, groups = config.take("n_mamba_heads", int, 8), config.take("mamba_ngroups", int, 1)
    parts = {
        "heads": heads,
        "head_dim": recurrent.read_head_dim(config, "mamba_headdim", channels, heads),
        "state": config.take("mamba_d_state", int, 64),
        "groups": groups,
        "conv": config.take("mamba_d_conv", int, 4),
        "in_bias": bias,
        "out_bias": bias,
        "dt_min": config.take("time_step_min", float, 1e-3),
    }
    return config.attempt(lambda: StateSpaceDual(**parts, norm=GatedNorm(eps=_EPS, groups=groups)))


def _attention(config: ConfigReader, sizes: decoder.Sizes, rank: int) -> dict[str, Any]:
    """The shared attention, but its rope."""
    adapted = config.take("use_shared_attention_adapter", bool, False)
    if adapted and sizes.kv_heads != sizes.heads:
        config.problem("use_shared_attention_adapter needs as many num_key_value_heads as heads")
    if sizes.head_dim * sizes.heads != 2 * sizes.width:
        config.problem(f"attention_head_dim {sizes.head_dim} is not 2 hidden_size over the heads")
    return {
        **decoder.heads_of(sizes),
        "scale": (sizes.head_dim / 2) ** -0.5,
        "out_width": sizes.width,
        "adapter_rank": rank if adapted else None,
    }


def _read(config: ConfigReader) -> ModelSpec:
    heads, width = config.take("num_attention_heads", int), config.take("hidden_size", int)
    head_dim = config.take("attention_head_dim", int, 2 * width // max(heads, 1))
    sizes = decoder.read_sizes(config, context=4096, head_dim=head_dim, ffn=4 * width)
    config.ignore(*_IGNORED)
    # The reference shares no transformer either where it does not tie the embedding.
    config.fixed(tie_word_embeddings=True, use_long_context=False, use_shared_mlp_adapter=True)
    hybrid = _layers(config, sizes.layers)
    rank, sets = config.take("adapter_rank", int, 128), config.take("num_mem_blocks", int, 1)
    if not sets:
        config.problem("num_mem_blocks is 0; it must be positive")
    attention = _attention(config, sizes, rank)
    rope = read_rope(config, context=sizes.context)
    rope = rope if config.take("use_mem_rope", bool, False) else None
    bias = config.take("add_bias_linear", bool, False)
    eps = config.take("rms_norm_eps", float, 1e-5)
    activation = decoder.read_activation(config, default="gelu")
    mixer = _mixer(config, sizes.width, bias=bias)

    def make() -> ModelSpec:
        assert mixer is not None  # a problem was left where there is none
        norm = Norm(eps=eps)
        attn = Attention(**attention, rope=rope)
        mlp = MLP(width=sizes.ffn, activation=activation, bias=bias, adapter_rank=rank)
        alone = sub("ssm", mixer, norm_in=norm)
        after = sub("ssm", mixer, norm_in=norm, reads="sum")
        turns = [f"H{i % sets}" for i in range(sum(hybrid))]
        names = [turns.pop(0) if here else "M" for here in hybrid]

        def block(name: str) -> Block:
            if name == "M":
                return Block(name=name, subs=(alone,))
            shared = {"norm_in": norm, "aside": True, "share": name}
            return Block(
                name=name,
                subs=(
                    sub("attn", attn, reads="embedded", **shared),
                    sub("mlp", mlp, reads="aside", **shared),
                    sub("linear", Linear(), reads="aside", aside=True),
                    after,
                ),
            )

        return decoder.model_of(
            sizes, names, block, ropes=(rope,), final_norm=norm, head=Head(tied=True)
        )

    return config.finish(make)


def _hybrid(spec: ModelSpec) -> list[str | None]:
    """The name of what each layer shares, None where it shares nothing."""
    return [next((s.share for s in spec.block(i).subs if s.share), None)
            for i in range(spec.num_layers)]  # fmt: skip


def _write(spec: ModelSpec) -> dict[str, Any] | None:
    ops = recurrent.ops_of(spec)
    attn, mlp, mixer = (ops.get(kind) for kind in (Attention, MLP, StateSpaceDual))
    if attn is None or mlp is None or mixer is None:
        return None
    if spec.final_norm is None or not spec.shared_subs:
        return None
    channels = mixer.heads * mixer.head_dim
    return {
        "architectures": ["Zamba2ForCausalLM"],
        "model_type": "zamba2",
        "vocab_size": spec.vocab,
        "hidden_size": spec.width,
        "intermediate_size": mlp.width,
        "num_hidden_layers": spec.num_layers,
        "layers_block_type": ["hybrid" if s else "linear_attention" for s in _hybrid(spec)],
        "num_mem_blocks": len(spec.shared_subs),
        "num_attention_heads": attn.heads,
        "num_key_value_heads": attn.kv_heads,
        "attention_head_dim": attn.head_dim,
        "adapter_rank": mlp.adapter_rank,
        "use_shared_attention_adapter": attn.adapter_rank is not None,
        "use_mem_rope": attn.rope is not None,
        **write_rope(attn.rope or Rope(), context=spec.context),
        "mamba_expand": max(channels // spec.width, 1),
        "n_mamba_heads": mixer.heads,
        "mamba_d_state": mixer.state,
        "mamba_ngroups": mixer.groups,
        "mamba_d_conv": mixer.conv,
        "time_step_min": mixer.dt_min,
        "add_bias_linear": mlp.bias,
        "hidden_act": decoder.write_activation(mlp.activation),
        "rms_norm_eps": spec.final_norm.eps,
        "tie_word_embeddings": spec.head.tied,
    }


def _names(spec: ModelSpec) -> list[Entry]:
    shares = _hybrid(spec)
    users = [i for i, share in enumerate(shares) if share]
    first = {share: shares.index(share) for share in spec.shared_subs}
    shared = {
        f"shared.{share}.{ours}": f"model.layers.{layer}.shared_transformer.{disk}"
        for share, layer in first.items()
        for ours, disk in _SHARED.items()
    }
    names = decoder.TENSORS | recurrent.dual_names("mamba") | _ADAPTERS | shared
    names |= {"final_norm": "model.final_layernorm", "ssm_norm": "input_layernorm"}
    names |= {"linear.kernel": "linear"}

    def place(entry: Entry) -> Entry:
        """The entry of a layer with a transformer, under the name that it has there."""
        layer = int(entry.path.split(".")[1]) if entry.path.startswith("layers.") else None
        if layer is None or shares[layer] is None or ".linear." in entry.path:
            return entry
        here, rest = f"model.layers.{layer}.", entry.disk.split(".", 3)[3]
        if "adapter" in entry.path:
            here = f"model.layers.{first[str(shares[layer])]}.shared_transformer."
            rest = rest.replace("#", str(users.index(layer)))
        else:
            here += "mamba_decoder."
        return dataclasses.replace(entry, disk=here + rest)

    return [place(entry) for entry in recurrent.entries(spec, names)]


FAMILY = Family(model_types=("zamba2",), read=_read, write=_write, names=_names)
