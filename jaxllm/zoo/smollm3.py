"""SmolLM3: a Llama without positions on every fourth layer."""

from __future__ import annotations

from typing import Any

from jaxllm.spec.model import Block, Head, ModelSpec, sub
from jaxllm.spec.ops import MLP, Attention, Norm
from jaxllm.spec.rope import Rope
from jaxllm.zoo import decoder
from jaxllm.zoo.decoder import Kind
from jaxllm.zoo.rope import read_rope, write_rope
from jaxllm.zoo.table import ConfigReader, Family

__all__ = ["FAMILY"]

# (has a rope, kind of layer) -> name of the block
_BLOCKS: dict[tuple[bool, Kind], str] = {
    (True, "full_attention"): "G",
    (True, "sliding_attention"): "L",
    (False, "full_attention"): "N",
    (False, "sliding_attention"): "M",
}


def _roped(config: ConfigReader, layers: int) -> list[bool]:
    """Which layers have a rope: in spite of its name the list has 1 for these."""
    period = config.take("no_rope_layer_interval", int, 4)
    default = [int((i + 1) % max(period, 1) != 0) for i in range(layers)]
    given = config.take("no_rope_layers", list, default)
    if len(given) != layers or any(item not in (0, 1) for item in given):
        config.problem(f"no_rope_layers is {given!r}; it must have 0 or 1 for {layers} layers")
        given = default
    return [bool(item) for item in given]


def _read(config: ConfigReader) -> ModelSpec:
    sizes = decoder.read_sizes(config, context=32_768)
    roped = _roped(config, sizes.layers)
    used = config.take("use_sliding_window", bool, False)
    windowed = used and config.take("sliding_window", int, None) is not None
    config.ignore("max_window_layers")
    kinds = decoder.read_kinds(config, [decoder.KINDS[windowed and not has] for has in roped])
    window = decoder.window_of(config, kinds, None)
    if "sliding_attention" in kinds and not used:
        config.problem("layer_types has sliding_attention, but use_sliding_window is false")
    rope = read_rope(config, context=sizes.context, theta=2e6)
    bias = config.take("attention_bias", bool, False)
    eps = config.take("rms_norm_eps", float, 1e-6)
    mlp_bias = config.take("mlp_bias", bool, False)
    activation = decoder.read_activation(config)
    tied = config.take("tie_word_embeddings", bool, True)

    def make() -> ModelSpec:
        norm = Norm(eps=eps)
        mlp = MLP(width=sizes.ffn, activation=activation, bias=mlp_bias)
        attns = {
            name: Attention(
                **decoder.heads_of(sizes),
                qkv_bias=bias,
                out_bias=bias,
                rope=rope if has else None,
                mask=decoder.mask_of(kind, window),
            )
            for (has, kind), name in _BLOCKS.items()
        }

        def block(name: str) -> Block:
            subs = (sub("attn", attns[name], norm_in=norm), sub("mlp", mlp, norm_in=norm))
            return Block(name=name, subs=subs)

        names = [_BLOCKS[pair] for pair in zip(roped, kinds, strict=True)]
        return decoder.model_of(
            sizes,
            names,
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
    roped = [parts.attns[name].rope is not None for name in spec.pattern.names]
    kinds = decoder.write_kinds(spec, parts)
    return {
        **decoder.write_sizes(spec, "SmolLM3", parts),
        **write_rope(ropes[0] if ropes else Rope(theta=2e6), context=spec.context),
        **kinds,
        "model_type": "smollm3",
        "no_rope_layers": [int(has) for has in roped],
        "use_sliding_window": "sliding_attention" in kinds["layer_types"],
        "attention_bias": parts.attn.out_bias,
        "mlp_bias": parts.mlp.bias,
        "rms_norm_eps": parts.norm.eps,
        "hidden_act": decoder.write_activation(parts.mlp.activation),
    }


FAMILY = Family(
    model_types=("smollm3",),
    read=_read,
    write=_write,
    names=lambda spec: decoder.entries(spec, decoder.TENSORS | decoder.PRE_NORMS),
)
