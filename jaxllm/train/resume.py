"""Whether a run may go on from a checkpoint: config, shapes and bits of the state."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.core.logging import log
from jaxllm.errors import ConfigError, WeightsError

__all__ = ["check_config", "check_leaves", "checksum", "leaves_of"]

_FREE = ("out", "keep", "keep_best", "keep_every", "checkpoint_every", "export", "mesh", "patience")
"""Fields that may change in a resume without a note: no number of the run depends on them."""


def checksum(state: Any) -> Any:
    """uint32 over the bits of all leaves: the sum of word times (2 x its index + 1), modulo 2^32.

    Odd weights find every flipped bit, integers give the same sum on every mesh. Orbax itself does
    not notice a flipped byte inside an array's file.
    """
    total = jnp.zeros((), jnp.uint32)
    for leaf in jax.tree.leaves(state):
        words = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(leaf, words).astype(jnp.uint32)
        index = jnp.zeros(leaf.shape, jnp.uint32)
        for dim, size in enumerate(leaf.shape):
            places = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, dim)
            index = index * np.uint32(size % 2**32) + places
        part = jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32)
        total = total * np.uint32(31) + part
    return total


def leaves_of(state: Any) -> dict[str, list[Any]]:
    """Path -> [shape, dtype] of every leaf."""
    rows = jax.tree_util.tree_leaves_with_path(state)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): [list(x.shape), str(x.dtype)]
        for path, x in rows
    }


def _differences(old: Any, new: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(path, old, new) of what differs in two JSON values; a field at its default is absent."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(k for k in new if k not in old)]:
            path = f"{where}.{key}" if where else key
            yield from _differences(old.get(key, "default"), new.get(key, "default"), path)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from _differences(a, b, f"{where}[{i}]")
    elif old != new:
        yield where, old, new


def check_config(folder: Path, old: Any, new: Any, notes: bool) -> None:
    """Whether a config may go on from a checkpoint of another."""
    model = list(_differences(old.get("spec"), new["spec"], "spec"))
    if model:
        where, was, now = model[0]
        raise WeightsError(
            f"{folder}: is of another model, {where} is {was!r} there and {now!r} in the config; "
            "give another --out"
        )
    kept, changed = ({}, {})
    for where, was, now in _differences(old, new):
        place = kept if where in ("optimizer.kind", "optimizer.build") else changed
        place[where] = f"{where}: {was!r} there, {now!r} in the config"
    if kept:
        raise ConfigError(
            f"{folder}: is of another optimizer ({'; '.join(kept.values())}), whose state cannot "
            "be taken over; give another --out, or the optimizer of the checkpoint"
        )
    told = [text for where, text in changed.items() if where.split(".")[0] not in _FREE]
    if told and notes:
        log.warning("the run goes on with another config than %s: %s", folder, "; ".join(told))


def check_leaves(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """A state of other leaves cannot be taken over; the first one that differs is named."""
    for path in [*old, *(p for p in new if p not in old)]:
        if old.get(path) != new.get(path):
            was, now = (
                "absent" if x is None else f"{x[1]} {tuple(x[0])}"
                for x in (old.get(path), new.get(path))
            )
            raise WeightsError(
                f"{folder}: the state has another layout, {path} is {was} there and {now} in this "
                "run; give another --out, or the config of the checkpoint"
            )
