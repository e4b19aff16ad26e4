"""Phi-3 and Phi-4: a Llama whose projections of one input are one tensor on disk.

A spec that Llama's files can say, without partial rope, is saved in these.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.spec.mask import And
from jaxllm.spec.model import Block, Head, ModelSpec, sub
from jaxllm.spec.ops import MLP, Attention, Norm
from jaxllm.zoo import decoder, gguf_config
from jaxllm.zoo.rope import read_rope, write_rope
from jaxllm.zoo.table import ConfigReader, Family

__all__ = ["FAMILY"]

_FUSED = {
    "attn.q": "self_attn.qkv_proj",
    "attn.k": "self_attn.qkv_proj",
    "attn.v": "self_attn.qkv_proj",
    "mlp.gate": "mlp.gate_up_proj",
    "mlp.up": "mlp.gate_up_proj",
}


def _read(config: ConfigReader) -> ModelSpec:
    sizes = decoder.read_sizes(config, context=4096)
    config.ignore("auto_map", "embd_pdrop", "resid_pdrop")
    rope = read_rope(config, context=sizes.context, fraction=1.0)
    window = config.take("sliding_window", int, None)
    eps = config.take("rms_norm_eps", float, 1e-5)
    activation = decoder.read_activation(config)
    tied = config.take("tie_word_embeddings", bool, False)
    for key in ("attention_bias", "mlp_bias"):
        if config.take(key, bool, False):
            config.problem(f"{key} is not supported in this family")

    def make() -> ModelSpec:
        norm = Norm(eps=eps)
        mask = decoder.mask_of(decoder.KINDS[bool(window)], window or 1)
        attn = Attention(**decoder.heads_of(sizes), rope=rope, mask=mask)
        mlp = MLP(width=sizes.ffn, activation=activation)
        subs = (sub("attn", attn, norm_in=norm), sub("mlp", mlp, norm_in=norm))
        return decoder.model_of(
            sizes,
            ["G"] * sizes.layers,
            lambda name: Block(name=name, subs=subs),
            ropes=(rope,),
            final_norm=norm,
            head=Head(tied=tied),
        )

    return config.finish(make)


def _write(spec: ModelSpec) -> dict[str, Any] | None:
    parts = decoder.parts_of(spec)
    if parts is None:
        return None
    window = decoder.write_kinds(spec, parts)["sliding_window"]
    return {
        **decoder.write_sizes(spec, "Phi3", parts),
        **write_rope(parts.attn.rope, context=spec.context),
        "model_type": "phi3",
        "sliding_window": window if isinstance(parts.attn.mask, And) else None,
        "rms_norm_eps": parts.norm.eps,
        "hidden_act": decoder.write_activation(parts.mlp.activation),
    }


def _read_gguf(config: ConfigReader, tensors: Mapping[str, Any]) -> ModelSpec:
    window = config.take("attention.sliding_window", int, 0)
    data = gguf_config.read_common(config, tensors)
    return _read(config.translated(data | {"model_type": "phi3", "sliding_window": window or None}))


_GGUF = gguf_config.DECODER | {
    "attn.q": "attn_qkv",
    "attn.k": "attn_qkv",
    "attn.v": "attn_qkv",
    "mlp.gate": "ffn_up",
    "mlp.up": "ffn_up",
}
FAMILY = Family(
    model_types=("phi3",),
    architectures=("phi3",),
    read=_read,
    write=_write,
    read_gguf=_read_gguf,
    gguf_names=lambda spec, _: decoder.entries(spec, _GGUF, layer="blk.{}."),
    names=lambda spec: decoder.entries(spec, decoder.TENSORS | _FUSED | decoder.PRE_NORMS),
    ignored=("*.rotary_emb.inv_freq",),
)
