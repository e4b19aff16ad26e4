"""Public quantized checkpoints: what `quantization_config` says, and a reader of packed leaves."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from jaxllm.core.config import nearest
from jaxllm.core.packing import unpacked, wanted_arrays
from jaxllm.core.qarray import QArray
from jaxllm.errors import UnsupportedError, WeightsError
from jaxllm.zoo.packed import METHOD, PackedReader
from jaxllm.zoo.packed_blocks import mxfp4
from jaxllm.zoo.packed_bnb import bitsandbytes
from jaxllm.zoo.packed_ints import awq, gptq
from jaxllm.zoo.packed_scaled import compressed_tensors, fp8
from jaxllm.zoo.packed_source import Source
from jaxllm.zoo.reader import Reader

__all__ = ["METHODS", "open_packed"]


def _own(source: Source, config: Mapping[str, Any]) -> None:
    """Our own layout: each tensor's arrays beside each other, described in the config."""
    tensors = config.get("tensors")
    if not isinstance(tensors, dict):
        raise WeightsError(f"{source.where}: quantization_config has no tensors")
    for name, facts in tensors.items():
        arrays = [f"{name}.{field}" for field in wanted_arrays(facts, name)]
        if not source.have(*arrays):
            continue

        shape, turned = tuple(facts["shape"]), bool(facts.get("inputs_first"))
        shape = shape[::-1] if facts["inputs"] and not turned else shape
        shape = source.shape(f"{name}.values")[:-2] + shape
        source.inputs_first |= {name} if turned else set()
        source.add(name, shape, functools.partial(_own_leaf, source, name, facts), arrays)


def _own_leaf(source: Source, name: str, facts: Any) -> QArray:
    return unpacked(facts, lambda field: source.reader.read(f"{name}.{field}"), name)


METHODS: dict[str, Callable[[Source, Mapping[str, Any]], None]] = {
    METHOD: _own,
    "gptq": gptq,
    "awq": awq,
    "compressed-tensors": compressed_tensors,
    "fp8": fp8,
    "bitsandbytes": bitsandbytes,
    "mxfp4": mxfp4,
}
"""`quant_method` -> what finds a checkpoint's quantized tensors."""


def open_packed(reader: Reader, config: Any, where: str) -> PackedReader:
    """A reader that gives quantized tensors as packed leaves, under the names of plain ones.

    Args:
      reader: of the files.
      config: `quantization_config`.
      where: the config's name, for messages.

    Raises:
      UnsupportedError: a method or an option that is not read; WeightsError: tensors that are
        missing, damaged or do not fit, all at once.
    """
    if not isinstance(config, dict):
        raise WeightsError(f"{where}: quantization_config is {type(config).__name__}, no object")
    method = str(config.get("quant_method"))
    if method not in METHODS:
        raise UnsupportedError(
            f"{where}: quantization_config has quant_method {method!r}; {nearest(method, METHODS)}"
        )
    source = Source(reader, where)
    METHODS[method](source, config)
    source.finish()
    return PackedReader.over(source)
