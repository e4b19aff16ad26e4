"""GGUF's blocks of 32 as packed leaves: the same integers and float16 scales, in another order.

Q4_0 is a float16 scale d and 16 bytes, byte j with code j below and j + 16 above: (code - 8) d.
Q4_1 has a float16 offset m beside d: code d + m. Q8_0 is d and 32 signed bytes.

Source: ggml-common.h and ggml-quants.c, https://github.com/ggml-org/ggml.
"""

from __future__ import annotations

import numpy as np

from jaxllm.core.qarray import QArray, value_dtype

__all__ = ["packed_blocks", "packed_types"]

packed_types = {"Q4_0": "int4", "Q4_1": "uint4", "Q8_0": "int8"}
_block = 32


def packed_blocks(kind: str, packed: np.ndarray, shape: tuple[int, ...]) -> QArray:
    """The leaf of a matrix.

    Args:
      kind: ggml's type, one of `packed_types`.
      packed: uint8 [out, bytes].
      shape: (out, in).
    """
    outputs, inputs = shape
    format = packed_types[kind]
    halves = 2 if kind == "Q4_1" else 1
    blocks = packed.reshape(outputs, inputs // _block, -1)
    heads = np.ascontiguousarray(blocks[..., : 2 * halves]).view(np.float16)
    codes = blocks[..., 2 * halves :]
    if kind == "Q8_0":
        values = codes.view(np.int8).reshape(shape)
    else:
        low, high = (codes & 15).astype(np.int8), (codes >> 4).astype(np.int8)
        both = np.concatenate([low, high], axis=-1).reshape(shape)
        values = (both - 8 if kind == "Q4_0" else both).astype(value_dtype(format))
    offset = heads[..., 1] if kind == "Q4_1" else None
    shape = (inputs, outputs)
    return QArray(values, heads[..., 0], offset, format=format, shape=shape, group=_block)
