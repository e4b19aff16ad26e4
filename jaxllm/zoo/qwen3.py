"""Qwen3: a pre-norm decoder whose queries and keys are normed head by head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.spec.model import Block, Head, ModelSpec, sub
from jaxllm.spec.ops import MLP, Attention, Norm, QKNorm
from jaxllm.zoo import decoder, gguf_config
from jaxllm.zoo.rope import read_rope, write_rope
from jaxllm.zoo.table import ConfigReader, Family

__all__ = ["FAMILY"]

_BLOCKS = {"full_attention": "G", "sliding_attention": "L"}


def _read(config: ConfigReader) -> ModelSpec:
    sizes = decoder.read_sizes(config, context=32_768, head_dim=128)
    used = config.take("use_sliding_window", bool, False)
    first = config.take("max_window_layers", int, 28)
    default = [decoder.KINDS[used and i >= first] for i in range(sizes.layers)]
    kinds = decoder.read_kinds(config, default)
    window = decoder.window_of(config, kinds, 4096)
    if "sliding_attention" in kinds and not used:
        config.problem("layer_types has sliding_attention, but use_sliding_window is false")
    rope = read_rope(config, context=sizes.context)
    bias = config.take("attention_bias", bool, False)
    eps = config.take("rms_norm_eps", float, 1e-6)
    activation = decoder.read_activation(config)
    tied = config.take("tie_word_embeddings", bool, False)

    def make() -> ModelSpec:
        norm = Norm(eps=eps)
        attns = {
            _BLOCKS[kind]: Attention(
                **decoder.heads_of(sizes),
                qkv_bias=bias,
                out_bias=bias,
                qk_norm=QKNorm(eps=eps),
                rope=rope,
                mask=decoder.mask_of(kind, window),
            )
            for kind in decoder.KINDS
        }
        mlp = MLP(width=sizes.ffn, activation=activation)

        def block(name: str) -> Block:
            subs = (sub("attn", attns[name], norm_in=norm), sub("mlp", mlp, norm_in=norm))
            return Block(name=name, subs=subs)

        return decoder.model_of(
            sizes,
            [_BLOCKS[kind] for kind in kinds],
            block,
            ropes=(rope,),
            final_norm=norm,
            head=Head(tied=tied),
        )

    return config.finish(make)


def _write(spec: ModelSpec) -> dict[str, Any] | None:
    parts = decoder.parts_of(spec)
    if parts is None:
        return None
    kinds = decoder.write_kinds(spec, parts)
    used = "sliding_attention" in kinds["layer_types"]
    return {
        **decoder.write_sizes(spec, "Qwen3", parts),
        **write_rope(parts.attn.rope, context=spec.context),
        **kinds,
        "model_type": "qwen3",
        "use_sliding_window": used,
        "attention_bias": parts.attn.out_bias,
        "rms_norm_eps": parts.norm.eps,
        "hidden_act": decoder.write_activation(parts.mlp.activation),
    }


def _read_gguf(config: ConfigReader, tensors: Mapping[str, Any]) -> ModelSpec:
    data = gguf_config.read_common(config, tensors)
    return _read(config.translated(data | {"model_type": "qwen3"}))


FAMILY = Family(
    model_types=("qwen3",),
    architectures=("qwen3",),
    read=_read,
    write=_write,
    read_gguf=_read_gguf,
    gguf_names=lambda spec, _: decoder.entries(spec, gguf_config.DECODER, layer="blk.{}."),
    names=lambda spec: decoder.entries(
        spec, decoder.TENSORS | decoder.QK_NORMS | decoder.PRE_NORMS
    ),
)
