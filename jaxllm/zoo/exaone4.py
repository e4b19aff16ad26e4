"""EXAONE 4: norms after each op and of queries and keys, and in hybrids no rope on full layers."""

from __future__ import annotations

from typing import Any

from jaxllm.spec.model import Block, Head, ModelSpec, sub
from jaxllm.spec.ops import MLP, Attention, Norm, QKNorm
from jaxllm.spec.rope import Rope
from jaxllm.zoo import decoder
from jaxllm.zoo.decoder import Kind
from jaxllm.zoo.rope import read_rope, write_rope
from jaxllm.zoo.table import ConfigReader, Family

__all__ = ["FAMILY"]

_BLOCKS: dict[Kind, str] = {"full_attention": "G", "sliding_attention": "L"}
_NORMS = {
    "attn_out_norm": "post_attention_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
}


def _kinds(config: ConfigReader, layers: int, *, windowed: bool) -> list[Kind]:
    """`layer_types`; where they are not given, all but every so many slide."""
    period = 4
    if config.take("layer_types", list, None) is None:
        period = config.take("sliding_window_pattern", int, 4)
    config.ignore("sliding_window_pattern")  # may be letters beside layer_types
    return decoder.read_kinds(config, decoder.every(period if windowed else 1, layers))


def _read(config: ConfigReader) -> ModelSpec:
    sizes = decoder.read_sizes(config, context=2048)
    given = config.has("sliding_window")
    window = config.take("sliding_window", int, None if given else 4096)
    kinds = _kinds(config, sizes.layers, windowed=bool(window))
    size = decoder.window_of(config, kinds, 4096)
    rope = read_rope(config, context=sizes.context)
    eps = config.take("rms_norm_eps", float, 1e-5)
    activation = decoder.read_activation(config)
    tied = config.take("tie_word_embeddings", bool, False)

    def make() -> ModelSpec:
        norm, mlp = Norm(eps=eps), MLP(width=sizes.ffn, activation=activation)
        own: dict[str, Kind] = {name: kind for kind, name in _BLOCKS.items()}

        def block(name: str) -> Block:
            slides = own[name] == "sliding_attention"
            attn = Attention(
                **decoder.heads_of(sizes),
                qk_norm=QKNorm(eps=eps),
                rope=rope if slides or not window else None,
                mask=decoder.mask_of(own[name], size),
            )
            subs = (sub("attn", attn, norm_out=norm), sub("mlp", mlp, norm_out=norm))
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
    ropes = [attn.rope for attn in parts.attns.values() if attn.rope is not None]
    config = {
        **decoder.write_sizes(spec, "Exaone4", parts),
        **decoder.write_kinds(spec, parts),
        **write_rope(ropes[0] if ropes else Rope(), context=spec.context),
        "model_type": "exaone4",
        "rms_norm_eps": parts.norm.eps,
        "hidden_act": decoder.write_activation(parts.mlp.activation),
    }
    if config["sliding_window"] is None and any(a.rope is None for a in parts.attns.values()):
        config["sliding_window"] = 4096  # which no layer has: it says that full layers have no rope
    return config


FAMILY = Family(
    model_types=("exaone4",),
    read=_read,
    write=_write,
    names=lambda spec: decoder.entries(spec, decoder.TENSORS | decoder.QK_NORMS | _NORMS),
)
