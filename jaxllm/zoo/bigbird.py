"""BigBird: BERT's layers that see blocks: neighbours, the first, the last, and some at random.

The random blocks are those that transformers draws in training, by layer and head; in evaluation it
sees block 0 in their place, several times over, which is not imitated. Exactly 1024, 3072 and 4096
tokens are drawn by an older plan there.
"""

from __future__ import annotations

from typing import Any

from jaxllm.spec.mask import Blocks, Full, Global, Mask, Or, Random, Window, parts
from jaxllm.spec.model import ModelSpec
from jaxllm.spec.ops import Attention
from jaxllm.zoo import encoder
from jaxllm.zoo.table import ConfigReader, Family

__all__ = ["FAMILY"]

_KINDS = ("block_sparse", "original_full")


def _mask(size: int, count: int, layer: int) -> Mask:
    """What a layer sees; its number is the seed."""
    ends = Global(first=1, last=1)
    fixed = Or(first=Window(left=1, right=1), second=ends)
    return Blocks(size=size, mask=Or(first=fixed, second=Random(count=count, seed=layer)))


def _read(config: ConfigReader) -> ModelSpec:
    sizes = encoder.read_sizes(config, activation="gelu_new")
    kind = config.take("attention_type", str, _KINDS[0])
    size = config.take("block_size", int, 64)
    count = config.take("num_random_blocks", int, 3)
    bias = config.take("use_bias", bool, True)
    scaled = config.take("rescale_embeddings", bool, False)
    if kind not in _KINDS:
        config.problem(f"attention_type {kind!r} is unknown; {', '.join(_KINDS)} are known")
    if kind == _KINDS[0] and min(size, count) < 1:
        config.problem(f"block_size {size} and num_random_blocks {count} must be positive")

    def make() -> ModelSpec:
        masks: dict[str, Mask] = {"B": Full()}
        names = ["B"] * sizes.layers
        if kind == _KINDS[0]:
            masks = {f"B{i}": _mask(size, count, i) for i in range(sizes.layers)}
            names = list(masks)
        scale = sizes.width**0.5 if scaled else 1.0
        return encoder.bert_spec(sizes, masks, names=names, scale=scale, qkv_bias=bias)

    return config.finish(make)


def _write(spec: ModelSpec) -> dict[str, Any] | None:
    config = encoder.write_bert(spec, "BigBird")
    attn = spec.blocks[0].subs[0].ops[0].op
    if config is None or not isinstance(attn, Attention):
        return None
    found = list(parts(attn.mask))
    blocks = [p.size for p in found if isinstance(p, Blocks)]
    draws = [p.count for p in found if isinstance(p, Random)]
    sparse = bool(blocks and draws)
    more = {"block_size": blocks[0], "num_random_blocks": draws[0]} if sparse else {}
    return config | more | {
        "model_type": "big_bird",
        "attention_type": _KINDS[not sparse],
        "use_bias": attn.qkv_bias,
        "rescale_embeddings": spec.embedding.scale != 1.0,
    }  # fmt: skip


FAMILY = Family(
    model_types=("big_bird",),
    read=_read,
    write=_write,
    names=encoder.bert_names,
    ignored=encoder.BERT_IGNORED,
    prefix=encoder.BERT_PREFIX,
    head_tensor="cls.predictions.transform.dense.weight",
)
