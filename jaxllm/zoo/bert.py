"""BERT and MiniLM: an encoder with learned positions and token types, a norm after each update.

The pooler (a layer on the first token, for tasks of pairs) is read over: hidden states do not
depend on it.
"""

from __future__ import annotations

from typing import Any

from jaxllm.spec.mask import Full
from jaxllm.spec.model import ModelSpec
from jaxllm.zoo import encoder
from jaxllm.zoo.table import ConfigReader, Family

__all__ = ["FAMILY"]


def _read(config: ConfigReader) -> ModelSpec:
    sizes = encoder.read_sizes(config)
    return config.finish(
        lambda: encoder.bert_spec(sizes, {"B": Full()}, names=["B"] * sizes.layers)
    )


def _write(spec: ModelSpec) -> dict[str, Any] | None:
    config = encoder.write_bert(spec, "Bert")
    return None if config is None else {"model_type": "bert"} | config


FAMILY = Family(
    model_types=("bert",),
    read=_read,
    write=_write,
    names=encoder.bert_names,
    ignored=encoder.BERT_IGNORED,
    prefix=encoder.BERT_PREFIX,
    head_tensor="cls.predictions.transform.dense.weight",
    older=encoder.OLD_NORMS,
)
