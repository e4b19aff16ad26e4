"""Adapters that a bundle keeps apart: their factors in the layout of the weights that they change.

`adapt.py` adds them, and knows nothing of layouts: A is [layers, rows, R] and B [layers, R,
columns] for the dims of the array that lies in the bundle.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.core.config import require
from jaxllm.core.lowrank import LowRank
from jaxllm.core.tree import flatten, unstacked_paths
from jaxllm.export.ways import Way
from jaxllm.export.weights import Placed, write_weights
from jaxllm.infer.open import checkpoint_of, run_segments
from jaxllm.spec.model import ModelSpec
from jaxllm.spec.param import ParamDef
from jaxllm.spec.table import fused_part, model_table
from jaxllm.zoo.adapter import read_adapter
from jaxllm.zoo.packed import fused_parts

__all__ = ["Updates", "read_apart", "write_adapters"]

Updates = Mapping[str, LowRank]
"""Unstacked path -> what is added to it."""


def read_apart(source: str, apart: tuple[tuple[str, Path], ...]) -> dict[str, Updates]:
    """The adapters that a bundle is to keep apart, by name.

    Raises:
      ConfigError: names that are no names, or the same; WeightsError, UnsupportedError: as
        `read_adapter`.
    """
    names = [name for name, _ in apart]
    for name in names:
        require(
            re.fullmatch(r"\w[\w.-]*", name) is not None and names.count(name) == 1,
            f"adapter {name!r}: give each a name of its own, of letters, digits, . _ and -",
        )
    return {name: read_adapter(checkpoint_of(source), folder) for name, folder in apart}


def write_adapters(
    folder: Path, way: Way, spec: ModelSpec, apart: Mapping[str, Updates]
) -> tuple[dict[str, Any], set[Path]]:
    """Write adapters for the layout of a way, below a bundle's folder.

    Returns:
      (adapter -> array that it changes -> rows of A and B in the form of a manifest's parameters,
      the files).
    """
    rows: dict[str, Any] = {}
    files: set[Path] = set()
    for name, updates in apart.items():
        held = {array: {"a": a, "b": b} for array, a, b in _held(spec, way, updates)}
        tree = {n: {k: Placed(x, None) for k, x in sides.items()} for n, sides in held.items()}
        where = write_weights(folder / "adapters" / name / way.layout, tree)
        files |= {file for file, _ in where.values()}

        def row(key: str, array: np.ndarray, where: Any = where) -> list[Any]:
            file, offset = where[key]
            place = file.relative_to(folder).as_posix()
            return [key, place, offset, array.dtype.name, list(array.shape)]

        rows[name] = {
            n: [row(f"{n}.{k}", x) for k, x in sides.items()] for n, sides in held.items()
        }
    return rows, files


def _held(
    spec: ModelSpec, way: Way, updates: Updates
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(name, A, B) of every array of a way's parameters that an adapter changes."""
    policy = way.policy
    table = model_table(spec, run_segments(spec, policy), policy.fused)
    for path, definition in flatten(table):
        layers = unstacked_paths(path)
        stacked = len(layers) > 1 or definition.axes[0] == "layers"
        one = definition.unstack() if stacked else definition
        found = [_joined(spec, layer, one, updates) for layer in layers]
        rank = max(x.rank for x in found)
        if not rank:
            continue
        a = np.stack([np.pad(x.a, ((0, 0), (0, rank - x.rank))) for x in found])
        flat = [x.b.reshape(x.rank, math.prod(one.shape[one.inputs :])) for x in found]
        b = np.stack([np.pad(x, ((0, rank - len(x)), (0, 0))) for x in flat])
        if definition.held_inputs(policy.matrices):
            yield f"{path}.values", b.transpose(0, 2, 1), a.transpose(0, 2, 1)
        else:
            yield path, a, b


def _joined(spec: ModelSpec, path: str, definition: ParamDef, updates: Updates) -> LowRank:
    """The update of one unstacked leaf, of rank 0 where there is none; of a fused one, its parts'
    beside each other."""
    parts = fused_parts(path)
    found = [(updates[part], part) for part in parts or [path] if part in updates]
    rank = sum(update.rank for update, _ in found)
    inputs, outputs = definition.shape[: definition.inputs], definition.shape[definition.inputs :]
    a = np.zeros((math.prod(inputs), rank), np.float32)
    b = np.zeros((rank, *outputs), np.float32)
    start = 0
    for update, part in found:
        rows = slice(start, start + update.rank)
        a[:, rows] = update.a
        b[rows][fused_part(spec, part)[1] if parts else ...] = update.b
        start = rows.stop
    return LowRank(a, b)
