"""Phi-1, 1.5 and 2: attention and MLP side by side on one LayerNorm, biases up to the logits."""

from __future__ import annotations

from typing import Any

from jaxllm.spec.model import Block, Head, ModelSpec, NamedOp, Sub
from jaxllm.spec.ops import MLP, Attention, Norm
from jaxllm.zoo import decoder
from jaxllm.zoo.rope import read_rope, write_rope
from jaxllm.zoo.table import ConfigReader, Family

__all__ = ["FAMILY"]

_TENSORS = decoder.TENSORS | {
    "final_norm": "model.final_layernorm",
    "head": "lm_head",
    "attn.o": "self_attn.dense",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
    "attn_norm": "input_layernorm",
}


def _read(config: ConfigReader) -> ModelSpec:
    sizes = decoder.read_sizes(config, context=2048)
    config.ignore("auto_map", "embd_pdrop", "resid_pdrop")
    rope = read_rope(config, context=sizes.context, fraction=0.5)
    eps = config.take("layer_norm_eps", float, 1e-5)
    activation = decoder.read_activation(config, default="gelu_new")
    tied = config.take("tie_word_embeddings", bool, False)
    config.fixed(qk_layernorm=False)

    def make() -> ModelSpec:
        norm = Norm(type="layer", eps=eps, bias=True)
        attn = Attention(**decoder.heads_of(sizes), qkv_bias=True, out_bias=True, rope=rope)
        mlp = MLP(width=sizes.ffn, activation=activation, gated=False, bias=True)
        ops = (NamedOp(name="attn", op=attn), NamedOp(name="mlp", op=mlp))
        return decoder.model_of(
            sizes,
            ["P"] * sizes.layers,
            lambda name: Block(name=name, subs=(Sub(ops=ops, norm_in=norm),)),
            ropes=(rope,),
            final_norm=norm,
            head=Head(tied=tied, bias=True),
        )

    return config.finish(make)


def _write(spec: ModelSpec) -> dict[str, Any] | None:
    parts = decoder.parts_of(spec)
    if parts is None or parts.attn.rope is None:
        return None
    return {
        **decoder.write_sizes(spec, "Phi", parts),
        **write_rope(parts.attn.rope, context=spec.context),
        "partial_rotary_factor": parts.attn.rope.fraction,
        "model_type": "phi",
        "layer_norm_eps": parts.norm.eps,
        "hidden_act": decoder.write_activation(parts.mlp.activation),
    }


FAMILY = Family(
    model_types=("phi",),
    read=_read,
    write=_write,
    names=lambda spec: decoder.entries(spec, _TENSORS),
    ignored=("*.rotary_emb.inv_freq",),
)
