"""GGUF files: a bounds-checked walk of the header, memory-mapped tensors, quick dequantising.

A file is magic, version, two counts, key/values, tensor infos, padding and the tensors' bytes.
Every count and length is held against the bytes that remain before it is used, because the
`gguf` package's own reader trusts them; that package serves to dequantise, imported on first use.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from mmap import mmap
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from jaxllm.errors import UnsupportedError, WeightsError
from jaxllm.zoo.reader import (
    Place,
    Stamp,
    TensorInfo,
    lfs_hint,
    lookup,
    map_array,
    map_file,
    max_header_bytes,
    num_elements,
    shown,
    stamp,
)

__all__ = ["GGUFReader", "block_sizes", "open_gguf", "readable_types"]

# ggml's number: name, elements a block, bytes a block
# fmt: off
_types = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4),
    27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}
# fmt: on
block_sizes: Mapping[str, tuple[int, int]] = MappingProxyType(
    {name: (elements, nbytes) for name, elements, nbytes in _types.values()}
)

_plain = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
_quantized = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
readable_types = (*_plain, *_quantized)

_kinds = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
_scalars = {kind: struct.Struct("<" + letter) for kind, letter in _kinds.items()}
_bool_kind, _string_kind, _array_kind, _uint32_kind = 7, 8, 9, 4
_least_bytes = {kind: code.size for kind, code in _scalars.items()}  # that a value can take
_least_bytes |= {_bool_kind: 1, _string_kind: 8, _array_kind: 12}
_least_pair_bytes, _least_tensor_bytes = 8 + 4 + 1, 8 + 4 + 4 + 8

_max_dims = 4
_max_nesting = 4
_chunk_elements = 2**17  # dequantised at a time: 0.5 MB of float32 and as small temporaries


@dataclass(frozen=True)
class GGUFReader:
    """An opened file; see `jaxllm.zoo.reader.Reader`. `dtype` is ggml's name, such as Q4_K."""

    path: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, TensorInfo] = field(repr=False)
    metadata: Mapping[str, Any] = field(repr=False)
    _places: Mapping[str, Place] = field(repr=False)

    def read(self, name: str) -> np.ndarray:
        """F32, F16 and BF16 as a read-only memory-mapped array, quantized types as float32.

        Raises:
            WeightsError: no such tensor, or the file changed since it was opened.
            UnsupportedError: a type outside `readable_types`.
        """
        info = lookup(self.tensors, name, self.path)
        if info.dtype in _plain:
            return map_array(self._places[name], _plain[info.dtype], info.shape)
        if info.dtype not in _quantized:
            raise UnsupportedError(
                f"{self.path}: tensor {shown(name)} has type {info.dtype}, which cannot be read; "
                f"supported: {', '.join(readable_types)}."
            )
        _, packed = self.raw(name)
        return _dequantize(packed, info)

    def leaf(self, name: str) -> Any:
        """A matrix of Q4_0, Q4_1 or Q8_0 as a `QArray`, [out, in] held; None for other types."""
        info = lookup(self.tensors, name, self.path)
        from jaxllm.zoo.gguf_blocks import packed_blocks, packed_types  # they bring jax

        if info.dtype not in packed_types or len(info.shape) != 2:
            return None
        return packed_blocks(*self.raw(name), info.shape)

    def raw(self, name: str) -> tuple[str, np.ndarray]:
        """ggml's type name and the packed bytes as read-only memory-mapped uint8 rows.

        A tensor `[..., n]` gives `[..., n // elements * nbytes]` with `block_sizes[type]`.
        """
        info = lookup(self.tensors, name, self.path)
        elements, nbytes = block_sizes[info.dtype]
        row = info.shape[-1] if info.shape else 1
        shape = (*info.shape[:-1], row // elements * nbytes)
        return info.dtype, map_array(self._places[name], np.uint8, shape)


def open_gguf(path: str | os.PathLike[str]) -> GGUFReader:
    """Open a GGUF file of version 2 or 3, little-endian, with its whole header checked.

    Raises:
        WeightsError: missing, truncated or damaged.
        UnsupportedError: another version or byte order.
    """
    file = stamp(Path(path))
    if file.size < 24:
        raise WeightsError(f"{file.path}: has {file.size} bytes; a GGUF header takes at least 24.")
    mapped, _ = map_file(file)
    with mapped:
        walk = _Walk(file, mapped)
        num_tensors, num_pairs = _read_counts(walk)
        metadata = _read_metadata(walk, num_pairs)
        found = [_read_tensor(walk) for _ in range(num_tensors)]
    tensors, places = _lay_out(file, walk.at, _alignment(file, metadata), found)
    return GGUFReader(
        path=file.path,
        files=(file.path,),
        tensors=MappingProxyType(tensors),
        metadata=MappingProxyType({key: value for key, (_, value) in metadata.items()}),
        _places=places,
    )


class _Walk:
    """A position in the header; no step leaves the file or the header's greatest length."""

    def __init__(self, file: Stamp, data: mmap):
        self.file, self.data, self.at = file, data, 0
        self.end = min(file.size, max_header_bytes)

    def fault(self, message: str) -> WeightsError:
        return WeightsError(f"{self.file.path}: {message}")

    def room(self, nbytes: int, what: str) -> None:
        """Refuse what cannot fit in the bytes that remain."""
        if nbytes > self.end - self.at:
            raise self.fault(
                f"{what} needs {nbytes} bytes at byte {self.at}, but the header can take only "
                f"{self.end - self.at} more: truncated or damaged."
            )

    def scalar(self, kind: int, what: str) -> Any:
        code = _scalars[kind]
        self.room(code.size, what)
        (value,) = code.unpack_from(self.data, self.at)
        self.at += code.size
        return value

    def text(self, what: str) -> str:
        return self.texts(1, what)[0]

    def texts(self, count: int, what: str) -> list[str]:
        """`count` strings; one loop without calls, for vocabularies have 10^5 of them."""
        data, at, end, length = self.data, self.at, self.end, _scalars[10].unpack_from
        found = []
        try:
            for _ in range(count):
                start = at + 8
                stop = start + length(data, at)[0] if start <= end else start
                if stop > end:
                    self.at = at
                    self.room(stop - at, f"{what}: a string")
                found.append(str(data[start:stop], "utf-8"))
                at = stop
        except UnicodeDecodeError as error:
            raise self.fault(f"{what}: the string at byte {at} is not UTF-8: {error}.") from error
        self.at = at
        return found

    def value(self, kind: int, what: str, depth: int = 0) -> Any:
        if kind == _string_kind:
            return self.text(what)
        if kind == _array_kind:
            return self.array(what, depth + 1)
        if kind == _bool_kind:
            return self.bools(1, what)[0]
        if kind not in _scalars:
            raise self.fault(f"{what} has value type {kind}; known are 0 to 12.")
        return self.scalar(kind, what)

    def array(self, what: str, depth: int) -> list[Any]:
        kind, count = self.scalar(_uint32_kind, what), self.scalar(10, what)
        if kind not in _least_bytes or depth > _max_nesting:
            raise self.fault(
                f"{what} is an array of value type {kind}, {depth} deep; known are types 0 to 12 "
                f"and {_max_nesting} deep."
            )
        self.room(count * _least_bytes[kind], f"{what}: an array of {count} values")
        if kind == _string_kind:
            return self.texts(count, what)
        if kind == _bool_kind:
            return self.bools(count, what)
        if kind == _array_kind:
            return [self.array(what, depth + 1) for _ in range(count)]
        code = np.dtype(_scalars[kind].format)
        numbers = np.frombuffer(self.data[self.at : self.at + count * code.itemsize], code)
        self.at += numbers.nbytes
        return numbers.tolist()

    def bools(self, count: int, what: str) -> list[bool]:
        self.room(count, what)
        raw = self.data[self.at : self.at + count]
        if raw.translate(None, b"\0\1"):
            raise self.fault(f"{what} has a boolean that is neither 0 nor 1.")
        self.at += count
        return list(map(bool, raw))


def _read_counts(walk: _Walk) -> tuple[int, int]:
    magic, version = walk.data[:4], int.from_bytes(walk.data[4:8], "little")
    if magic != b"GGUF":
        hint = lfs_hint(walk.data[:64])
        raise walk.fault(f"begins with {magic!r}; a GGUF file begins with b'GGUF'.{hint}")
    if version not in (2, 3):
        found = f"version {version}" if version & 0xFFFF else "big-endian"
        raise UnsupportedError(
            f"{walk.file.path}: is {found} GGUF; supported: versions 2 and 3, little-endian."
        )
    walk.at = 8
    num_tensors, num_pairs = walk.scalar(10, "the count"), walk.scalar(10, "the count")
    least = num_tensors * _least_tensor_bytes + num_pairs * _least_pair_bytes
    walk.room(least, f"a header of {num_tensors} tensors and {num_pairs} key/values")
    return num_tensors, num_pairs


def _read_metadata(walk: _Walk, num_pairs: int) -> dict[str, tuple[int, Any]]:
    """Value type and value by key."""
    metadata: dict[str, tuple[int, Any]] = {}
    for _ in range(num_pairs):
        key = walk.text("a key")
        if key in metadata:
            raise walk.fault(f"the key {shown(key)} stands twice; allowed is once.")
        what = f"the key {shown(key)}"
        kind = walk.scalar(_uint32_kind, what)
        metadata[key] = kind, walk.value(kind, what)
    return metadata


def _read_tensor(walk: _Walk) -> tuple[str, TensorInfo, int]:
    """Name, info and offset within the data section of the next tensor info."""
    name = walk.text("a tensor's name")
    what = f"tensor {shown(name)}"
    num_dims = walk.scalar(_uint32_kind, what)
    if num_dims > _max_dims:
        raise walk.fault(f"{what} has {num_dims} dimensions; allowed are at most {_max_dims}.")
    dims = [walk.scalar(10, what) for _ in range(num_dims)]
    shape = tuple(reversed(dims))  # ggml names the fastest dimension first
    kind, offset = walk.scalar(_uint32_kind, what), walk.scalar(10, what)
    if kind not in _types:
        raise walk.fault(f"{what} has type number {kind}; known: {', '.join(map(str, _types))}.")
    dtype, elements, nbytes = _types[kind]
    count = num_elements(shape)
    if count is None:
        raise walk.fault(f"{what} has shape {shape}, larger than any array can be.")
    if (shape[-1] if shape else 1) % elements:
        raise walk.fault(
            f"{what} has shape {shape}; rows of {dtype} must be a multiple of {elements} long."
        )
    return name, TensorInfo(shape, dtype, count // elements * nbytes), offset


def _alignment(file: Stamp, metadata: dict[str, tuple[int, Any]]) -> int:
    kind, alignment = metadata.get("general.alignment", (_uint32_kind, 32))
    if kind != _uint32_kind or alignment < 1 or alignment & (alignment - 1):
        raise WeightsError(
            f"{file.path}: general.alignment is {shown(alignment)} of value type {kind}; allowed "
            f"is a power of two of type {_uint32_kind} (uint32)."
        )
    return alignment


def _lay_out(
    file: Stamp, header_end: int, alignment: int, found: list[tuple[str, TensorInfo, int]]
) -> tuple[dict[str, TensorInfo], dict[str, Place]]:
    """Check that the tensors lie aligned, apart and inside the file, and place them."""
    start = -(-header_end // alignment) * alignment
    size = max(0, file.size - start)
    tensors: dict[str, TensorInfo] = {}
    places: dict[str, Place] = {}
    for name, info, offset in found:
        what = f"{file.path}: tensor {shown(name)}"
        if name in tensors:
            raise WeightsError(f"{what} stands twice; allowed is once.")
        if offset % alignment:
            raise WeightsError(f"{what} has offset {offset}; allowed: multiples of {alignment}.")
        if offset + info.nbytes > size:
            raise WeightsError(
                f"{what} takes {info.nbytes} bytes at offset {offset}, but only {size} bytes "
                "follow the header: truncated or damaged."
            )
        tensors[name], places[name] = info, Place(file, start + offset)
    covered, before = 0, ""
    for name in sorted(tensors, key=lambda name: (places[name].offset, tensors[name].nbytes)):
        if tensors[name].nbytes and places[name].offset < covered:
            raise WeightsError(f"{file.path}: tensors {before} and {shown(name)} overlap.")
        covered = max(covered, places[name].offset + tensors[name].nbytes)
        before = shown(name)
    return tensors, places


def _dequantize(packed: np.ndarray, info: TensorInfo) -> np.ndarray:
    """float32 values of packed rows, in chunks that stay in the cache.

    The package works on 16 rows at a time whatever their length, which made SmolLM2 four times
    slower; a chunk is handed to it as one long row.
    """
    import gguf.quants  # 0.1 s, and only quantized files need it

    kind = gguf.GGMLQuantizationType[info.dtype]
    elements, nbytes = block_sizes[info.dtype]
    blocks = packed.reshape(-1, nbytes)
    values = np.empty((len(blocks), elements), np.float32)
    step = _chunk_elements // elements
    with np.errstate(all="ignore"):  # damaged scales give inf and nan, as they stand in the file
        for i in range(0, len(blocks), step):
            chunk = blocks[i : i + step].reshape(1, -1)
            values[i : i + step] = gguf.quants.dequantize(chunk, kind).reshape(-1, elements)
    return values.reshape(info.shape)
