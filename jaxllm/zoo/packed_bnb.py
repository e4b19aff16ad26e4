"""bitsandbytes NF4 and FP4: codes two to a byte (the first above), blocks along the flat matrix.

Source: bitsandbytes' QuantState.as_dict(packed=True): beside `weight` lie `absmax`, `quant_map`,
with double quantization `nested_absmax` and `nested_quant_map`, and a JSON as bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxllm.core.qarray import QArray, code_table, value_dtype
from jaxllm.errors import UnsupportedError, WeightsError
from jaxllm.zoo.packed_source import Source

__all__ = ["bitsandbytes"]

_FORMATS = {"nf4": "nf4", "fp4": "bnb_fp4"}


def _facts(source: Source, name: str) -> dict[str, Any]:
    """The JSON of a tensor's quantization, checked.

    Raises:
      WeightsError: it is damaged.
    """
    try:
        facts = json.loads(bytes(np.asarray(source.reader.read(name))).decode())
        shape = facts["shape"]
        sound = facts["quant_type"] in _FORMATS and len(shape) == 2
        sound = sound and all(type(n) is int and n > 0 for n in (*shape, facts["blocksize"]))
    except (ValueError, KeyError, TypeError, UnicodeDecodeError):
        sound, facts = False, {}
    if not sound:
        raise WeightsError(f"{name}: holds no JSON of a quantized matrix")
    return facts


def bitsandbytes(source: Source, config: Mapping[str, Any]) -> None:
    """Leaves of a bitsandbytes checkpoint of four bits.

    Raises:
      UnsupportedError: eight bits, or blocks that run over the ends of rows.
    """
    if config.get("load_in_8bit") or not config.get("load_in_4bit", True):
        raise UnsupportedError(f"{source.where}: bitsandbytes of 8 bits; supported are 4 bits")
    for kind in _FORMATS:
        for name in source.names(f".quant_state.bitsandbytes__{kind}"):
            _tensor(source, name, f"{name}.quant_state.bitsandbytes__{kind}")


def _tensor(source: Source, name: str, state: str) -> None:
    facts = _facts(source, state)
    (outputs, inputs), block = facts["shape"], facts["blocksize"]
    if inputs % block:
        raise UnsupportedError(
            f"{name}: blocks of {block} run over the ends of rows of {inputs} inputs; "
            "supported are block sizes that divide them"
        )
    nested = "nested_blocksize" in facts
    used = [name, state, f"{name}.absmax", f"{name}.quant_map"]
    blocks = outputs * inputs // block
    size = (outputs * inputs + 1) // 2
    fits = source.shaped(name, (size, 1), (1, size))
    fits &= source.shaped(used[2], (blocks,))
    fits &= source.shaped(used[3], (16,))
    if nested:
        used += [f"{name}.nested_absmax", f"{name}.nested_quant_map"]
        fits &= source.shaped(used[4], (-(-blocks // facts["nested_blocksize"]),))
        fits &= source.shaped(used[5], (256,))
    if fits:
        make = lambda: _leaf(source, name, facts, nested)  # noqa: E731
        source.add(name, (outputs, inputs), make, used)


def _same_table(source: Source, name: str, format: str) -> None:
    if not np.allclose(source.reader.read(name), code_table(format), atol=1e-6):
        raise UnsupportedError(f"{name}: is not the published table of {format}")


def _leaf(source: Source, name: str, facts: Mapping[str, Any], nested: bool) -> QArray:
    (outputs, inputs), block = facts["shape"], facts["blocksize"]
    format = _FORMATS[facts["quant_type"]]
    _same_table(source, f"{name}.quant_map", format)
    packed = np.asarray(source.reader.read(name)).reshape(-1)
    codes = np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1)[: outputs * inputs]
    values = codes.reshape(outputs, inputs).astype(value_dtype(format))
    absmax = source.reader.read(f"{name}.absmax").reshape(outputs, inputs // block)
    scale: Any = _nested(source, name, absmax, facts) if nested else absmax
    return QArray(values, scale, format=format, shape=(inputs, outputs), group=block)


def _nested(source: Source, name: str, codes: np.ndarray, facts: Mapping[str, Any]) -> Any:
    """Scales of scales: packed where blocks of them are whole rows or parts of a row, else floats.

    (256 scales of rows with 9 each cut rows in two: one number of each scale's own is as large as
    the scale.)
    """
    _same_table(source, f"{name}.nested_quant_map", "dynamic8")
    outer = source.reader.read(f"{name}.nested_absmax").astype(np.float32)
    outputs, groups = codes.shape
    size = facts["nested_blocksize"]
    offset = np.full((1, 1), facts["nested_offset"], np.float32)
    fields = {"format": "dynamic8", "shape": (groups, outputs)}
    if groups % size == 0:
        return QArray(codes, outer.reshape(outputs, -1), offset, group=size, **fields)
    if size % groups == 0:
        rows = size // groups
        return QArray(codes, outer[:, None], offset, group=groups, rows=rows, **fields)
    each = np.repeat(outer, size)[: codes.size].reshape(codes.shape)
    return code_table("dynamic8")[codes] * each + offset
