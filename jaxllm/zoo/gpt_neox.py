"""GPT-NeoX and Pythia: attention and MLP side by side, each after a LayerNorm of its own.

The rope turns a part of each head. On disk a head's query, key and value stand together.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxllm.spec.model import Block, Head, ModelSpec, NamedOp, Sub, sub
from jaxllm.spec.ops import MLP, Attention, Norm
from jaxllm.zoo import decoder
from jaxllm.zoo.rope import read_rope, write_rope
from jaxllm.zoo.table import ConfigReader, Entry, Family

__all__ = ["FAMILY"]

_PREFIX = "gpt_neox."
_TENSORS = {
    "embed.table": "gpt_neox.embed_in",
    "final_norm": "gpt_neox.final_layer_norm",
    "head.kernel": "embed_out",
    "attn.q": "attention.query_key_value",
    "attn.k": "attention.query_key_value",
    "attn.v": "attention.query_key_value",
    "attn.o": "attention.dense",
    "mlp.up": "mlp.dense_h_to_4h",
    "mlp.down": "mlp.dense_4h_to_h",
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
}


def _read(config: ConfigReader) -> ModelSpec:
    config.ignore(*decoder.IGNORED_KEYS, "classifier_dropout", "is_decoder")
    vocab, width = config.take("vocab_size", int), config.take("hidden_size", int)
    heads, layers = config.take("num_attention_heads", int), decoder.read_layers(config)
    ffn = config.take("intermediate_size", int, 24_576)
    context = config.take("max_position_embeddings", int, 2048)
    theta = config.take("rotary_emb_base", float, 10_000.0)
    fraction = config.take("rotary_pct", float, 0.25)
    rope = read_rope(config, context=context, theta=theta, fraction=fraction)
    bias = config.take("attention_bias", bool, True)
    eps = config.take("layer_norm_eps", float, 1e-5)
    activation = decoder.read_activation(config, default="gelu")
    tied = config.take("tie_word_embeddings", bool, False)
    parallel = config.take("use_parallel_residual", bool, True)
    if width % max(heads, 1):
        config.problem(f"hidden_size {width} is no multiple of num_attention_heads {heads}")
    sizes = decoder.Sizes(
        vocab=vocab,
        width=width,
        layers=layers,
        context=context,
        heads=heads,
        kv_heads=heads,
        head_dim=width // max(heads, 1),
        ffn=ffn,
    )

    def make() -> ModelSpec:
        norm = Norm(type="layer", eps=eps, bias=True)
        attn = Attention(**decoder.heads_of(sizes), qkv_bias=bias, out_bias=bias, rope=rope)
        mlp = MLP(width=ffn, activation=activation, gated=False, bias=True)
        subs = (sub("attn", attn, norm_in=norm), sub("mlp", mlp, norm_in=norm))
        if parallel:
            ops = [NamedOp(name=s.name, op=s.ops[0].op, norm_in=norm) for s in subs]
            subs = (Sub(ops=tuple(ops)),)
        return decoder.model_of(
            sizes,
            ["G"] * layers,
            lambda name: Block(name=name, subs=subs),
            ropes=(rope,),
            final_norm=norm,
            head=Head(tied=tied),
        )

    return config.finish(make)


def _write(spec: ModelSpec) -> dict[str, Any] | None:
    parts = decoder.parts_of(spec)
    if parts is None or parts.attn.rope is None:
        return None
    sizes = decoder.write_sizes(spec, "GPTNeoX", parts)
    for key in ("head_dim", "num_key_value_heads"):
        del sizes[key]
    rope = write_rope(parts.attn.rope, context=spec.context)
    return {
        **sizes,
        **rope,
        "rotary_emb_base": rope["rope_theta"],
        "rotary_pct": parts.attn.rope.fraction,
        "partial_rotary_factor": parts.attn.rope.fraction,
        "model_type": "gpt_neox",
        "attention_bias": parts.attn.out_bias,
        "layer_norm_eps": parts.norm.eps,
        "hidden_act": decoder.write_activation(parts.mlp.activation),
        "use_parallel_residual": len(spec.blocks[0].subs) == 1,
    }


def _names(spec: ModelSpec) -> list[Entry]:
    found = decoder.entries(spec, _TENSORS, layer=_PREFIX + "layers.{}.")
    attn = next(o.op for s in spec.blocks[0].subs for o in s.ops if isinstance(o.op, Attention))

    def mend(entry: Entry) -> Entry:
        if entry.part is None:
            return entry
        start, total = entry.part
        place = start * 3 // total * attn.head_dim
        return dataclasses.replace(entry, part=(place, total), stride=3, run=attn.head_dim)

    return [mend(entry) for entry in found]


FAMILY = Family(
    model_types=("gpt_neox",),
    read=_read,
    write=_write,
    names=_names,
    ignored=("*.attention.bias", "*.attention.masked_bias", "*.rotary_emb.inv_freq"),
)
