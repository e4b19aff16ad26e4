"""Granite 4 (hybrids): dual state spaces beside attention, with the factors of Granite.

With experts, each layer has them beside the MLP of all tokens.
"""

from __future__ import annotations

import math
from typing import Any

from jaxllm.spec.model import Block, Embedding, Head, ModelSpec
from jaxllm.spec.ops import MLP, Attention, MoE, Norm, StateSpaceDual
from jaxllm.zoo import decoder, recurrent
from jaxllm.zoo.granite import read_factors, write_factors
from jaxllm.zoo.granite_moe import EXPERTS, mixture
from jaxllm.zoo.rope import read_rope, write_rope
from jaxllm.zoo.table import ConfigReader, Entry, Family

__all__ = ["FAMILY"]

_KINDS = {"linear_attention": "M", "mamba": "M", "full_attention": "A", "attention": "A"}
_NAMES = {
    "attn_norm": "input_layernorm",
    "ssm_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "shared_mlp.input_linear",
    "mlp.up": "shared_mlp.input_linear",
    "mlp.down": "shared_mlp.output_linear",
    **EXPERTS,
}
_IGNORED = (
    *recurrent.IGNORED,
    "init_method",
    "normalization_function",
    "output_router_logits",
    "router_aux_loss_coef",
)


def _kinds(config: ConfigReader, layers: int) -> list[str]:
    older = config.take("layers_block_type", list, ["linear_attention"] * layers)
    kinds = config.take("layer_types", list, older)
    unknown = sorted({repr(kind) for kind in kinds if kind not in _KINDS})
    if unknown:
        config.problem(f"layer_types {', '.join(unknown)} are not supported in this family")
    if len(kinds) != layers:
        config.problem(f"layer_types has {len(kinds)} layers, num_hidden_layers is {layers}")
    return [_KINDS.get(kind, "M") for kind in kinds]


def _read(config: ConfigReader) -> ModelSpec:
    sizes = decoder.read_sizes(config, context=2048, ffn=11_008)
    config.ignore(*_IGNORED)
    count = config.take("num_local_experts", int, 8)
    active = config.take("num_experts_per_tok", int, 2)
    ffn = config.take("shared_intermediate_size", int, 1024)
    names = _kinds(config, sizes.layers)
    rope = read_rope(config, context=sizes.context)
    kind = config.take("position_embedding_type", str, "nope")
    if kind not in ("rope", "nope"):
        config.problem(f"position_embedding_type is {kind!r}; supported are null, nope and rope")
    bias = config.take("attention_bias", bool, False)
    eps = config.take("rms_norm_eps", float, 1e-6)
    activation = decoder.read_activation(config)
    tied = config.take("tie_word_embeddings", bool, False)
    factors = read_factors(config)
    mixer = recurrent.read_mixer(config, sizes.width, activation)

    def make() -> ModelSpec:
        assert mixer is not None  # a problem was left where there is none
        norm, mlp = Norm(eps=eps), MLP(width=ffn, activation=activation)
        attn = Attention(
            **decoder.heads_of(sizes),
            qkv_bias=bias,
            out_bias=bias,
            scale=factors.scores,
            rope=rope if kind == "rope" else None,
        )
        first, shared = (mixture(sizes, count, active, activation), mlp) if count else (mlp, None)
        parts = {"scale": factors.residual, "shared": shared}
        blocks = {
            "A": recurrent.pair(attn, first, norm, name="attn", **parts),
            "M": recurrent.pair(mixer, first, norm, **parts),
        }
        return decoder.model_of(
            sizes,
            names,
            lambda name: Block(name=name, subs=blocks[name]),
            ropes=(attn.rope,),
            embedding=Embedding(scale=factors.embedding),
            final_norm=norm,
            head=Head(tied=tied, scale=1 / factors.divisor),
        )

    return config.finish(make)


def _write(spec: ModelSpec) -> dict[str, Any] | None:
    found = recurrent.write_hybrid(spec, "GraniteMoeHybrid")
    if found is None or StateSpaceDual not in found[0] or not 0 < spec.head.scale < math.inf:
        return None
    ops, sizes = found
    attn, moe = ops[Attention], ops.get(MoE)
    if MLP not in ops:
        return None
    sizes["shared_intermediate_size"] = ops[MLP].width
    if moe is not None:
        sizes["num_experts_per_tok"] = moe.active
    kinds = ["full_attention" if here else "linear_attention" for here in recurrent.attends(spec)]
    return {
        **sizes,
        **recurrent.write_mixer(ops[StateSpaceDual], spec.width),
        **write_rope(attn.rope, context=spec.context),
        "model_type": "granitemoehybrid",
        "num_local_experts": 0 if moe is None else moe.experts,
        "layer_types": kinds,
        "position_embedding_type": None if attn.rope is None else "rope",
        "attention_bias": attn.out_bias,
        **write_factors(spec, attn),
    }


def _names(spec: ModelSpec) -> list[Entry]:
    names = decoder.TENSORS | recurrent.dual_names("mamba") | _NAMES
    return recurrent.entries(spec, names)


FAMILY = Family(model_types=("granitemoehybrid",), read=_read, write=_write, names=_names)
