"""BERT and MiniLM: an encoder with learned positions and token types, a norm after each update.

The pooler (a layer on the first token, for tasks of pairs) is read over: hidden states do not
depend on it.
"""

from __future__ import annotations

from typing import Any

from jaxllm.spec.mask import Full
from jaxllm.spec.model import ModelSpec
from jaxllm.zoo import encoder
from jaxllm.zoo.table import ConfigReader, Entry, Family

__all__ = ["FAMILY"]

_PREFIX = "bert."


def _read(config: ConfigReader) -> ModelSpec:
    sizes = encoder.read_sizes(config)
    return config.finish(
        lambda: encoder.bert_spec(sizes, {"B": Full()}, names=["B"] * sizes.layers)
    )


def _write(spec: ModelSpec) -> dict[str, Any] | None:
    config = encoder.write_bert(spec, "Bert")
    return None if config is None else {"model_type": "bert"} | config


def _names(spec: ModelSpec) -> list[Entry]:
    return encoder.names_of(spec, encoder.BERT, encoder.CLS_HEAD, prefix=_PREFIX)


FAMILY = Family(
    model_types=("bert",),
    read=_read,
    write=_write,
    names=_names,
    ignored=(
        "*embeddings.position_ids",
        "pooler.*",
        "bert.pooler.*",
        "cls.predictions.bias",
        "cls.predictions.decoder.*",
        "cls.seq_relationship.*",
    ),
    prefix=_PREFIX,
    head_tensor="cls.predictions.transform.dense.weight",
    older=encoder.OLD_NORMS,
)
