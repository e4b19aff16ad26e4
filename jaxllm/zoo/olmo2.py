"""OLMo 2 and 3: norms after each op, not before, and of all heads' queries and keys together.

OLMo 3 has windows on three layers of four, and a scaled rope on the others alone.
"""

from __future__ import annotations

from typing import Any

from jaxllm.spec.model import Block, Head, ModelSpec, sub
from jaxllm.spec.ops import MLP, Attention, Norm, QKNorm
from jaxllm.spec.rope import Rope
from jaxllm.zoo import decoder
from jaxllm.zoo.decoder import Kind
from jaxllm.zoo.rope import read_rope, read_ropes, write_rope, write_ropes
from jaxllm.zoo.table import ConfigReader, Entry, Family

__all__ = ["OLMO2", "OLMO3"]

_NORMS = {
    "attn_out_norm": "post_attention_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
}
_BLOCKS: dict[Kind, str] = {"full_attention": "G", "sliding_attention": "L"}
_THETAS = {"full_attention": 5e5, "sliding_attention": 5e5}


def _read2(config: ConfigReader) -> ModelSpec:
    sizes = decoder.read_sizes(config, context=2048)
    rope = read_rope(config, context=sizes.context)
    ropes = dict.fromkeys(decoder.KINDS, rope)
    return _make(config, sizes, ropes, ["full_attention"] * sizes.layers)


def _read3(config: ConfigReader) -> ModelSpec:
    sizes = decoder.read_sizes(config, context=2048)
    # In older files rope_theta is that of the full layers, as the reference reads it.
    ropes = read_ropes(
        config,
        _THETAS,
        context=sizes.context,
        local=("sliding_attention", "rope_local_base_freq"),
    )
    kinds = decoder.read_kinds(config, decoder.every(4, sizes.layers))
    return _make(config, sizes, ropes, kinds)


def _make(
    config: ConfigReader, sizes: decoder.Sizes, ropes: dict[Any, Rope], kinds: list[Kind]
) -> ModelSpec:
    bias = config.take("attention_bias", bool, False)
    eps = config.take("rms_norm_eps", float, 1e-5)
    activation = decoder.read_activation(config)
    tied = config.take("tie_word_embeddings", bool, False)
    sliding = "sliding_attention" in kinds
    window = decoder.window_of(config, kinds, 4096) if sliding or config.has("layer_types") else 1

    def make() -> ModelSpec:
        norm = Norm(eps=eps)
        mlp = MLP(width=sizes.ffn, activation=activation)
        own: dict[str, Kind] = {name: kind for kind, name in _BLOCKS.items()}

        def block(name: str) -> Block:
            attn = Attention(
                **decoder.heads_of(sizes),
                qkv_bias=bias,
                out_bias=bias,
                qk_norm=QKNorm(over="full", eps=eps),
                rope=ropes[own[name]],
                mask=decoder.mask_of(own[name], window),
            )
            return Block(
                name=name, subs=(sub("attn", attn, norm_out=norm), sub("mlp", mlp, norm_out=norm))
            )

        return decoder.model_of(
            sizes,
            [_BLOCKS[kind] for kind in kinds],
            block,
            ropes=[ropes[kind] for kind in set(kinds)],
            final_norm=norm,
            head=Head(tied=tied),
        )

    return config.finish(make)


def _write(spec: ModelSpec, name: str, parts: decoder.Parts) -> dict[str, Any]:
    """What both generations write alike."""
    return {
        **decoder.write_sizes(spec, name, parts),
        "model_type": name.lower(),
        "attention_bias": parts.attn.out_bias,
        "rms_norm_eps": parts.norm.eps,
        "hidden_act": decoder.write_activation(parts.mlp.activation),
    }


def _write2(spec: ModelSpec) -> dict[str, Any] | None:
    parts = decoder.parts_of(spec)
    if parts is None:
        return None
    return _write(spec, "Olmo2", parts) | write_rope(parts.attn.rope, context=spec.context)


def _write3(spec: ModelSpec) -> dict[str, Any] | None:
    parts = decoder.parts_of(spec)
    if parts is None:
        return None
    ropes = {kind: Rope(theta=theta) for kind, theta in _THETAS.items()}
    for kind, name in _BLOCKS.items():
        attn = parts.attns.get(name)
        if attn is not None and attn.rope is not None:
            ropes[kind] = attn.rope
    config = _write(spec, "Olmo3", parts) | decoder.write_kinds(spec, parts)
    return config | write_ropes(ropes, context=spec.context)


def _names(spec: ModelSpec) -> list[Entry]:
    return decoder.entries(spec, decoder.TENSORS | decoder.QK_NORMS | _NORMS)


OLMO2 = Family(model_types=("olmo2",), read=_read2, write=_write2, names=_names)
OLMO3 = Family(model_types=("olmo3",), read=_read3, write=_write3, names=_names)
