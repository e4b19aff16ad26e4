"""The trained model as files, from parameters in any layout, on any mesh, over any processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxllm.core.tree import flatten, unstacked_paths
from jaxllm.spec.model import ModelSpec
from jaxllm.spec.table import fused_part
from jaxllm.train.config import RunConfig
from jaxllm.train.hosts import everywhere, is_main
from jaxllm.zoo.load import save_checkpoint, saved_paths

__all__ = ["export_model", "leaf_reader"]


def export_model(config: RunConfig, params: Any, folder: Path) -> None:
    """Write the Hugging Face layout; all processes call it, the main one writes."""
    read = leaf_reader(config.spec, params)
    if is_main():
        save_checkpoint(folder, config.spec, read, dtype=config.param_dtype)
        return
    for path in saved_paths(config.spec):
        read(path)


def leaf_reader(spec: ModelSpec, params: Any) -> Callable[[str], np.ndarray]:
    """A function from an unstacked path (`layers.3.mlp.down`) to the whole array on the host.

    One layer's array at a time is copied from where its shards lie; the reader is called by all
    processes with the same paths. A part of a fused projection is cut out of it.
    """
    places: dict[str, tuple[Any, int | None]] = {}
    for stacked, leaf in flatten(params):
        paths = unstacked_paths(stacked)
        alone = paths == [stacked]
        places |= {path: (leaf, None if alone else i) for i, path in enumerate(paths)}
    sharding = next(iter(places.values()))[0].sharding
    out = everywhere(sharding.mesh) if isinstance(sharding, NamedSharding) else None
    whole = jax.jit(lambda x: x, out_shardings=out)
    layer = jax.jit(lambda x, i: jax.lax.dynamic_index_in_dim(x, i, 0, False), out_shardings=out)
    in_place = out is None and jax.devices()[0].platform == "cpu"

    def read(path: str) -> np.ndarray:
        if path not in places:
            fused, cut = fused_part(spec, path)
            return np.ascontiguousarray(read(fused)[cut])
        leaf, repeat = places[path]
        if in_place:
            return np.asarray(leaf) if repeat is None else np.asarray(leaf)[repeat]
        return np.asarray(whole(leaf) if repeat is None else layer(leaf, np.int32(repeat)))

    return read
