"""GPT-2: learned positions, LayerNorm, biases everywhere, matrices stored [in, out]."""

from __future__ import annotations

from typing import Any

from jaxllm.spec.model import Block, Embedding, Head, ModelSpec, sub
from jaxllm.spec.ops import MLP, Attention, Norm
from jaxllm.zoo import decoder
from jaxllm.zoo.table import ConfigReader, Entry, Family

__all__ = ["FAMILY"]

_PREFIX = "transformer."
_TENSORS = {
    "embed.table": "transformer.wte",
    "embed.positions": "transformer.wpe",
    "final_norm": "transformer.ln_f",
    "head.kernel": "lm_head",
    "attn.q": "attn.c_attn",
    "attn.k": "attn.c_attn",
    "attn.v": "attn.c_attn",
    "attn.o": "attn.c_proj",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
    "attn_norm": "ln_1",
    "mlp_norm": "ln_2",
}
# What does not change the logits: dropout, heads for other tasks, the order of roundings.
_IGNORED = (
    "attn_pdrop",
    "embd_pdrop",
    "n_ctx",
    "reorder_and_upcast_attn",
    "resid_pdrop",
    "summary_activation",
    "summary_first_dropout",
    "summary_proj_to_labels",
    "summary_type",
    "summary_use_proj",
    "task_specific_params",
)


def _read(config: ConfigReader) -> ModelSpec:
    config.ignore(*decoder.IGNORED_KEYS, *_IGNORED)
    vocab, width = config.take("vocab_size", int), config.take("n_embd", int)
    heads, layers = config.take("n_head", int), decoder.read_layers(config, "n_layer")
    positions = config.take("n_positions", int, 1024)
    ffn = config.take("n_inner", int, 4 * width)
    eps = config.take("layer_norm_epsilon", float, 1e-5)
    activation = decoder.read_activation(config, "activation_function", "gelu_new")
    tied = config.take("tie_word_embeddings", bool, True)
    scaled = config.take("scale_attn_weights", bool, True)
    for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if config.take(key, bool, False):
            config.problem(f"{key} is not supported in this family")
    if width % max(heads, 1):
        config.problem(f"n_embd {width} is no multiple of n_head {heads}")

    def make() -> ModelSpec:
        norm = Norm(type="layer", eps=eps, bias=True)
        attn = Attention(
            heads=heads,
            kv_heads=heads,
            head_dim=width // max(heads, 1),
            qkv_bias=True,
            out_bias=True,
            scale=None if scaled else 1.0,
            rope=None,
        )
        mlp = MLP(width=ffn, activation=activation, gated=False, bias=True)
        subs = (sub("attn", attn, norm_in=norm), sub("mlp", mlp, norm_in=norm))
        return ModelSpec(
            vocab=vocab,
            width=width,
            context=positions,
            embedding=Embedding(positions=positions),
            final_norm=norm,
            head=Head(tied=tied),
            **decoder.layers_of(["G"] * layers, lambda name: Block(name=name, subs=subs)),
        )

    return config.finish(make)


def _write(spec: ModelSpec) -> dict[str, Any] | None:
    parts = decoder.parts_of(spec)
    if parts is None or spec.embedding.positions is None:
        return None
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": spec.vocab,
        "n_embd": spec.width,
        "n_layer": spec.num_layers,
        "n_head": parts.attn.heads,
        "n_positions": spec.embedding.positions,
        "n_inner": parts.mlp.width,
        "layer_norm_epsilon": parts.norm.eps,
        "activation_function": decoder.write_activation(parts.mlp.activation),
        "scale_attn_weights": parts.attn.scale is None,
        "tie_word_embeddings": spec.head.tied,
    }


def _names(spec: ModelSpec) -> list[Entry]:
    return decoder.entries(spec, _TENSORS, layer=_PREFIX + "h.{}.", form="in_out")


FAMILY = Family(
    model_types=("gpt2",),
    read=_read,
    write=_write,
    names=_names,
    ignored=("*.attn.bias", "*.attn.masked_bias"),
    prefix=_PREFIX,
)
