"""Granite (dense): a Llama with factors on embedding, scores, residual updates and logits."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jaxllm.spec.model import Block, Embedding, Head, ModelSpec, sub
from jaxllm.spec.ops import MLP, Attention, Norm
from jaxllm.zoo import decoder
from jaxllm.zoo.rope import read_rope, write_rope
from jaxllm.zoo.table import ConfigReader, Family

__all__ = ["FAMILY", "Factors", "read_factors", "write_factors"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Factors:
    """On the embedding, the scores and the residual updates, and what logits are divided by."""

    embedding: float
    scores: float
    residual: float
    divisor: float


def read_factors(config: ConfigReader) -> Factors:
    """The four factors that every Granite has."""
    found = Factors(
        embedding=config.take("embedding_multiplier", float, 1.0),
        scores=config.take("attention_multiplier", float, 1.0),
        residual=config.take("residual_multiplier", float, 1.0),
        divisor=config.take("logits_scaling", float, 1.0),
    )
    if found.divisor == 0:
        config.problem("logits_scaling is 0; logits are divided by it")
    return found


def write_factors(spec: ModelSpec, attn: Attention) -> dict[str, float]:
    """The keys of `read_factors`; the head's scale must be positive."""
    return {
        "embedding_multiplier": spec.embedding.scale,
        "attention_multiplier": attn.query_scale,
        "residual_multiplier": spec.blocks[0].subs[0].scale,
        "logits_scaling": _divisor(spec.head.scale),
    }


def _read(config: ConfigReader) -> ModelSpec:
    sizes = decoder.read_sizes(config, context=2048)
    rope = read_rope(config, context=sizes.context)
    bias = config.take("attention_bias", bool, False)
    mlp_bias = config.take("mlp_bias", bool, False)
    eps = config.take("rms_norm_eps", float, 1e-6)
    activation = decoder.read_activation(config)
    tied = config.take("tie_word_embeddings", bool, False)
    factors = read_factors(config)

    def make() -> ModelSpec:
        parts = {"norm_in": Norm(eps=eps), "scale": factors.residual}
        attn = Attention(
            **decoder.heads_of(sizes), qkv_bias=bias, out_bias=bias, scale=factors.scores, rope=rope
        )
        mlp = MLP(width=sizes.ffn, activation=activation, bias=mlp_bias)
        subs = (sub("attn", attn, **parts), sub("mlp", mlp, **parts))
        return decoder.model_of(
            sizes,
            ["G"] * sizes.layers,
            lambda name: Block(name=name, subs=subs),
            ropes=(rope,),
            embedding=Embedding(scale=factors.embedding),
            final_norm=Norm(eps=eps),
            head=Head(tied=tied, scale=1 / factors.divisor),
        )

    return config.finish(make)


def _divisor(scale: float) -> float:
    """The number whose inverse is exactly the scale; the inverse of an inverse may be one off."""
    found = 1 / scale
    near = (round(found, 9), found, math.nextafter(found, 0), math.nextafter(found, math.inf))
    return next((x for x in near if x and 1 / x == scale), found)


def _write(spec: ModelSpec) -> dict[str, Any] | None:
    parts = decoder.parts_of(spec)
    if parts is None or spec.head.scale <= 0:
        return None
    return {
        **decoder.write_sizes(spec, "Granite", parts),
        **write_rope(parts.attn.rope, context=spec.context),
        "model_type": "granite",
        "attention_bias": parts.attn.out_bias,
        "mlp_bias": parts.mlp.bias,
        "rms_norm_eps": parts.norm.eps,
        "hidden_act": decoder.write_activation(parts.mlp.activation),
        **write_factors(spec, parts.attn),
    }


FAMILY = Family(
    model_types=("granite",),
    read=_read,
    write=_write,
    names=lambda spec: decoder.entries(spec, decoder.TENSORS | decoder.PRE_NORMS),
)
