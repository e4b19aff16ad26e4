"""MXFP4 experts: E2M1 codes two to a byte (the first below), 32 of them under a power of two.

Source: transformers' Mxfp4 integration: `X_blocks` [E, out, in / 32, 16] and `X_scales`
[E, out, in / 32] of exponents plus 127, where the plain tensor is X [E, in, out].
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxllm.core.qarray import QArray, value_dtype
from jaxllm.zoo.packed_source import Source

__all__ = ["mxfp4"]

_block = 32


def mxfp4(source: Source, config: Mapping[str, Any]) -> None:
    """Leaves of a checkpoint with experts in MXFP4."""
    del config
    for name in source.names("_blocks"):
        blocks, scales = f"{name}_blocks", f"{name}_scales"
        shape = source.shape(blocks)
        if len(shape) != 4 or shape[-1] != _block // 2:
            source.problem(f"{blocks} has shape {shape}, not [experts, out, in / 32, 16]")
        elif source.shaped(scales, shape[:-1]):
            experts, outputs, groups = shape[:-1]
            make = functools.partial(_leaf, source, blocks, scales)
            source.add(name, (experts, groups * _block, outputs), make, [blocks, scales])
            source.inputs_first.add(name)


def _leaf(source: Source, blocks: str, scales: str) -> QArray:
    packed = source.reader.read(blocks)
    codes = np.stack([packed & 15, packed >> 4], axis=-1)
    experts, outputs, groups = packed.shape[:-1]
    values = codes.reshape(experts, outputs, groups * _block).astype(value_dtype("mxfp4"))
    exponents = np.ascontiguousarray(source.reader.read(scales)).view(ml_dtypes.float8_e8m0fnu)
    shape = (groups * _block, outputs)
    return QArray(values, exponents, format="mxfp4", shape=shape, group=_block)
