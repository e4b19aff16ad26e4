"""Gemma 2 and 3: norms around each op that act as 1 + w, scaled embeddings, windows that alternate.

Gemma 2 caps scores and logits; Gemma 3 norms queries and keys and has a rope for each kind of
layer. The embedding's scale, the root of the width, is rounded to the dtype of the embedding, as
the reference does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxllm.spec.model import Block, Embedding, Head, ModelSpec, sub
from jaxllm.spec.ops import MLP, Attention, Norm, QKNorm
from jaxllm.spec.rope import Rope
from jaxllm.zoo import decoder, gguf_config
from jaxllm.zoo.decoder import Kind
from jaxllm.zoo.multimodal import text_part
from jaxllm.zoo.rope import read_rope, read_ropes, write_rope, write_ropes
from jaxllm.zoo.table import ConfigReader, Entry, Family

__all__ = ["GEMMA2", "GEMMA3", "GEMMA3_VISION"]

_BLOCKS = {"full_attention": "G", "sliding_attention": "L"}
_THETAS = {"full_attention": 1e6, "sliding_attention": 1e4}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Own:
    """What the two generations read each in its way."""

    kinds: list[Kind]
    ropes: dict[str, Rope]
    caps: tuple[float | None, float | None]
    normed: bool


def _read2(config: ConfigReader) -> ModelSpec:
    sizes = decoder.read_sizes(config, context=8192, head_dim=256)
    rope = read_rope(config, context=sizes.context)
    own = _Own(
        kinds=decoder.read_kinds(config, decoder.every(2, sizes.layers)),
        ropes=dict.fromkeys(_THETAS, rope),
        caps=(_cap(config, "attn", 50.0), _cap(config, "final", 30.0)),
        normed=False,
    )
    return _make(config, sizes, own)


def _read3(config: ConfigReader) -> ModelSpec:
    sizes = decoder.read_sizes(config, context=131_072, head_dim=256)
    period = config.take("sliding_window_pattern", int, 6)
    config.ignore("_sliding_window_pattern")
    if config.take("attn_logit_softcapping", float, None) is not None:
        config.problem("attn_logit_softcapping: the reference has it in no gemma3; give null")
    own = _Own(
        kinds=decoder.read_kinds(config, decoder.every(period, sizes.layers)),
        ropes=read_ropes(
            config,
            _THETAS,
            context=sizes.context,
            local=("sliding_attention", "rope_local_base_freq"),
        ),
        caps=(None, _cap(config, "final", None)),
        normed=True,
    )
    return _make(config, sizes, own)


def _cap(config: ConfigReader, which: str, default: float | None) -> float | None:
    """A cap; null is none, and an absent key the default."""
    key = f"{which}_logit_softcapping"
    return config.take(key, float, None if config.has(key) else default)


def _make(config: ConfigReader, sizes: decoder.Sizes, own: _Own) -> ModelSpec:
    config.ignore("hidden_act")  # an older name beside the one that counts
    if config.take("use_bidirectional_attention", bool, False):
        config.problem("use_bidirectional_attention is not supported")
    window = decoder.window_of(config, own.kinds, 4096)
    scalar = config.take("query_pre_attn_scalar", float, 256.0)
    bias = config.take("attention_bias", bool, False)
    eps = config.take("rms_norm_eps", float, 1e-6)
    activation = decoder.read_activation(config, "hidden_activation", "gelu_pytorch_tanh")
    tied = config.take("tie_word_embeddings", bool, True)
    if scalar == 0:
        config.problem("query_pre_attn_scalar is 0; it must be positive")

    def make() -> ModelSpec:
        norm = Norm(eps=eps, offset=1.0)
        attns = {
            _BLOCKS[kind]: Attention(
                **decoder.heads_of(sizes),
                qkv_bias=bias,
                out_bias=bias,
                scale=scalar**-0.5,
                qk_norm=QKNorm(eps=eps, offset=1.0) if own.normed else None,
                softcap=own.caps[0],
                rope=own.ropes[kind],
                mask=decoder.mask_of(kind, window),
            )
            for kind in decoder.KINDS
        }
        mlp = MLP(width=sizes.ffn, activation=activation)

        def block(name: str) -> Block:
            norms = {"norm_in": norm, "norm_out": norm}
            return Block(
                name=name, subs=(sub("attn", attns[name], **norms), sub("mlp", mlp, **norms))
            )

        return decoder.model_of(
            sizes,
            [_BLOCKS[kind] for kind in own.kinds],
            block,
            ropes=own.ropes.values(),
            embedding=Embedding(scale=sizes.width**0.5),
            final_norm=norm,
            head=Head(tied=tied, softcap=own.caps[1]),
        )

    return config.finish(make)


def _scalar(scale: float) -> int | float:
    """The number whose inverse root is the scale, a whole one where there is one."""
    if scale <= 0:
        return 1  # no number has it; what is written will not be what was asked for
    whole = max(1, round(scale**-2))
    return whole if whole**-0.5 == scale else scale**-2


def _write(spec: ModelSpec, name: str, parts: decoder.Parts) -> dict[str, Any]:
    """What both generations write alike."""
    return {
        **decoder.write_sizes(spec, name, parts),
        **decoder.write_kinds(spec, parts),
        "query_pre_attn_scalar": _scalar(parts.attn.query_scale),
        "attention_bias": parts.attn.out_bias,
        "attn_logit_softcapping": parts.attn.softcap,
        "final_logit_softcapping": spec.head.softcap,
        "rms_norm_eps": parts.norm.eps,
        "hidden_activation": decoder.write_activation(parts.mlp.activation),
    }


def _write2(spec: ModelSpec) -> dict[str, Any] | None:
    parts = decoder.parts_of(spec)
    if parts is None:
        return None
    rope = write_rope(parts.attn.rope, context=spec.context)
    return {"model_type": "gemma2"} | _write(spec, "Gemma2", parts) | rope


def _write3(spec: ModelSpec) -> dict[str, Any] | None:
    parts = decoder.parts_of(spec)
    if parts is None:
        return None
    ropes = {kind: Rope(theta=theta) for kind, theta in _THETAS.items()}
    for kind, name in _BLOCKS.items():
        attn = parts.attns.get(name)
        if attn is not None and attn.rope is not None:
            ropes[kind] = attn.rope
    config = {"model_type": "gemma3_text"} | _write(spec, "Gemma3", parts)
    return config | write_ropes(ropes, context=spec.context)


def _read_gguf(
    config: ConfigReader, tensors: Mapping[str, Any], largest: int
) -> tuple[ConfigReader, dict[str, Any]]:
    """The keys of both generations; scores are scaled by D / N in the largest model alone."""
    data = gguf_config.read_common(config, tensors)
    heads = max(data["num_attention_heads"], 1)
    even = data["num_hidden_layers"] == largest
    scalar = data["hidden_size"] // heads if even else data["head_dim"]
    window = config.take("attention.sliding_window", int)
    for which in ("attn", "final"):
        cap = config.take(f"{which}_logit_softcapping", float, 0.0)
        data[f"{which}_logit_softcapping"] = gguf_config.short(cap) if cap else None
    return config, data | {"query_pre_attn_scalar": scalar, "sliding_window": window}


def _read_gguf2(config: ConfigReader, tensors: Mapping[str, Any]) -> ModelSpec:
    config, data = _read_gguf(config, tensors, 46)
    return _read2(config.translated(data | {"model_type": "gemma2"}))


def _read_gguf3(config: ConfigReader, tensors: Mapping[str, Any]) -> ModelSpec:
    config, data = _read_gguf(config, tensors, 62)
    data |= {
        "rope_local_base_freq": gguf_config.short(config.take("rope.freq_base_swa", float, 1e4)),
        "sliding_window_pattern": config.take("attention.sliding_window_pattern", int, 6),
        "model_type": "gemma3_text",
    }
    return _read3(config.translated(data))


def _gguf_names(spec: ModelSpec, _: str) -> list[Entry]:
    """Norms stand as what they multiply by, 1 + w."""
    found = decoder.entries(spec, gguf_config.SANDWICH, layer="blk.{}.")
    return [dataclasses.replace(e, form="one_more") if "norm" in e.path else e for e in found]


GEMMA2 = Family(
    model_types=("gemma2",),
    architectures=("gemma2",),
    read=_read2,
    write=_write2,
    read_gguf=_read_gguf2,
    gguf_names=_gguf_names,
    names=lambda spec: decoder.entries(spec, decoder.TENSORS | decoder.SANDWICH_NORMS),
)
GEMMA3 = Family(
    model_types=("gemma3_text",),
    architectures=("gemma3",),
    read=_read3,
    write=_write3,
    read_gguf=_read_gguf3,
    gguf_names=_gguf_names,
    names=lambda spec: decoder.entries(
        spec, decoder.TENSORS | decoder.QK_NORMS | decoder.SANDWICH_NORMS
    ),
)
GEMMA3_VISION = text_part(
    GEMMA3,
    "gemma3",
    vision="vision_tower",
    defaults={
        "vocab_size": 262_208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
)
