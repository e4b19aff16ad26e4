"""Granite 4 (dense hybrids): dual state spaces beside attention, with the factors of Granite."""

from __future__ import annotations

import math
from typing import Any

from jaxllm.spec.model import Block, Embedding, Head, ModelSpec
from jaxllm.spec.ops import MLP, Attention, Norm, StateSpaceDual
from jaxllm.zoo import decoder, recurrent
from jaxllm.zoo.granite import divisor_of
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
}
_IGNORED = (
    *recurrent.IGNORED,
    "init_method",
    "intermediate_size",  # of experts
    "normalization_function",
    "num_experts_per_tok",
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
    sizes = decoder.read_sizes(config, context=2048, ffn=1)
    config.ignore(*_IGNORED)
    if config.take("num_local_experts", int, 8):
        config.problem("num_local_experts other than 0 is not supported yet")
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
    embedding = config.take("embedding_multiplier", float, 1.0)
    scores = config.take("attention_multiplier", float, 1.0)
    residual = config.take("residual_multiplier", float, 1.0)
    divisor = config.take("logits_scaling", float, 1.0)
    if divisor == 0:
        config.problem("logits_scaling is 0; logits are divided by it")
    mixer = recurrent.read_mixer(config, sizes.width, activation)

    def make() -> ModelSpec:
        assert mixer is not None  # a problem was left where there is none
        norm, mlp = Norm(eps=eps), MLP(width=ffn, activation=activation)
        attn = Attention(
            **decoder.heads_of(sizes),
            qkv_bias=bias,
            out_bias=bias,
            scale=scores,
            rope=rope if kind == "rope" else None,
        )
        blocks = {
            "A": recurrent.pair(attn, mlp, norm, scale=residual, name="attn"),
            "M": recurrent.pair(mixer, mlp, norm, scale=residual),
        }
        return decoder.model_of(
            sizes,
            names,
            lambda name: Block(name=name, subs=blocks[name]),
            ropes=(attn.rope,),
            embedding=Embedding(scale=embedding),
            final_norm=norm,
            head=Head(tied=tied, scale=1 / divisor),
        )

    return config.finish(make)


def _write(spec: ModelSpec) -> dict[str, Any] | None:
    found = recurrent.write_hybrid(spec, "GraniteMoeHybrid")
    if found is None or StateSpaceDual not in found[0] or not 0 < spec.head.scale < math.inf:
        return None
    ops, sizes = found
    attn = ops[Attention]
    sizes["shared_intermediate_size"] = sizes["intermediate_size"]
    kinds = ["full_attention" if here else "linear_attention" for here in recurrent.attends(spec)]
    return {
        **sizes,
        **recurrent.write_mixer(ops[StateSpaceDual], spec.width),
        **write_rope(attn.rope, context=spec.context),
        "model_type": "granitemoehybrid",
        "num_local_experts": 0,
        "layer_types": kinds,
        "position_embedding_type": None if attn.rope is None else "rope",
        "attention_bias": attn.out_bias,
        "embedding_multiplier": spec.embedding.scale,
        "attention_multiplier": attn.query_scale,
        "residual_multiplier": spec.blocks[0].subs[0].scale,
        "logits_scaling": divisor_of(spec.head.scale),
    }


def _names(spec: ModelSpec) -> list[Entry]:
    names = decoder.TENSORS | recurrent.dual_names("mamba") | _NAMES
    return recurrent.entries(spec, names)


FAMILY = Family(model_types=("granitemoehybrid",), read=_read, write=_write, names=_names)
