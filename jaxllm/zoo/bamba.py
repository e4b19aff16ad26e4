"""Bamba: dual state spaces, and attention with a rope on half of each head in named layers."""

from __future__ import annotations

from typing import Any

from jaxllm.spec.model import Block, Head, ModelSpec
from jaxllm.spec.ops import MLP, Attention, Norm, StateSpaceDual
from jaxllm.spec.rope import Rope
from jaxllm.zoo import decoder, recurrent
from jaxllm.zoo.rope import read_rope, write_rope
from jaxllm.zoo.table import ConfigReader, Entry, Family

__all__ = ["FAMILY"]


def _read(config: ConfigReader) -> ModelSpec:
    sizes = decoder.read_sizes(config, context=262_144)
    # The reference reads neither key: half of a head is always rotated.
    config.ignore(*recurrent.IGNORED, "attn_rotary_emb", "z_loss_coefficient")
    places = config.take("attn_layer_indices", list, [])
    if any(i not in range(sizes.layers) for i in places):
        config.problem(f"attn_layer_indices {places} are not layers 0 to {sizes.layers - 1}")
    rope = read_rope(config, context=sizes.context, fraction=0.5)
    eps = config.take("rms_norm_eps", float, 1e-5)
    activation = decoder.read_activation(config)
    tied = config.take("tie_word_embeddings", bool, False)
    bias = config.take("attention_bias", bool, False)
    mlp_bias = config.take("mlp_bias", bool, False)
    mixer = recurrent.read_mixer(config, sizes.width, activation)

    def make() -> ModelSpec:
        assert mixer is not None  # a problem was left where there is none
        norm = Norm(eps=eps)
        mlp = MLP(width=sizes.ffn, activation=activation, bias=mlp_bias)
        attn = Attention(**decoder.heads_of(sizes), qkv_bias=bias, out_bias=bias, rope=rope)
        blocks = {
            "A": recurrent.pair(attn, mlp, norm, name="attn"),
            "M": recurrent.pair(mixer, mlp, norm),
        }
        return decoder.model_of(
            sizes,
            ["A" if i in places else "M" for i in range(sizes.layers)],
            lambda name: Block(name=name, subs=blocks[name]),
            ropes=(rope,),
            final_norm=norm,
            head=Head(tied=tied),
        )

    return config.finish(make)


def _write(spec: ModelSpec) -> dict[str, Any] | None:
    found = recurrent.write_hybrid(spec, "Bamba")
    if found is None or StateSpaceDual not in found[0]:
        return None
    ops, sizes = found
    attn = ops[Attention]
    return {
        **sizes,
        **recurrent.write_mixer(ops[StateSpaceDual], spec.width),
        **write_rope(attn.rope or Rope(fraction=0.5), context=spec.context),
        "model_type": "bamba",
        "attn_layer_indices": [i for i, here in enumerate(recurrent.attends(spec)) if here],
        "attention_bias": attn.out_bias,
        "mlp_bias": ops[MLP].bias,
    }


def _names(spec: ModelSpec) -> list[Entry]:
    names = recurrent.dual_names("mamba") | recurrent.FEED_FORWARD
    return recurrent.entries(spec, decoder.TENSORS | names)


FAMILY = Family(model_types=("bamba",), read=_read, write=_write, names=_names)
