"""Longformer: BERT's layers with windows of `attention_window / 2` tokens on each side.

Which tokens are global is not in the files: `Step.marks` says it, and without marks none is. Global
tokens see all, by projections of their own.
"""

from __future__ import annotations

from typing import Any

from jaxllm.spec.mask import Global, Or, Window
from jaxllm.spec.model import ModelSpec
from jaxllm.spec.ops import Attention
from jaxllm.zoo import encoder
from jaxllm.zoo.table import ConfigReader, Entry, Family

__all__ = ["FAMILY"]

_PREFIX = "longformer."
_BODY = encoder.BERT | {
    f"attn.{letter}_global": f"attention.self.{name}_global"
    for letter, name in (("q", "query"), ("k", "key"), ("v", "value"))
}
_IGNORED = ("attention_mode", "ignore_attention_mask", "onnx_export")


def _windows(config: ConfigReader, layers: int) -> list[int]:
    """Tokens that a layer sees on each side."""
    given = config.take("attention_window", object, 512)
    windows = given if isinstance(given, list) else [given] * layers
    if not all(type(w) is int and w >= 2 and w % 2 == 0 for w in windows):
        config.problem(f"attention_window is {given!r}; it must be even, at least 2, or a list")
        return [1] * layers
    if len(windows) != layers:
        config.problem(f"attention_window has {len(windows)} layers, the model {layers}")
    return [w // 2 for w in windows]


def _read(config: ConfigReader) -> ModelSpec:
    config.ignore(*_IGNORED)
    sizes = encoder.read_sizes(config)
    padding = config.take("pad_token_id", int, 1)
    sides = _windows(config, sizes.layers)
    if sizes.positions <= padding + 1:
        config.problem(
            f"max_position_embeddings is {sizes.positions}; those up to pad_token_id {padding} "
            "are no positions"
        )

    def make() -> ModelSpec:
        masks = {
            f"W{side}": Or(first=Window(left=side, right=side), second=Global()) for side in sides
        }
        names = [f"W{side}" for side in sides]
        return encoder.bert_spec(
            sizes,
            masks,
            names=names,
            offset=padding + 1,
            head_activation="gelu",
            global_projections=True,
        )

    return config.finish(make)


def _side(attn: Any) -> int | None:
    """Tokens on each side that an attention of this family sees."""
    match attn:
        case Attention(mask=Or(first=Window(left=left), second=Global())):
            return left
    return None


def _write(spec: ModelSpec) -> dict[str, Any] | None:
    config = encoder.write_bert(spec, "Longformer")
    sides = {block.name: _side(block.subs[0].ops[0].op) for block in spec.blocks}
    if config is None or not all(sides.values()) or not spec.embedding.position_offset:
        return None
    windows = [2 * (sides[name] or 0) for name in spec.pattern.names]
    return config | {
        "model_type": "longformer",
        "attention_window": windows,
        "pad_token_id": spec.embedding.position_offset - 1,
    }


def _names(spec: ModelSpec) -> list[Entry]:
    return encoder.names_of(spec, _BODY, encoder.LM_HEAD, prefix=_PREFIX)


FAMILY = Family(
    model_types=("longformer",),
    read=_read,
    write=_write,
    names=_names,
    ignored=(
        "*embeddings.position_ids",
        "pooler.*",
        "longformer.pooler.*",
        "lm_head.bias",
        "lm_head.decoder.*",
    ),
    prefix=_PREFIX,
    head_tensor="lm_head.dense.weight",
)
