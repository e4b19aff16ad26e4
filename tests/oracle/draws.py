"""Weights of golden models: matrices are drawn again from a seed, all else stands in a file.

Imported by scripts/make_goldens.py too, which has numpy and safetensors but no jax.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - numpy's bfloat16
import numpy as np
from safetensors.numpy import load_file, save_file

__all__ = ["KEPT", "digest", "pack", "redraw_matrices", "unpack"]

LIST, REST = "drawn.json", "rest.safetensors"
KEPT = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
"""Tables that follow from the config: they stay as they are."""


def _matrix(name: str, array: np.ndarray) -> bool:
    floats = array.dtype in (np.float32, np.dtype("bfloat16"))
    return array.ndim > 1 and floats and not name.endswith(KEPT)


def _draw(name: str, shape: tuple[int, ...], dtype: Any, seed: int) -> np.ndarray:
    """Uniform with deviation 1/sqrt(last dim); `RandomState` gives the same bits everywhere."""
    random = np.random.RandomState(zlib.crc32(f"{seed} {name}".encode()))
    values = (2 * random.random_sample(shape) - 1) * (3 / shape[-1]) ** 0.5
    return values.astype(np.float32).astype(dtype)


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("*.safetensors") if p.name != REST)


def redraw_matrices(folder: Path, seed: int) -> None:
    """Replace the matrices in a model's files by what `unpack` will draw."""
    for path in _files(folder):
        arrays = load_file(path)
        drawn = {
            name: _draw(name, a.shape, a.dtype, seed) if _matrix(name, a) else a
            for name, a in arrays.items()
        }
        save_file(drawn, path, metadata={"format": "pt"})


def digest(folder: Path) -> str:
    """A hash of names, shapes, types and values of all tensors."""
    sha = hashlib.sha256()
    for path in _files(folder):
        for name, array in sorted(load_file(path).items()):
            sha.update(f"{path.name} {name} {array.shape} {array.dtype}".encode())
            sha.update(array.tobytes())
    return sha.hexdigest()


def pack(folder: Path, seed: int) -> None:
    """Leave a list of the matrices, and a file of all else, where the model's files were."""
    listed: dict[str, Any] = {}
    rest: dict[str, np.ndarray] = {}
    for path in _files(folder):
        arrays = load_file(path)
        listed[path.name] = {
            name: [list(a.shape), str(a.dtype)] if _matrix(name, a) else None
            for name, a in arrays.items()
        }
        rest |= {name: a for name, a in arrays.items() if not _matrix(name, a)}
        path.unlink()
    save_file(rest, folder / REST)
    (folder / LIST).write_text(json.dumps({"seed": seed, "files": listed}) + "\n")


def unpack(folder: Path) -> None:
    """The model's files as they were before `pack`."""
    listed, rest = json.loads((folder / LIST).read_text()), load_file(folder / REST)
    for file, entries in listed["files"].items():
        arrays = {
            name: rest[name]
            if entry is None
            else _draw(name, tuple(entry[0]), np.dtype(entry[1]), listed["seed"])
            for name, entry in entries.items()
        }
        save_file(arrays, folder / file, metadata={"format": "pt"})
    (folder / LIST).unlink()
    (folder / REST).unlink()
