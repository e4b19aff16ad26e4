"""LFM2: gated short convolutions, and attention with normed queries and keys in named layers."""

from __future__ import annotations

from typing import Any

from jaxllm.spec.model import Block, Head, ModelSpec
from jaxllm.spec.ops import MLP, Attention, Convolution, Norm, QKNorm
from jaxllm.zoo import decoder, recurrent
from jaxllm.zoo.rope import read_rope, write_rope
from jaxllm.zoo.table import ConfigReader, Entry, Family

__all__ = ["FAMILY", "NAMES", "read_kinds"]

_KINDS = {"full_attention": "A", "conv": "C"}
_IGNORED = (
    "block_mlp_init_scale",
    "block_norm_eps",
    "block_out_init_scale",
    "block_use_swiglu",
    "block_use_xavier_init",
    "conv_dim",
    "conv_dim_out",
    "conv_use_xavier_init",
    "theta",
    "use_pos_enc",
)
NAMES = {
    "final_norm": "model.embedding_norm",
    "attn.o": "self_attn.out_proj",
    "attn.q_norm": "self_attn.q_layernorm",
    "attn.k_norm": "self_attn.k_layernorm",
    "conv.b": "conv.in_proj",
    "conv.c": "conv.in_proj",
    "conv.x": "conv.in_proj",
    "conv.conv": "conv.conv",
    "conv.o": "conv.out_proj",
    "mlp.gate": "feed_forward.w1",
    "mlp.up": "feed_forward.w3",
    "mlp.down": "feed_forward.w2",
    "attn_norm": "operator_norm",
    "conv_norm": "operator_norm",
    "mlp_norm": "ffn_norm",
}
"""Names beside those of most families."""


def read_kinds(config: ConfigReader, layers: int) -> list[str]:
    """The block of each layer, from a list of kinds or the numbers of those that attend."""
    places = config.take("full_attn_idxs", list, list(range(layers)))
    default = ["full_attention" if i in places else "conv" for i in range(layers)]
    kinds = config.take("layer_types", list, default)
    unknown = sorted({repr(kind) for kind in kinds if kind not in _KINDS})
    if unknown:
        config.problem(f"layer_types {', '.join(unknown)} are not supported in this family")
    if len(kinds) != layers:
        config.problem(f"layer_types has {len(kinds)} layers, num_hidden_layers is {layers}")
    return [_KINDS.get(kind, "C") for kind in kinds]


def _ffn(config: ConfigReader, declared: int) -> int:
    """The width of the feed-forward: two thirds of the declared one, rounded up."""
    width = config.take("block_ff_dim", int, declared)
    multiple = config.take("block_multiple_of", int, 256)
    factor = config.take("block_ffn_dim_multiplier", float, 1.0)
    if not config.take("block_auto_adjust_ff_dim", bool, True):
        return width
    if config.has("block_ffn_dim_multiplier") and factor is None:
        return int(2 * width / 3)
    width = int(factor * int(2 * width / 3))
    return max(multiple, 1) * -(-width // max(multiple, 1))


def _read(config: ConfigReader) -> ModelSpec:
    if config.has("block_ff_dim") and not config.has("intermediate_size"):
        sizes = decoder.read_sizes(config, context=128_000, ffn=1)
    else:
        sizes = decoder.read_sizes(config, context=128_000)
    config.ignore(*_IGNORED)
    for key, value in (("block_dim", sizes.width), ("num_heads", sizes.heads)):
        config.fixed(**{key: value})  # older names of the same
    ffn = _ffn(config, sizes.ffn)
    names = read_kinds(config, sizes.layers)
    rope = read_rope(config, context=sizes.context, theta=1e6)
    eps = config.take("norm_eps", float, 1e-5)
    tied = config.take("tie_embedding", bool, config.take("tie_word_embeddings", bool, True))
    conv = {
        "channels": sizes.width,
        "conv": config.take("conv_L_cache", int, 3),
        "bias": config.take("conv_bias", bool, False),
    }

    def make() -> ModelSpec:
        norm, mlp = Norm(eps=eps), MLP(width=ffn)
        attn = Attention(**decoder.heads_of(sizes), rope=rope, qk_norm=QKNorm(eps=eps))
        blocks = {
            "A": recurrent.pair(attn, mlp, norm, name="attn"),
            "C": recurrent.pair(Convolution(**conv), mlp, norm, name="conv"),
        }
        return decoder.model_of(
            sizes,
            names,
            lambda name: Block(name=name, subs=blocks[name]),
            ropes=(rope,),
            final_norm=norm,
            head=Head(tied=tied),
        )

    return config.finish(make)


def _write(spec: ModelSpec) -> dict[str, Any] | None:
    found = recurrent.write_hybrid(spec, "Lfm2")
    if found is None or Convolution not in found[0]:
        return None
    ops, sizes = found
    conv, attn = ops[Convolution], ops[Attention]
    kinds = ["full_attention" if here else "conv" for here in recurrent.attends(spec)]
    sizes["norm_eps"] = sizes.pop("rms_norm_eps")
    del sizes["hidden_act"]
    return {
        **sizes,
        **write_rope(attn.rope, context=spec.context),
        "model_type": "lfm2",
        "layer_types": kinds,
        "conv_L_cache": conv.conv,
        "conv_bias": conv.bias,
        "block_auto_adjust_ff_dim": False,
    }


def _names(spec: ModelSpec) -> list[Entry]:
    return recurrent.entries(spec, decoder.TENSORS | NAMES)


FAMILY = Family(model_types=("lfm2",), read=_read, write=_write, names=_names)
