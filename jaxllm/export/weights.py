"""A bundle's weights: every array in the layout of the run, in safetensors files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxllm.core.packing import four_bits, nibbles
from jaxllm.zoo.safetensors import array_info, write_safetensors

__all__ = ["Placed", "abstract", "parameters", "placed", "write_weights"]

_LEAST_BYTES, _MOST_FILES = 2**27, 32
"""Files are checked side by side: several are ready sooner than one, too many are a nuisance."""


@dataclasses.dataclass(frozen=True)
class Placed:
    """An array on the host and its sharding, or None."""

    array: Any
    sharding: Any


def placed(params: Any) -> Any:
    """The same tree with all arrays as `Placed`; drawn parameters come as plain arrays."""

    def leaf(x: Any) -> Placed:
        return x if isinstance(x, Placed) else Placed(np.asarray(x), None)

    return jax.tree.map(leaf, params)


def abstract(params: Any) -> Any:
    """A tree of `Placed` as abstract arguments."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.array.shape, x.array.dtype, sharding=x.sharding), params
    )


def parameters(params: Any) -> list[tuple[str, Any]]:
    """(dotted path, `Placed`) of all arrays, in the order in which programs take them."""
    paths, _ = jax.tree.flatten_with_path(params)
    return [(".".join(_key(key) for key in path), leaf) for path, leaf in paths]


def _key(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "name", None)))


def _stored(array: np.ndarray) -> np.ndarray:
    """What stands in a file, which knows no four-bit values: a flat array of two a byte."""
    if not four_bits(array.dtype):
        return array
    return nibbles(np.pad(array.astype(np.int8).reshape(-1), (0, array.size % 2)))


def write_weights(folder: Path, params: Any) -> dict[str, tuple[Path, int]]:
    """Write a tree of `Placed`; returns the file of each array and where in it the bytes begin."""

    def source(name: str, array: np.ndarray) -> tuple[str, Any, Callable[[], np.ndarray]]:
        return name, array_info(_stored(array)), lambda: _stored(array)

    tensors = [source(name, leaf.array) for name, leaf in parameters(params)]
    total = sum(info.nbytes for _, info, _ in tensors)
    found = {}
    for file in write_safetensors(
        folder, tensors, max_shard_bytes=max(_LEAST_BYTES, total // _MOST_FILES)
    ):
        if file.suffix == ".safetensors":
            with open(file, "rb") as stream:
                size = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(size))
            found |= {n: (file, 8 + size + t["data_offsets"][0]) for n, t in header.items()}
        else:
            file.unlink()  # the manifest is the index
    return found
