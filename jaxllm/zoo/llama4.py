"""Llama 4 (text): chunks with rope, full attention without; experts weighed at the input.

Queries and keys of rotated layers are divided by their root mean square; queries of the others grow
with their position. Each layer with experts has an MLP of the same width for all tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxllm.spec.mask import And, Causal, Chunk
from jaxllm.spec.model import Block, Head, ModelSpec
from jaxllm.spec.moe import MoE, Router
from jaxllm.spec.ops import MLP, Attention, Norm, QKNorm, Temperature
from jaxllm.spec.rope import Rope
from jaxllm.zoo import decoder, experts
from jaxllm.zoo.multimodal import text_part
from jaxllm.zoo.rope import read_rope, write_rope
from jaxllm.zoo.table import ConfigReader, Entry, Family

__all__ = ["FAMILY", "VISION"]

# (has experts, has a rope and chunks) -> name of the block
_BLOCKS = {(True, True): "S", (True, False): "E", (False, True): "C", (False, False): "N"}
_TENSORS = {
    "mlp.gate": "feed_forward.gate_proj",
    "mlp.up": "feed_forward.up_proj",
    "mlp.down": "feed_forward.down_proj",
    "moe.router": "feed_forward.router",
    "moe.gate": "feed_forward.experts.gate_up_proj",
    "moe.up": "feed_forward.experts.gate_up_proj",
    "moe.down": "feed_forward.experts.down_proj",
    "shared.gate": "feed_forward.shared_expert.gate_proj",
    "shared.up": "feed_forward.shared_expert.up_proj",
    "shared.down": "feed_forward.shared_expert.down_proj",
}


def _roped(config: ConfigReader, layers: int) -> list[bool]:
    """Which layers have a rope: in spite of its name the list has 1 for these."""
    period = config.take("no_rope_layer_interval", int, 4)
    default = [int((i + 1) % max(period, 1) != 0) for i in range(layers)]
    given = config.take("no_rope_layers", list, []) or default
    if len(given) != layers or any(item not in (0, 1) for item in given):
        config.problem(f"no_rope_layers is {given!r}; it must have 0 or 1 for {layers} layers")
        given = default
    return [bool(item) for item in given]


def _attentions(config: ConfigReader, sizes: decoder.Sizes, rope: Rope) -> Any:
    """A function from whether there is a rope to the attention."""
    given = config.has("attention_chunk_size")
    chunk = config.take("attention_chunk_size", int, None if given else 8192)
    mask = Causal() if chunk is None else And(first=Causal(), second=Chunk(size=chunk))
    normed = config.take("use_qk_norm", bool, True)
    tuned = config.take("attn_temperature_tuning", bool, True)
    scale = config.take("attn_scale", float, 0.1)
    period = config.take("floor_scale", float, 8192.0)
    bias = config.take("attention_bias", bool, False)
    eps = config.take("rms_norm_eps", float, 1e-5)

    def make(has: bool) -> Attention:
        norm = QKNorm(scale=False, after_rope=True, eps=eps) if normed and has else None
        return Attention(
            **decoder.heads_of(sizes),
            qkv_bias=bias,
            out_bias=bias,
            qk_norm=norm,
            temperature=Temperature(scale=scale, period=period) if tuned and not has else None,
            rope=rope if has else None,
            mask=mask if has else Causal(),
        )

    return make


def _check_kinds(config: ConfigReader, roped: list[bool]) -> None:
    """`layer_types` may say again what follows from the ropes."""
    given = config.has("attention_chunk_size")
    chunk = config.take("attention_chunk_size", int, None if given else 8192)
    near = "full_attention" if chunk is None else "chunked_attention"
    kinds = [near if has else "full_attention" for has in roped]
    if config.take("layer_types", list, kinds) != kinds:
        config.problem("layer_types other than chunked_attention where there is a rope")


def _sparse(config: ConfigReader, layers: int) -> list[bool]:
    step = max(config.take("interleave_moe_layer_step", int, 1), 1)
    default = list(range(step - 1, layers, step))
    named = config.has("moe_layers") and config.take("moe_layers", list, None) is not None
    found = experts.numbered(config, "moe_layers", layers) if named else default
    return [i in found for i in range(layers)]


def _read(config: ConfigReader) -> ModelSpec:
    sizes = decoder.read_sizes(config, context=131_072, head_dim=128)
    config.ignore(*experts.IGNORED, "for_llm_compressor")
    rope = read_rope(config, context=sizes.context, theta=500_000.0, layout="interleaved")
    roped = _roped(config, sizes.layers)
    attention = _attentions(config, sizes, rope)
    _check_kinds(config, roped)
    layers = list(zip(_sparse(config, sizes.layers), roped, strict=True))
    eps = config.take("rms_norm_eps", float, 1e-5)
    activation = decoder.read_activation(config)
    tied = config.take("tie_word_embeddings", bool, False)
    dense = config.take("intermediate_size_mlp", int, 16_384)
    count = config.take("num_local_experts", int, 16)
    active = config.take("num_experts_per_tok", int, 1)

    def make() -> ModelSpec:
        norm, own = Norm(eps=eps), MLP(width=sizes.ffn, activation=activation)
        router = Router(score="sigmoid", weigh_inputs=True)
        moe = MoE(experts=count, active=active, mlp=own, router=router)
        kinds = {name: pair for pair, name in _BLOCKS.items()}

        def block(name: str) -> Block:
            has, roped = kinds[name]
            ffn = moe if has else MLP(width=dense, activation=activation)
            return experts.layer(name, attention(roped), norm, ffn, own)

        return decoder.model_of(
            sizes,
            [_BLOCKS[pair] for pair in layers],
            block,
            ropes=(rope,),
            final_norm=norm,
            head=Head(tied=tied),
        )

    return config.finish(make)


def _write(spec: ModelSpec) -> dict[str, Any] | None:
    mixed = experts.mixed_of(spec)
    if mixed is None:
        return None
    parts = mixed.parts
    attns = list(parts.attns.values())
    ropes = [a.rope for a in attns if a.rope is not None]
    chunks = [a.mask.second.size for a in attns if isinstance(a.mask, And)
              and isinstance(a.mask.second, Chunk)]  # fmt: skip
    tuned = next((a.temperature for a in attns if a.temperature is not None), None)
    roped = [parts.attns[name].rope is not None for name in spec.pattern.names]
    config = {
        **decoder.write_sizes(spec, "Llama4", parts),
        **write_rope(ropes[0] if ropes else Rope(theta=5e5), context=spec.context),
        "model_type": "llama4_text",
        "intermediate_size": mixed.moe.mlp.width,
        "intermediate_size_mlp": parts.mlp.width,
        "moe_layers": [i for i, has in enumerate(mixed.sparse) if has],
        "no_rope_layers": [int(has) for has in roped],
        "attention_chunk_size": chunks[0] if chunks else None,
        "use_qk_norm": any(a.qk_norm is not None for a in attns),
        "attn_temperature_tuning": tuned is not None,
        "attention_bias": parts.attn.out_bias,
        "num_local_experts": mixed.moe.experts,
        "num_experts_per_tok": mixed.moe.active,
        "rms_norm_eps": parts.norm.eps,
        "hidden_act": decoder.write_activation(mixed.moe.mlp.activation),
    }
    if tuned is not None:
        config |= {"attn_scale": tuned.scale, "floor_scale": tuned.period}
    return config


def _names(spec: ModelSpec) -> list[Entry]:
    """Experts' tensors are [in, out] and have no ending."""
    found = decoder.entries(spec, decoder.TENSORS | experts.NORMS | _TENSORS)
    return [
        dataclasses.replace(e, disk=e.disk.removesuffix(".weight"), form="in_out")
        if ".experts." in e.disk
        else e
        for e in found
    ]


FAMILY = Family(model_types=("llama4_text",), read=_read, write=_write, names=_names)
VISION = text_part(FAMILY, "llama4", vision="vision_model")
