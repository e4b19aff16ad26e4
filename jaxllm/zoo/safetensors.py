"""Safetensors checkpoints, one file or sharded: bounds-checked reading, streaming atomic writing.

A file is eight bytes of header length (little-endian), a JSON header `{name: {dtype, shape,
data_offsets}}` and the tensors' bytes, which must cover the rest without holes.

Source: https://github.com/huggingface/safetensors (format section of the README).
"""

import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, NoReturn

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
from jaxllm.zoo.safetensors_writer import (
    TensorSource,
    array_info,
    index_name,
    numpy_dtypes,
    single_name,
    write_safetensors,
)

__all__ = [
    "SafetensorsReader",
    "TensorSource",
    "array_info",
    "numpy_dtypes",
    "open_safetensors",
    "write_safetensors",
]

_packed_bits = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}  # known to the format, no numpy type
_bits = {name: 8 * dtype.itemsize for name, dtype in numpy_dtypes.items()} | _packed_bits

_max_dims = 32


@dataclass(frozen=True)
class SafetensorsReader:
    """An opened checkpoint; see `jaxllm.zoo.reader.Reader`. `dtype` is safetensors' name."""

    path: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, TensorInfo] = field(repr=False)
    metadata: Mapping[str, Any] = field(repr=False)
    _places: Mapping[str, Place] = field(repr=False)

    def read(self, name: str) -> np.ndarray:
        """The tensor as a read-only memory-mapped array in its stored type.

        Raises:
            WeightsError: no such tensor, or the file changed since it was opened.
            UnsupportedError: a 4- or 6-bit float, which numpy cannot hold.
        """
        info = lookup(self.tensors, name, self.path)
        if info.dtype not in numpy_dtypes:
            raise UnsupportedError(
                f"{self.path}: tensor {shown(name)} has dtype {info.dtype}, which cannot be read; "
                f"supported: {', '.join(numpy_dtypes)}."
            )
        return map_array(self._places[name], numpy_dtypes[info.dtype], info.shape)


def open_safetensors(path: str | os.PathLike[str]) -> SafetensorsReader:
    """Open a .safetensors file, or a directory with model.safetensors or its index.

    The whole header is checked before anything is read. In a directory, model.safetensors comes
    before the index, as in transformers. `metadata` is the `__metadata__` of the file; of shards
    the union, in which the first shard with a key decides.

    Raises:
        WeightsError: missing, truncated or damaged, or index and shards disagree.
    """
    path = Path(path)
    if not os.path.isdir(path):
        return _join(path, [_read_header(path)])
    if (path / single_name).exists():
        return _join(path / single_name, [_read_header(path / single_name)])
    if not (path / index_name).exists():
        there = sorted(item.name for item in path.glob("*.safetensors"))
        found = f"; found {shown(there)}: give that file" if there else ""
        raise WeightsError(f"{path}: holds neither {single_name} nor {index_name}{found}.")
    weight_map = _read_index(path / index_name)
    shards = [_read_header(path / name) for name in sorted(set(weight_map.values()))]
    _check_index(path / index_name, weight_map, shards)
    return _join(path, shards)


@dataclass(frozen=True)
class _Header:
    file: Stamp
    tensors: dict[str, TensorInfo]
    offsets: dict[str, int]  # from the start of the file
    metadata: dict[str, str]


def _join(path: Path, headers: Sequence[_Header]) -> SafetensorsReader:
    tensors: dict[str, TensorInfo] = {}
    places: dict[str, Place] = {}
    metadata: dict[str, str] = {}
    for header in headers:
        tensors |= header.tensors
        places |= {name: Place(header.file, at) for name, at in header.offsets.items()}
        metadata = header.metadata | metadata
    return SafetensorsReader(
        path=path,
        files=tuple(header.file.path for header in headers),
        tensors=MappingProxyType(tensors),
        metadata=MappingProxyType(metadata),
        _places=places,
    )


def _read_header(path: Path) -> _Header:
    file = stamp(path)
    if file.size < 8:
        raise WeightsError(f"{path}: has {file.size} bytes; the header's length alone takes 8.")
    mapped, _ = map_file(file)
    with mapped:
        (length,) = struct.unpack_from("<Q", mapped)
        bound = min(file.size - 8, max_header_bytes)
        if not 2 <= length <= bound:
            raise WeightsError(
                f"{path}: the header's length is {length} bytes; allowed are 2 to {bound} in a "
                f"file of {file.size} bytes: truncated or not safetensors.{lfs_hint(mapped[:64])}"
            )
        raw = mapped[8 : 8 + length]
    if raw[:1] != b"{":
        raise WeightsError(f"{path}: the header begins with {raw[:1]!r}; allowed is b'{{'.")
    entries = _load_json(raw, f"{path}: the header")
    metadata = entries.pop("__metadata__", {})
    if not _is_text_map(metadata):
        raise WeightsError(f"{path}: __metadata__ must map text to text, got {shown(metadata)}.")
    return _lay_out(file, 8 + length, entries, metadata)


def _lay_out(file: Stamp, start: int, entries: dict[str, Any], metadata: dict) -> _Header:
    """Check that the tensors cover the bytes after the header exactly, and place them."""
    size = file.size - start
    spans = []
    for name, entry in entries.items():
        info, begin = _parse_entry(f"{file.path}: tensor {shown(name)}", entry, size)
        spans.append((begin, begin + info.nbytes, name, info))
    spans.sort(key=lambda span: span[:2])
    covered, before = 0, "the header"
    for begin, end, name, _ in spans:
        if begin != covered:
            fault = "overlaps" if begin < covered else "leaves a hole after"
            raise WeightsError(
                f"{file.path}: tensor {shown(name)} begins at byte {begin} and {fault} {before}, "
                f"which ends at {covered}; tensors must lie end to end."
            )
        covered, before = end, shown(name)
    if covered != size:
        raise WeightsError(
            f"{file.path}: the tensors cover {covered} of the {size} bytes after the header; "
            "they must cover all: truncated header or foreign data."
        )
    return _Header(
        file=file,
        tensors={name: info for _, _, name, info in spans},
        offsets={name: start + begin for begin, _, name, _ in spans},
        metadata=metadata,
    )


def _parse_entry(where: str, entry: Any, size: int) -> tuple[TensorInfo, int]:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise WeightsError(f"{where}: needs dtype, shape and data_offsets, got {shown(entry)}.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _bits:
        raise WeightsError(f"{where}: has dtype {shown(dtype)}; known: {', '.join(_bits)}.")
    if not _is_counts(shape) or len(shape) > _max_dims:
        allowed = f"a list of at most {_max_dims} integers from 0 to 2^63-1"
        raise WeightsError(f"{where}: has shape {shown(shape)}; allowed is {allowed}.")
    if not _is_counts(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= size:
        raise WeightsError(
            f"{where}: has data_offsets {shown(offsets)}; allowed is [begin, end] with "
            f"0 <= begin <= end <= {size}, the bytes after the header."
        )
    begin, end = offsets
    count = num_elements(shape)
    if count is None or count * _bits[dtype] != 8 * (end - begin):
        raise WeightsError(
            f"{where}: {dtype} of shape {shown(shape)} does not fill the {end - begin} bytes of "
            f"its data_offsets {shown(offsets)}."
        )
    return TensorInfo(tuple(shape), dtype, end - begin), begin


def _read_index(path: Path) -> dict[str, str]:
    file = stamp(path)
    if not 2 <= file.size <= max_header_bytes:
        raise WeightsError(f"{path}: has {file.size} bytes; allowed are 2 to {max_header_bytes}.")
    mapped, _ = map_file(file)
    with mapped:
        index = _load_json(mapped[:], f"{path}: the index")
    weight_map = index.get("weight_map")
    if not _is_text_map(weight_map) or not weight_map:
        raise WeightsError(f"{path}: weight_map must map tensors to files, got {shown(weight_map)}")
    for name, shard in weight_map.items():
        parts = PurePosixPath(shard).parts
        if not parts or parts[0] == "/" or ".." in parts or "\\" in shard or "\0" in shard:
            raise WeightsError(
                f"{path}: tensor {shown(name)} is in {shown(shard)}; allowed are files inside the "
                "directory of the index."
            )
    return weight_map


def _check_index(path: Path, weight_map: dict[str, str], shards: Sequence[_Header]) -> None:
    """The index and the shards must name the same tensors, each in one shard."""
    found: dict[str, Path] = {}
    for shard in shards:
        for name in shard.tensors:
            if name in found:
                raise WeightsError(
                    f"{path}: tensor {shown(name)} stands in {found[name].name} and in "
                    f"{shard.file.path.name}; allowed is one shard."
                )
            found[name] = shard.file.path
    for name in {**weight_map, **found}:
        said = path.parent / weight_map[name] if name in weight_map else None
        if said != found.get(name):
            raise WeightsError(
                f"{path}: tensor {shown(name)} is in {_name(found.get(name))}, but the index says "
                f"{_name(said)}; index and shards must agree."
            )


def _name(path: Path | None) -> str:
    return "no shard" if path is None else path.name


def _load_json(raw: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
    except (ValueError, RecursionError) as error:
        fault = shown(str(error), 160)
        raise WeightsError(f"{what} is not JSON in UTF-8 without duplicates: {fault}.") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{what} must be a JSON object, got {shown(value)}.")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the name {shown(twice)} stands twice")
    return unique


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _is_text_map(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())
