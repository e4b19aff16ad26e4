"""Writing safetensors checkpoints: streaming, sharded, all or nothing; and the format's dtypes.

Import these names from `jaxllm.zoo.safetensors`.
"""

import contextlib
import errno
import json
import math
import os
import re
import secrets
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from jaxllm.errors import CapacityError, ConfigError, ShapeError, UnsupportedError
from jaxllm.zoo.reader import TensorInfo, shown

single_name = "model.safetensors"
index_name = "model.safetensors.index.json"

numpy_dtypes: Mapping[str, np.dtype] = MappingProxyType(
    {
        "BOOL": np.dtype(np.bool_),
        "U8": np.dtype(np.uint8),
        "I8": np.dtype(np.int8),
        "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
        "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
        "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
        "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
        "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
        "U16": np.dtype("<u2"),
        "I16": np.dtype("<i2"),
        "F16": np.dtype("<f2"),
        "BF16": np.dtype(ml_dtypes.bfloat16),
        "U32": np.dtype("<u4"),
        "I32": np.dtype("<i4"),
        "F32": np.dtype("<f4"),
        "U64": np.dtype("<u8"),
        "I64": np.dtype("<i8"),
        "F64": np.dtype("<f8"),
        "C64": np.dtype("<c8"),
    }
)
_dtype_names = {dtype: name for name, dtype in numpy_dtypes.items()}

_chunk_bytes = 64 * 2**20  # written at a time: bounds the copy of an array that is not contiguous
_weight_files = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")

type TensorSource = tuple[str, TensorInfo, Callable[[], np.ndarray]]
type _Placer = Callable[[str], Path]


def array_info(array: np.ndarray) -> TensorInfo:
    """The `TensorInfo` under which `write_safetensors` stores this array.

    Raises:
        UnsupportedError: safetensors has no name for the dtype.
    """
    name = _dtype_names.get(array.dtype.newbyteorder("<"))
    if name is None:
        raise UnsupportedError(
            f"dtype {array.dtype} cannot be stored; supported: {', '.join(numpy_dtypes)}."
        )
    return TensorInfo(tuple(array.shape), name, array.nbytes)


def write_safetensors(
    directory: str | os.PathLike[str],
    tensors: Iterable[TensorSource],
    *,
    metadata: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> tuple[Path, ...]:
    """Write tensors in the Hugging Face layout, one tensor in memory at a time, all or nothing.

    A directory that holds a sharded checkpoint is refused: shards cannot be replaced atomically.

    Args:
        tensors: name, shape and type, and the function that makes the array, called once.
        metadata: text to text, stored in every file; transformers wants {"format": "pt"}.
        max_shard_bytes: of tensor data in a file; a larger tensor gets a shard of its own.

    Returns:
        The files: model.safetensors, or the shards and then the index.

    Raises:
        ConfigError: bad metadata or shard size, or the directory cannot take the checkpoint.
        ShapeError: a function's array is not what its `TensorInfo` says.
        CapacityError: the disk is full; nothing is left behind.
    """
    directory, entries, metadata = Path(directory), list(tensors), dict(metadata or {})
    _check_entries(entries, metadata, max_shard_bytes)
    shards = _split(entries, max_shard_bytes)
    count = len(shards)
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    names = [single_name] if count == 1 else names
    with _disk(directory):
        directory.mkdir(parents=True, exist_ok=True)
        _refuse_mixture(directory, single=count == 1)
    with _all_or_nothing(directory) as place:
        for name, shard in zip(names, shards, strict=True):
            _write_shard(place(name), shard, metadata)
        if count > 1:
            _write_file(place(index_name), [_index(names, shards)])
            names.append(index_name)
    return tuple(directory / name for name in names)


def _index(names: Sequence[str], shards: Sequence[Sequence[TensorSource]]) -> bytes:
    weight_map = {e[0]: name for name, shard in zip(names, shards, strict=True) for e in shard}
    total = sum(info.nbytes for shard in shards for _, info, _ in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return json.dumps(index, indent=2).encode()


def _check_entries(entries: Sequence[TensorSource], metadata: dict, max_shard_bytes: int) -> None:
    if max_shard_bytes < 1:
        raise ConfigError(f"max_shard_bytes is {max_shard_bytes}; allowed is 1 or more.")
    if not all(isinstance(text, str) for pair in metadata.items() for text in pair):
        raise ConfigError(f"metadata must map text to text, got {shown(metadata)}.")
    seen = {"__metadata__"}
    for name, info, _ in entries:
        if name in seen:
            raise ConfigError(f"the tensor name {shown(name)} is given twice or reserved.")
        seen.add(name)
        dtype = numpy_dtypes.get(info.dtype)
        if dtype is None:
            raise UnsupportedError(
                f"tensor {shown(name)} has dtype {shown(info.dtype)}; supported: "
                f"{', '.join(numpy_dtypes)}."
            )
        if math.prod(info.shape) * dtype.itemsize != info.nbytes:
            raise ShapeError(f"tensor {shown(name)}: nbytes does not fit shape and dtype: {info}.")


def _split(entries: Sequence[TensorSource], max_bytes: int) -> list[list[TensorSource]]:
    """Fill shards in the given order; within a shard wide types come first.

    The format forbids padding, so this order is what keeps every tensor aligned to its type.
    """
    shards: list[list[TensorSource]] = [[]]
    filled = 0
    for entry in entries:
        nbytes = entry[1].nbytes
        if shards[-1] and filled + nbytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += nbytes
    for shard in shards:
        shard.sort(key=lambda entry: -numpy_dtypes[entry[1].dtype].itemsize)
    return shards


def _write_shard(path: Path, shard: Sequence[TensorSource], metadata: dict[str, str]) -> None:
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    begin = 0
    for name, info, _ in shard:
        end = begin + info.nbytes
        header[name] = {
            "dtype": info.dtype,
            "shape": [int(dim) for dim in info.shape],
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)  # the tensors begin where a CPU takes a map as it is
    _write_file(path, _shard_bytes(struct.pack("<Q", len(text)) + text, shard))


def _shard_bytes(header: bytes, shard: Sequence[TensorSource]) -> Iterator[bytes | np.ndarray]:
    yield header
    for name, info, make in shard:
        yield from _tensor_bytes(name, info, make())


def _tensor_bytes(name: str, info: TensorInfo, array: np.ndarray) -> Iterator[np.ndarray]:
    """The array's bytes in row-major order, in chunks of whole leading rows."""
    array = np.asarray(array)
    if array_info(array) != info:
        raise ShapeError(
            f"tensor {shown(name)}: got {array.dtype} of shape {array.shape}, announced was "
            f"{info.dtype} of shape {info.shape}."
        )
    rows = array.reshape(1) if array.ndim == 0 else array
    dtype = numpy_dtypes[info.dtype]
    step = max(1, _chunk_bytes * max(1, len(rows)) // max(1, info.nbytes))
    for i in range(0, len(rows), step):
        chunk = np.ascontiguousarray(rows[i : i + step], dtype)
        yield chunk.reshape(-1).view(np.uint8)


def _write_file(path: Path, chunks: Iterable[bytes | np.ndarray]) -> None:
    """Write and sync a new file; errors of the disk are told from errors of the chunks' source."""
    with contextlib.ExitStack() as stack:
        with _disk(path.parent):
            handle = stack.enter_context(open(path, "xb", buffering=0))
        for chunk in chunks:
            view = memoryview(chunk)
            with _disk(path.parent):
                while view:
                    view = view[handle.write(view) :]
            del chunk, view  # or this tensor would live on while the next one is made
        with _disk(path.parent):
            os.fsync(handle.fileno())


@contextlib.contextmanager
def _all_or_nothing(directory: Path) -> Iterator[_Placer]:
    """Hand out temporary paths; on success rename each to its name, on failure remove all."""
    token = secrets.token_hex(4)
    temporary: dict[str, Path] = {}
    renamed: list[Path] = []

    def place(name: str) -> Path:
        temporary[name] = directory / f".{name}.{token}.tmp"
        return temporary[name]

    try:
        yield place
        for name, path in temporary.items():
            with _disk(directory / name):
                os.replace(path, directory / name)
            renamed.append(directory / name)
    except BaseException:
        if len(temporary) == 1:
            renamed.clear()  # it may have replaced an older checkpoint, and it is complete
        for path in (*temporary.values(), *renamed):
            with contextlib.suppress(OSError):
                path.unlink()
        raise
    with contextlib.suppress(OSError):  # not every file system can sync a directory
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _refuse_mixture(directory: Path, *, single: bool) -> None:
    """Readers take model.safetensors before an index: never leave two checkpoints side by side."""
    there = {item.name for item in directory.iterdir() if _weight_files.fullmatch(item.name)}
    if there - {single_name} or (there and not single):
        raise ConfigError(
            f"{directory}: already holds a checkpoint ({shown(sorted(there))}); a sharded one "
            "cannot be replaced as a whole: remove these files or give another directory."
        )


@contextlib.contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise CapacityError(
                f"{path}: cannot be written: {reason}; free space or give another directory."
            ) from error
        raise ConfigError(f"{path}: cannot be written: {reason}.") from error
