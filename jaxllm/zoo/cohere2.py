"""Cohere 2: attention and MLP side by side on one LayerNorm; a rope on the sliding layers alone."""

from __future__ import annotations

from typing import Any

from jaxllm.spec.model import Block, Head, ModelSpec, NamedOp, Sub
from jaxllm.spec.ops import MLP, Attention, Norm
from jaxllm.spec.rope import Rope
from jaxllm.zoo import decoder
from jaxllm.zoo.rope import read_rope, write_rope
from jaxllm.zoo.table import ConfigReader, Family

__all__ = ["FAMILY"]

_BLOCKS = {"full_attention": "G", "sliding_attention": "L"}
# Keys of files on the hub that the reference does not read, with the values that it stands for.
_FIXED = {
    "layer_switch": 4,
    "order_of_interleaved_layers": "local_attn_first",
    "position_embedding_type": "rope_gptj",
    "rotary_pct": 1.0,
    "use_embedding_sharing": True,
    "use_gated_activation": True,
    "use_parallel_block": True,
    "use_qk_norm": False,
}


def _read(config: ConfigReader) -> ModelSpec:
    sizes = decoder.read_sizes(config, context=8192)
    config.ignore("use_parallel_embedding")  # how it was trained
    for key, value in _FIXED.items():
        if (found := config.take(key, type(value), value)) != value:
            config.problem(f"{key} is {found!r}; supported is {value!r}")
    period = config.take("sliding_window_pattern", int, 4)
    kinds = decoder.read_kinds(config, decoder.every(period, sizes.layers))
    window = decoder.window_of(config, kinds, 4096)
    rope = read_rope(config, context=sizes.context, layout="interleaved")
    bias = config.take("attention_bias", bool, False)
    eps = config.take("layer_norm_eps", float, 1e-5)
    activation = decoder.read_activation(config)
    tied = config.take("tie_word_embeddings", bool, True)
    scale = config.take("logit_scale", float, 0.0625)

    def make() -> ModelSpec:
        norm = Norm(type="layer", eps=eps)
        attns = {
            _BLOCKS[kind]: Attention(
                **decoder.heads_of(sizes),
                qkv_bias=bias,
                out_bias=bias,
                rope=None if kind == "full_attention" else rope,
                mask=decoder.mask_of(kind, window),
            )
            for kind in decoder.KINDS
        }
        mlp = NamedOp(name="mlp", op=MLP(width=sizes.ffn, activation=activation))

        def block(name: str) -> Block:
            ops = (NamedOp(name="attn", op=attns[name]), mlp)
            return Block(name=name, subs=(Sub(ops=ops, norm_in=norm),))

        return decoder.model_of(
            sizes,
            [_BLOCKS[kind] for kind in kinds],
            block,
            ropes=(rope,),
            final_norm=norm,
            head=Head(tied=tied, scale=scale),
        )

    return config.finish(make)


def _write(spec: ModelSpec) -> dict[str, Any] | None:
    parts = decoder.parts_of(spec)
    if parts is None:
        return None
    ropes = [attn.rope for attn in parts.attns.values() if attn.rope is not None]
    return {
        **decoder.write_sizes(spec, "Cohere2", parts),
        **write_rope(ropes[0] if ropes else Rope(), context=spec.context),
        **decoder.write_kinds(spec, parts),
        "model_type": "cohere2",
        "attention_bias": parts.attn.out_bias,
        "layer_norm_eps": parts.norm.eps,
        "hidden_act": decoder.write_activation(parts.mlp.activation),
        "logit_scale": spec.head.scale,
    }


FAMILY = Family(
    model_types=("cohere2",),
    read=_read,
    write=_write,
    names=lambda spec: decoder.entries(spec, decoder.TENSORS | {"attn_norm": "input_layernorm"}),
)
