"""GPTQ and AWQ: integers of four bits (GPTQ: or eight) in 32-bit words, with integer zero points.

Sources: AutoGPTQ's QuantLinear (`qweight` [in / 8, out], `qzeros` [groups, out / 8], one less than
the zero point in the first version) and AutoAWQ's WQLinear_GEMM (`qweight` [in, out / 8], both
packed in the order 0 2 4 6 1 3 5 7).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxllm.core.qarray import QArray, value_dtype
from jaxllm.errors import UnsupportedError, WeightsError
from jaxllm.zoo.packed_source import Source, nibbles

__all__ = ["awq", "gptq"]

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def _bytes(words: np.ndarray, axis: int) -> np.ndarray:
    """Four codes of each 32-bit word, along a dim."""
    words = np.ascontiguousarray(words).view(np.uint32)
    codes = np.stack([(words >> np.uint32(8 * j)) & np.uint32(255) for j in range(4)], axis + 1)
    shape = list(words.shape)
    shape[axis] *= 4
    return codes.astype(np.uint8).reshape(shape)


def _leaf(codes: np.ndarray, zeros: np.ndarray, scale: np.ndarray, bits: int) -> dict[str, Any]:
    """Fields of a leaf from codes [in, out] and zero points and scales [groups, out]."""
    middle = 1 << (bits - 1)
    scale = np.ascontiguousarray(scale.T)
    fields: dict[str, Any] = {"scale": scale, "group": len(codes) // len(zeros)}
    fields["shape"] = codes.shape
    shift = 0
    if bits == 8 or (zeros == middle).all():
        shift = middle
        fields["format"] = f"int{bits}"
    else:
        fields["format"] = "uint4"
    if not (zeros == shift).all():
        fields["offset"] = (shift - zeros.T.astype(np.float32)) * scale.astype(np.float32)
    dtype = np.int8 if bits == 8 else value_dtype(fields["format"])
    fields["values"] = np.ascontiguousarray((codes.astype(np.int16) - shift).T.astype(dtype))
    return fields


def _order(index: np.ndarray, num_groups: int, name: str) -> np.ndarray | None:
    """The inputs group by group, or None where they lie so already.

    Raises:
      WeightsError: an index that is no group's, or groups of different sizes.
    """
    size = len(index) // num_groups
    if (index < 0).any() or (index >= num_groups).any():
        worst = index[(index < 0) | (index >= num_groups)][0]
        raise WeightsError(f"{name}: holds {worst}; groups are 0 to {num_groups - 1}")
    if np.array_equal(index, np.arange(len(index)) // size):
        return None
    if (np.bincount(index, minlength=num_groups) != size).any():
        raise WeightsError(f"{name}: groups have different sizes; each must have {size} inputs")
    return np.argsort(index, kind="stable").astype(np.int32)


def gptq(source: Source, config: Mapping[str, Any]) -> None:
    """Leaves of a GPTQ checkpoint, act-order included."""
    bits = source.number(config, "bits", (4, 8), None)
    size = source.group(config)
    version = config.get("checkpoint_format", "gptq")
    if version not in ("gptq", "gptq_v2"):
        raise UnsupportedError(
            f"{source.where}: checkpoint_format is {version!r}; supported: gptq, gptq_v2"
        )
    pack = 32 // bits
    for name in source.names(".qweight"):
        parts = [f"{name}.{part}" for part in ("qweight", "qzeros", "scales")]
        if not source.have(*parts):
            continue
        if len(source.shape(parts[0])) != 2:
            source.problem(f"{parts[0]} has shape {source.shape(parts[0])}, not [in, out]")
            continue
        inputs, outputs = source.shape(parts[0])[0] * pack, source.shape(parts[0])[1]
        groups = -(-inputs // size) if size > 0 else 1
        fits = source.shaped(parts[1], (groups, outputs // pack))
        fits &= source.shaped(parts[2], (groups, outputs))
        if f"{name}.g_idx" in source.reader.tensors:
            parts.append(f"{name}.g_idx")
            fits &= source.shaped(parts[3], (inputs,))
        if inputs % groups:
            source.problem(f"{parts[0]}: {groups} groups do not divide {inputs} inputs")
            fits = False
        if fits:
            make = _gptq_leaf(source, parts, bits, int(version == "gptq"))
            source.add(f"{name}.weight", (outputs, inputs), make, parts)


def _gptq_leaf(source: Source, parts: list[str], bits: int, less: int) -> Any:
    def make() -> QArray:
        arrays = [source.reader.read(part) for part in parts]
        unpack = nibbles if bits == 4 else _bytes
        codes, zeros = unpack(arrays[0], 0), unpack(arrays[1], 1).astype(np.int16) + less
        order = _order(arrays[3], len(zeros), parts[3]) if len(arrays) > 3 else None
        if order is not None:
            codes = codes[order]
        return QArray(order=order, **_leaf(codes, zeros, arrays[2], bits))

    return make


def awq(source: Source, config: Mapping[str, Any]) -> None:
    """Leaves of an AWQ checkpoint of the GEMM kind."""
    source.number(config, "bits", (4,), None)
    size = source.group(config)
    version = str(config.get("version", "gemm")).lower()
    if version != "gemm":
        raise UnsupportedError(f"{source.where}: version is {version!r}; supported: gemm")
    for name in source.names(".qweight"):
        parts = [f"{name}.{part}" for part in ("qweight", "qzeros", "scales")]
        if not source.have(*parts):
            continue
        if len(source.shape(parts[0])) != 2:
            source.problem(f"{parts[0]} has shape {source.shape(parts[0])}, not [in, out / 8]")
            continue
        inputs, outputs = source.shape(parts[0])[0], source.shape(parts[0])[1] * 8
        groups = -(-inputs // size) if size > 0 else 1
        fits = source.shaped(parts[1], (groups, outputs // 8))
        fits &= source.shaped(parts[2], (groups, outputs))
        if inputs % groups:
            source.problem(f"{parts[0]}: {groups} groups do not divide {inputs} inputs")
            fits = False
        if fits:
            source.add(f"{name}.weight", (outputs, inputs), _awq_leaf(source, parts), parts)


def _awq_leaf(source: Source, parts: list[str]) -> Any:
    def make() -> QArray:
        words, zero_words, scale = (source.reader.read(part) for part in parts)
        codes, zeros = nibbles(words, 1, _AWQ_ORDER), nibbles(zero_words, 1, _AWQ_ORDER)
        return QArray(**_leaf(codes, zeros, scale, 4))

    return make
