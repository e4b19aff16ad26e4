"""Falcon-H1: attention and a dual state space side by side, with factors on nearly everything."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jaxllm.spec.model import Block, Embedding, Head, ModelSpec, NamedOp, Sub, sub
from jaxllm.spec.ops import MLP, Attention, Norm, StateSpaceDual
from jaxllm.zoo import decoder, recurrent
from jaxllm.zoo.rope import read_rope, write_rope
from jaxllm.zoo.table import ConfigReader, Entry, Family

__all__ = ["FAMILY"]

_FACTORS = (
    "attention_in_multiplier",
    "attention_out_multiplier",
    "embedding_multiplier",
    "key_multiplier",
    "lm_head_multiplier",
    "ssm_in_multiplier",
    "ssm_out_multiplier",
)


def _factors(config: ConfigReader, key: str, count: int) -> list[float]:
    """A list of so many numbers, of which each is 1 by default."""
    found = config.take(key, list, [1.0] * count)
    numbers = [x for x in found if isinstance(x, int | float) and not isinstance(x, bool)]
    if len(found) != count or len(numbers) != count:
        config.problem(f"{key} is {found!r}; it must be {count} numbers")
        return [1.0] * count
    return list(map(float, numbers))


def _mixer(config: ConfigReader, width: int, activation: Any) -> StateSpaceDual | None:
    """The state space, whose norm is left out unless asked for."""
    normed = config.take("mamba_rms_norm", bool, False)
    before = config.take("mamba_norm_before_gate", bool, True)
    out_bias = config.take("projectors_bias", bool, False)
    scales = tuple(_factors(config, "ssm_multipliers", 5))
    mixer = recurrent.read_mixer(config, width, activation)
    if mixer is None or mixer.norm is None:
        return None
    norm = dataclasses.replace(mixer.norm, before_gate=before) if normed else None
    return dataclasses.replace(mixer, norm=norm, out_bias=out_bias, scales=scales)


def _read(config: ConfigReader) -> ModelSpec:
    sizes = decoder.read_sizes(config, context=8192)
    config.ignore(*recurrent.IGNORED, "mamba_use_mlp", "mlp_expansion_factor", "attn_layer_indices")
    rope = read_rope(config, context=sizes.context)
    eps = config.take("rms_norm_eps", float, 1e-5)
    activation = decoder.read_activation(config)
    tied = config.take("tie_word_embeddings", bool, False)
    bias = config.take("attention_bias", bool, False)
    mlp_bias = config.take("mlp_bias", bool, False)
    factor = {key: config.take(key, float, 1.0) for key in _FACTORS}
    gate, down = _factors(config, "mlp_multipliers", 2)
    mixer = _mixer(config, sizes.width, activation)

    def make() -> ModelSpec:
        assert mixer is not None  # a problem was left where there is none
        norm = Norm(eps=eps)
        key = factor["key_multiplier"]  # scores are linear in the keys
        attn = Attention(
            **decoder.heads_of(sizes),
            qkv_bias=bias,
            out_bias=bias,
            rope=rope,
            scale=None if key == 1 else key * sizes.head_dim**-0.5,
        )
        ssm = NamedOp(
            name="ssm",
            op=mixer,
            scale_in=factor["ssm_in_multiplier"],
            scale=factor["ssm_out_multiplier"],
        )
        named = NamedOp(
            name="attn",
            op=attn,
            scale_in=factor["attention_in_multiplier"],
            scale=factor["attention_out_multiplier"],
        )
        mlp = MLP(width=sizes.ffn, activation=activation, bias=mlp_bias, gate_scale=gate)
        subs = (Sub(ops=(ssm, named), norm_in=norm), sub("mlp", mlp, norm_in=norm, scale=down))
        return decoder.model_of(
            sizes,
            ["H"] * sizes.layers,
            lambda name: Block(name=name, subs=subs),
            ropes=(rope,),
            embedding=Embedding(scale=factor["embedding_multiplier"]),
            final_norm=norm,
            head=Head(tied=tied, scale=factor["lm_head_multiplier"]),
        )

    return config.finish(make)


def _key_factor(attn: Attention) -> float:
    """The factor on keys that gives exactly the scale of the scores."""
    if attn.scale is None:
        return 1.0
    one = attn.head_dim**-0.5
    found = attn.scale / one
    near = (round(found, 12), found, math.nextafter(found, 0), math.nextafter(found, math.inf))
    return next((x for x in near if x * one == attn.scale), found)


def _write(spec: ModelSpec) -> dict[str, Any] | None:
    found = recurrent.write_hybrid(spec, "FalconH1")
    first = spec.blocks[0].subs
    if found is None or len(first) != 2 or len(first[0].ops) != 2:
        return None
    ops, sizes = found
    mixer, attn, mlp = (ops.get(kind) for kind in (StateSpaceDual, Attention, MLP))
    if mixer is None or mlp is None or attn is None or attn.rope is None:
        return None
    ssm, named = first[0].ops
    norm = mixer.norm
    return {
        **sizes,
        **recurrent.write_mixer(mixer, spec.width),
        **write_rope(attn.rope, context=spec.context),
        "model_type": "falcon_h1",
        "mamba_d_ssm": mixer.heads * mixer.head_dim,
        "mamba_rms_norm": norm is not None,
        "mamba_norm_before_gate": norm is None or norm.before_gate,
        "projectors_bias": mixer.out_bias,
        "attention_bias": attn.out_bias,
        "mlp_bias": mlp.bias,
        "mlp_multipliers": [mlp.gate_scale, first[1].scale],
        "ssm_multipliers": list(mixer.scales),
        "ssm_in_multiplier": ssm.scale_in,
        "ssm_out_multiplier": ssm.scale,
        "attention_in_multiplier": named.scale_in,
        "attention_out_multiplier": named.scale,
        "key_multiplier": _key_factor(attn),
        "embedding_multiplier": spec.embedding.scale,
        "lm_head_multiplier": spec.head.scale,
    }


def _names(spec: ModelSpec) -> list[Entry]:
    names = recurrent.dual_names("mamba") | recurrent.FEED_FORWARD
    return recurrent.entries(spec, decoder.TENSORS | names)


FAMILY = Family(model_types=("falcon_h1",), read=_read, write=_write, names=_names)
