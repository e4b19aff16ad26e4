"""What families of encoders share: keys of config.json, BERT's layers, heads and names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxllm.spec.mask import Mask
from jaxllm.spec.model import Block, Embedding, Head, ModelSpec, Transform, sub
from jaxllm.spec.ops import MLP, Activation, Attention, Norm
from jaxllm.zoo import decoder
from jaxllm.zoo.table import ConfigReader, Entry

__all__ = [
    "BERT",
    "BERT_IGNORED",
    "BERT_PREFIX",
    "CLS_HEAD",
    "IGNORED",
    "LM_HEAD",
    "OLD_NORMS",
    "Sizes",
    "bert_names",
    "bert_spec",
    "has_head",
    "names_of",
    "read_sizes",
    "write_bert",
]

_ENDS = ("embed", "final_norm")
OLD_NORMS = {".LayerNorm.weight": ".LayerNorm.gamma", ".LayerNorm.bias": ".LayerNorm.beta"}
"""Names that the first files on the hub have."""

IGNORED = (
    "attention_probs_dropout_prob",
    "classifier_dropout",
    "cls_token_id",
    "directionality",
    "finetuning_task",
    "gradient_checkpointing",
    "hidden_dropout_prob",
    "pooler_fc_size",
    "pooler_num_attention_heads",
    "pooler_num_fc_layers",
    "pooler_size_per_head",
    "pooler_type",
    "sep_token_id",
)
"""Keys beside `decoder.IGNORED_KEYS` that do not change hidden states: of dropout, of heads for
other tasks, of ids."""

BERT = {
    "embed.table": "embeddings.word_embeddings",
    "embed.positions": "embeddings.position_embeddings",
    "embed.types": "embeddings.token_type_embeddings",
    "embed_norm": "embeddings.LayerNorm",
    "attn.q": "attention.self.query",
    "attn.k": "attention.self.key",
    "attn.v": "attention.self.value",
    "attn.o": "attention.output.dense",
    "attn_after_norm": "attention.output.LayerNorm",
    "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense",
    "mlp_after_norm": "output.LayerNorm",
}
BERT_PREFIX = "bert."
BERT_IGNORED = (
    "*embeddings.position_ids",
    "pooler.*",
    "bert.pooler.*",
    "cls.predictions.bias",
    "cls.predictions.decoder.*",
    "cls.seq_relationship.*",
)
"""Tensors of BERT's files that are copies, or of other tasks."""
CLS_HEAD = {
    "head.dense": "cls.predictions.transform.dense",
    "head_norm": "cls.predictions.transform.LayerNorm",
    "head": "cls.predictions",
    "head.kernel": "cls.predictions.decoder",
}
LM_HEAD = {
    "head.dense": "lm_head.dense",
    "head_norm": "lm_head.layer_norm",
    "head": "lm_head",
    "head.kernel": "lm_head.decoder",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """The numbers of a BERT, in the words of the spec."""

    vocab: int
    width: int
    layers: int
    heads: int
    ffn: int
    positions: int
    types: int
    eps: float
    activation: Any
    tied: bool
    head: bool


def has_head(config: ConfigReader) -> bool:
    """Whether `architectures` names a model with logits of masked tokens."""
    named = config.take("architectures", list, [])
    return any(str(name).endswith(("ForMaskedLM", "ForPreTraining")) for name in named)


def read_sizes(config: ConfigReader, activation: str = "gelu", eps: float = 1e-12) -> Sizes:
    """Read the sizes, and let pass the keys that change nothing; problems stay with the config.

    Args:
      config: reader of config.json.
      activation: where the file names none.
      eps: where the file names none.
    """
    config.ignore(*decoder.IGNORED_KEYS, *IGNORED)
    for key in ("is_decoder", "add_cross_attention"):
        if config.take(key, bool, False):
            config.problem(f"{key} is not supported in this family")
    kind = config.take("position_embedding_type", str, "absolute")
    if kind != "absolute":
        config.problem(f"position_embedding_type {kind!r} is not supported; absolute is")
    sizes = Sizes(
        vocab=config.take("vocab_size", int),
        width=config.take("hidden_size", int),
        layers=decoder.read_layers(config),
        heads=config.take("num_attention_heads", int),
        ffn=config.take("intermediate_size", int),
        positions=config.take("max_position_embeddings", int, 512),
        types=config.take("type_vocab_size", int, 2),
        eps=config.take("layer_norm_eps", float, eps),
        activation=decoder.read_activation(config, default=activation),
        tied=config.take("tie_word_embeddings", bool, True),
        head=has_head(config),
    )
    if sizes.width % max(sizes.heads, 1):
        config.problem(
            f"hidden_size {sizes.width} is no multiple of num_attention_heads {sizes.heads}"
        )
    return sizes


def bert_spec(
    sizes: Sizes,
    masks: Mapping[str, Mask],
    *,
    names: list[str],
    offset: int = 0,
    scale: float = 1.0,
    head_activation: Activation | None = None,
    **attention: Any,
) -> ModelSpec:
    """A spec of BERT's layers: biases, learned positions, token types, a norm after each update.

    Args:
      sizes: of the config.
      masks: block name -> what its attention sees.
      names: of the blocks of all layers.
      offset: row of the first position.
      scale: of the tokens' rows.
      head_activation: where the head has another than the layers.
      attention: what differs in the attentions.
    """
    norm = Norm(type="layer", eps=sizes.eps, bias=True)
    mlp = MLP(width=sizes.ffn, activation=sizes.activation, gated=False, bias=True)
    base: dict[str, Any] = {
        "heads": sizes.heads,
        "kv_heads": sizes.heads,
        "head_dim": sizes.width // max(sizes.heads, 1),
        "qkv_bias": True,
        "out_bias": True,
        "rope": None,
    }

    def block(name: str) -> Block:
        fields: dict[str, Any] = {**base, "mask": masks[name], **attention}
        attn = Attention(**fields)
        return Block(
            name=name, subs=(sub("attn", attn, norm_after=norm), sub("mlp", mlp, norm_after=norm))
        )

    transform = Transform(norm=norm, activation=head_activation or sizes.activation)
    return ModelSpec(
        vocab=sizes.vocab,
        width=sizes.width,
        context=max(sizes.positions - offset, 0),
        embedding=Embedding(
            scale=scale,
            positions=sizes.positions,
            position_offset=offset,
            types=sizes.types,
            norm=norm,
        ),
        head=Head(tied=sizes.tied, bias=True, transform=transform)
        if sizes.head
        else Head(logits=False),
        **decoder.layers_of(names, block),
    )


def names_of(
    spec: ModelSpec,
    body: Mapping[str, str],
    head: Mapping[str, str],
    *,
    prefix: str,
    layer: str = "encoder.layer.{}.",
) -> list[Entry]:
    """Entries of all leaves; the body's names have a prefix in files that hold a head as well.

    Args:
      spec: the model.
      body: paths -> names, as `decoder.entries` takes them.
      head: the same for the head; the bias of a head with a matrix of its own stands with that.
      prefix: of the body's names.
      layer: of a layer's tensors.
    """
    if not spec.head.logits:
        return decoder.entries(spec, body, layer=layer)
    ends = {path: prefix + name for path, name in body.items() if path.startswith(_ENDS)}
    if not spec.head.tied:
        head = {**head, "head": head["head.kernel"]}
    return decoder.entries(spec, {**body, **ends, **head}, layer=prefix + layer)


def bert_names(spec: ModelSpec) -> list[Entry]:
    """Entries of the files that BERT's own code writes."""
    return names_of(spec, BERT, CLS_HEAD, prefix=BERT_PREFIX)


def write_bert(spec: ModelSpec, name: str) -> dict[str, Any] | None:
    """The keys that `read_sizes` takes, or None for a spec of another form.

    Args:
      spec: the model.
      name: of the architecture, as Bert.
    """
    embedding, subs = spec.embedding, spec.blocks[0].subs
    ops = [named.op for part in subs for named in part.ops]
    if len(ops) != 2 or embedding.norm is None:
        return None
    attn, mlp = ops
    if not isinstance(attn, Attention) or not isinstance(mlp, MLP):
        return None
    return {
        "architectures": [f"{name}ForMaskedLM" if spec.head.logits else f"{name}Model"],
        "vocab_size": spec.vocab,
        "hidden_size": spec.width,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": attn.heads,
        "intermediate_size": mlp.width,
        "max_position_embeddings": embedding.positions,
        "type_vocab_size": embedding.types,
        "layer_norm_eps": embedding.norm.eps,
        "hidden_act": decoder.write_activation(mlp.activation),
        "tie_word_embeddings": spec.head.tied or not spec.head.logits,
    }
