"""ModernBERT: no biases, GeGLU, local and global layers with a rope each.

Local layers see `local_attention / 2` tokens on each side. The first layer has no norm before its
attention: the embedding is normed.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxllm.spec.mask import Full, Mask, Window
from jaxllm.spec.model import Block, Embedding, Head, ModelSpec, Transform, sub
from jaxllm.spec.ops import MLP, Attention, Norm
from jaxllm.spec.rope import Rope
from jaxllm.zoo import decoder, encoder
from jaxllm.zoo.rope import read_ropes, usable_context, write_ropes
from jaxllm.zoo.table import ConfigReader, Entry, Family

__all__ = ["FAMILY"]

_PREFIX = "model."
_THETAS = {"full_attention": 160_000.0, "sliding_attention": 10_000.0}
_BLOCKS = {"full_attention": "G", "sliding_attention": "L"}
_FIRST = {"G": "F", "L": "E"}  # names of the first layer's block
_BODY = {
    "embed.table": "embeddings.tok_embeddings",
    "embed_norm": "embeddings.norm",
    "final_norm": "final_norm",
    "attn.q": "attn.Wqkv",
    "attn.k": "attn.Wqkv",
    "attn.v": "attn.Wqkv",
    "attn.o": "attn.Wo",
    "attn_norm": "attn_norm",
    "mlp.gate": "mlp.Wi",
    "mlp.up": "mlp.Wi",
    "mlp.down": "mlp.Wo",
    "mlp_norm": "mlp_norm",
}
_HEAD = {
    "head.dense": "head.dense",
    "head_norm": "head.norm",
    "head": "decoder",
    "head.kernel": "decoder",
}
_IGNORED = (
    "classifier_activation_dropout",
    "classifier_pooling",
    "deterministic_flash_attn",
    "embedding_dropout",
    "initializer_cutoff_factor",
    "layer_norm_eps",
    "mlp_dropout",
    "position_embedding_type",
    "reference_compile",
    "repad_logits_with_grad",
    "sparse_pred_ignore_index",
    "sparse_prediction",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Own:
    """What this family's config says beside the sizes."""

    kinds: list[str]
    ropes: dict[str, Rope]
    window: int
    biases: tuple[bool, bool, bool]
    activation: Any


def _kinds(config: ConfigReader, layers: int) -> list[str]:
    every = config.take("global_attn_every_n_layers", int, 3)
    if every < 1:
        config.problem(f"global_attn_every_n_layers is {every}; it must be positive")
    default: list[decoder.Kind] = [decoder.KINDS[bool(i % max(every, 1))] for i in range(layers)]
    return [str(kind) for kind in decoder.read_kinds(config, default)]


def _ropes(config: ConfigReader, context: int) -> dict[str, Rope]:
    thetas = {
        "full_attention": config.take("global_rope_theta", float, _THETAS["full_attention"]),
        "sliding_attention": config.take("local_rope_theta", float, _THETAS["sliding_attention"]),
    }
    return read_ropes(config, thetas, context=context)


def _read(config: ConfigReader) -> ModelSpec:
    config.ignore(*encoder.IGNORED, *_IGNORED)
    sizes = decoder.read_sizes(config, context=8192)
    if sizes.width % max(sizes.heads, 1):
        config.problem(f"hidden_size {sizes.width} is no multiple of the {sizes.heads} heads")
    eps = config.take("norm_eps", float, 1e-5)
    norm_bias = config.take("norm_bias", bool, False)
    keys = ("attention_bias", "mlp_bias", "classifier_bias")
    attn_bias, mlp_bias, dense_bias = (config.take(key, bool, False) for key in keys)
    window = config.take("local_attention", int, 128)
    own = _Own(
        kinds=_kinds(config, sizes.layers),
        ropes=_ropes(config, sizes.context),
        window=window // 2,
        biases=(attn_bias, mlp_bias, norm_bias),
        activation=decoder.read_activation(config, "hidden_activation", "gelu"),
    )
    act = decoder.read_activation(config, "classifier_activation", "gelu")
    bias = config.take("decoder_bias", bool, True)
    tied = config.take("tie_word_embeddings", bool, True)
    has_head = encoder.has_head(config)

    def make() -> ModelSpec:
        norm = Norm(type="layer", eps=eps, bias=norm_bias)
        transform = Transform(norm=norm, activation=act, bias=dense_bias)
        names = [_BLOCKS[kind] for kind in own.kinds]
        names[0] = _FIRST[names[0]]
        return ModelSpec(
            vocab=sizes.vocab,
            width=sizes.width,
            context=usable_context(sizes.context, *own.ropes.values()),
            embedding=Embedding(norm=norm),
            final_norm=norm,
            head=Head(tied=tied, bias=bias, transform=transform)
            if has_head
            else Head(logits=False),
            **decoder.layers_of(names, lambda name: _block(name, sizes, own, norm)),
        )

    return config.finish(make)


def _block(name: str, sizes: decoder.Sizes, own: _Own, norm: Norm) -> Block:
    first = name in _FIRST.values()
    kind = "full_attention" if name in ("G", "F") else "sliding_attention"
    mask: Mask = Full() if name in ("G", "F") else Window(left=own.window, right=own.window)
    attn = Attention(
        heads=sizes.heads,
        kv_heads=sizes.heads,
        head_dim=sizes.width // max(sizes.heads, 1),
        qkv_bias=own.biases[0],
        out_bias=own.biases[0],
        rope=own.ropes[kind],
        mask=mask,
    )
    mlp = MLP(width=sizes.ffn, activation=own.activation, bias=own.biases[1])
    return Block(
        name=name,
        subs=(sub("attn", attn, norm_in=None if first else norm), sub("mlp", mlp, norm_in=norm)),
    )


def _write(spec: ModelSpec) -> dict[str, Any] | None:
    parts = decoder.parts_of(spec)
    if parts is None:
        return None
    kinds = {name: isinstance(attn.mask, Window) for name, attn in parts.attns.items()}
    ropes = {kind: Rope(theta=theta) for kind, theta in _THETAS.items()}
    windows = [a.mask.left for a in parts.attns.values() if isinstance(a.mask, Window)]
    for name, attn in parts.attns.items():
        ropes[decoder.KINDS[kinds[name]]] = attn.rope or Rope()
    transform = spec.head.transform
    head = {"classifier_bias": False} if transform is None else {
        "classifier_bias": transform.bias,
        "classifier_activation": decoder.write_activation(transform.activation),
    }  # fmt: skip
    return {
        **write_ropes(ropes, context=spec.context),
        **head,
        "architectures": [f"ModernBert{'ForMaskedLM' if spec.head.logits else 'Model'}"],
        "model_type": "modernbert",
        "vocab_size": spec.vocab,
        "hidden_size": spec.width,
        "intermediate_size": parts.mlp.width,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": parts.attn.heads,
        "layer_types": [decoder.KINDS[kinds[name]] for name in spec.pattern.names],
        "local_attention": 2 * (windows[0] if windows else 64),
        "norm_eps": parts.norm.eps,
        "norm_bias": parts.norm.bias,
        "attention_bias": parts.attn.out_bias,
        "mlp_bias": parts.mlp.bias,
        "hidden_activation": decoder.write_activation(parts.mlp.activation),
        "decoder_bias": spec.head.bias or not spec.head.logits,
        "tie_word_embeddings": spec.head.tied or not spec.head.logits,
    }


def _names(spec: ModelSpec) -> list[Entry]:
    return encoder.names_of(spec, _BODY, _HEAD, prefix=_PREFIX, layer="layers.{}.")


FAMILY = Family(
    model_types=("modernbert",),
    read=_read,
    write=_write,
    names=_names,
    ignored=("decoder.weight", "*.rotary_emb.*inv_freq"),
    prefix=_PREFIX,
    head_tensor="head.dense.weight",
)
