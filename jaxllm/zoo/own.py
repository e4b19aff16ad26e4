"""Our own layout, for models that no public family can say: the spec in config.json, our names.

config.json is `{"model_type": "jaxllm", "spec": {...}}` with the JSON of `ModelSpec`; a tensor has
the unstacked path of its parameter. Matrices lie [outputs, inputs], as quantized ones do, all else
as it is.
"""

from __future__ import annotations

from typing import Any

from jaxllm.core.config import from_dict, to_dict
from jaxllm.spec.model import ModelSpec
from jaxllm.spec.param import ParamDef
from jaxllm.spec.table import layer_paths
from jaxllm.zoo.table import ConfigReader, Entry, Family, Form

__all__ = ["FAMILY"]


def _read(config: ConfigReader) -> ModelSpec:
    config.ignore("eos_token_id", "model_type", "torch_dtype", "transformers_version")
    spec = config.take("spec", dict, {})
    return config.finish(lambda: from_dict(ModelSpec, spec, "spec"))


def _write(spec: ModelSpec) -> dict[str, Any]:
    return {"model_type": "jaxllm", "spec": to_dict(spec)}


def _names(spec: ModelSpec) -> list[Entry]:
    return [Entry(path, path, _form(definition)) for path, definition in layer_paths(spec).items()]


def _form(definition: ParamDef) -> Form:
    if not definition.std:
        return "same"
    return "linear" if definition.inputs else "plain"


FAMILY = Family(model_types=("jaxllm",), read=_read, write=_write, names=_names)
