"""compressed-tensors (int8, fp8, packed int4) and block-scaled fp8: values with scales beside them.

Sources: the compressed-tensors package (formats naive-, int-, float- and pack-quantized), and
transformers' FineGrainedFP8 (`weight_scale_inv` a scale of each block, despite its name).
Activations stay in the compute dtype: schemes that would round them are read for their weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxllm.core.logging import log
from jaxllm.core.qarray import QArray, value_dtype
from jaxllm.errors import UnsupportedError, WeightsError
from jaxllm.zoo.packed_source import Source, nibbles

__all__ = ["compressed_tensors", "fp8"]

_FORMATS = ("naive-quantized", "int-quantized", "float-quantized", "pack-quantized")
_DTYPES = {"I8": "int8", "F8_E4M3": "fp8"}


def _weights_of(config: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """How the one group of layers has its weights quantized.

    Raises:
      UnsupportedError: several groups that differ, or another format.
    """
    format = config.get("format")
    if format not in _FORMATS:
        raise UnsupportedError(
            f"{where}: compressed-tensors format is {format!r}; supported: {', '.join(_FORMATS)}"
        )
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise WeightsError(f"{where}: quantization_config has no config_groups")
    weights = [group.get("weights") for group in groups.values() if isinstance(group, dict)]
    if any(w != weights[0] for w in weights) or not isinstance(weights[0], dict):
        raise UnsupportedError(f"{where}: config_groups quantize weights in different ways")
    if any(isinstance(g, dict) and g.get("input_activations") for g in groups.values()):
        log.info("%s: activations are not rounded; the weights are read alone", where)
    return weights[0]


def _blocks(source: Source, weights: Mapping[str, Any], shape: tuple[int, int]) -> tuple[int, int]:
    """(rows, group) of one scale.

    Raises:
      UnsupportedError: a strategy that is not read; WeightsError: an impossible group.
    """
    strategy, (outputs, inputs) = weights.get("strategy"), shape
    if strategy == "tensor":
        return outputs, inputs
    if strategy == "channel":
        return 1, inputs
    if strategy == "group":
        size = source.group(weights)
        return 1, inputs if size == -1 else size
    if strategy == "block":
        block = weights.get("block_structure")
        if not (isinstance(block, list) and len(block) == 2 and all(b > 0 for b in block)):
            raise WeightsError(f"{source.where}: block_structure is {block!r}; write two numbers")
        return block[0], block[1]
    raise UnsupportedError(
        f"{source.where}: strategy is {strategy!r}; supported: tensor, channel, group, block"
    )


def _scale_shapes(shape: tuple[int, int], blocks: tuple[int, int]) -> list[tuple[int, ...]]:
    high, wide = (-(-n // b) for n, b in zip(shape, blocks, strict=True))
    return [(high, wide), *([(high,)] if wide == 1 else []), *([()] if high == wide == 1 else [])]


def _scaled_leaf(
    source: Source, values: str, scale: str, blocks: tuple[int, int], zero: str | None = None
) -> Any:
    def make() -> QArray:
        array = source.reader.read(values)
        shape = tuple(-(-n // b) for n, b in zip(array.shape, blocks, strict=True))
        found = source.reader.read(scale).reshape(shape)
        offset = None
        if zero is not None:
            points = source.reader.read(zero).reshape(shape).astype(np.float32)
            offset = -points * found.astype(np.float32) if points.any() else None
        return QArray(
            array,
            found,
            offset,
            format=_DTYPES[source.reader.tensors[values].dtype],
            shape=array.shape[::-1],
            group=blocks[1],
            rows=blocks[0],
        )

    return make


def compressed_tensors(source: Source, config: Mapping[str, Any]) -> None:
    """Leaves of a compressed-tensors checkpoint."""
    weights = _weights_of(config, source.where)
    for name in source.names(".weight_packed"):
        _packed_int4(source, name, weights)
    for name in source.names(".weight_scale"):
        value, scale, zero = f"{name}.weight", f"{name}.weight_scale", f"{name}.weight_zero_point"
        if f"{name}.weight_packed" in source.reader.tensors or not source.have(value):
            continue
        info = source.reader.tensors[value]
        if info.dtype not in _DTYPES or len(info.shape) != 2:
            source.problem(f"{value} is {info.dtype} {info.shape}, not a matrix of I8 or F8_E4M3")
            continue
        shape = (info.shape[0], info.shape[1])
        blocks = _blocks(source, weights, shape)
        used = [value, scale, f"{name}.input_scale", f"{name}.input_zero_point"]
        fits = source.shaped(scale, *_scale_shapes(shape, blocks))
        has_zero = zero in source.reader.tensors
        if has_zero:
            used.append(zero)
            fits &= source.shaped(zero, *_scale_shapes(shape, blocks))
        if fits:
            make = _scaled_leaf(source, value, scale, blocks, zero if has_zero else None)
            source.add(value, shape, make, used)


def _packed_int4(source: Source, name: str, weights: Mapping[str, Any]) -> None:
    """A matrix of four-bit integers plus 8, eight to a word along the inputs."""
    source.number(weights, "num_bits", (4,), None)
    packed, scale = f"{name}.weight_packed", f"{name}.weight_scale"
    sizes, zero = f"{name}.weight_shape", f"{name}.weight_zero_point"
    if not source.have(packed, scale, sizes) or not source.shaped(sizes, (2,)):
        return
    outputs, inputs = (int(n) for n in source.reader.read(sizes))
    rows, group = _blocks(source, weights, (outputs, inputs))
    fits = source.shaped(packed, (outputs, -(-inputs // 8)))
    if rows != 1 or group < 1 or inputs % group:
        source.problem(f"{packed}: blocks of {rows} x {group} do not fit {outputs} x {inputs}")
        return
    fits &= source.shaped(scale, (outputs, inputs // group))
    has_zero = zero in source.reader.tensors
    if has_zero:
        fits &= source.shaped(zero, (-(-outputs // 8), inputs // group))
    if not fits:
        return

    def make() -> QArray:
        codes = nibbles(source.reader.read(packed), 1)[:, :inputs]
        found, offset, format = source.reader.read(scale), None, "int4"
        if has_zero:
            zeros = nibbles(source.reader.read(zero), 0)[:outputs].astype(np.float32)
            offset, format = -zeros * found.astype(np.float32), "uint4"
        values = (codes - 8 if format == "int4" else codes).astype(value_dtype(format))
        shape = (inputs, outputs)
        return QArray(values, found, offset, format=format, shape=shape, group=group)

    used = [packed, scale, sizes, *([zero] if has_zero else [])]
    source.add(f"{name}.weight", (outputs, inputs), make, used)


def fp8(source: Source, config: Mapping[str, Any]) -> None:
    """Leaves of a checkpoint of fp8 with a scale for each block."""
    block = config.get("weight_block_size")
    if not (isinstance(block, list) and len(block) == 2 and all(type(b) is int for b in block)):
        raise UnsupportedError(
            f"{source.where}: weight_block_size is {block!r}; supported is [rows, inputs]"
        )
    if min(block) < 1:
        raise WeightsError(f"{source.where}: weight_block_size is {block}; both are at least 1")
    for name in source.names(".weight_scale_inv"):
        value, scale = f"{name}.weight", f"{name}.weight_scale_inv"
        if not source.have(value):
            continue
        info = source.reader.tensors[value]
        if info.dtype != "F8_E4M3" or len(info.shape) != 2:
            source.problem(f"{value} is {info.dtype} {info.shape}, not a matrix of F8_E4M3")
            continue
        shape = (info.shape[0], info.shape[1])
        if source.shaped(scale, _scale_shapes(shape, (block[0], block[1]))[0]):
            make = _scaled_leaf(source, value, scale, (block[0], block[1]))
            source.add(value, shape, make, [value, scale])
