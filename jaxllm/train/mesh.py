"""Whether a run fits its mesh: contradictions are errors before anything is compiled."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from jaxllm.core.config import require
from jaxllm.core.logging import note_once
from jaxllm.core.mesh import parse_mesh
from jaxllm.core.sharding import ROWS, mesh_axes
from jaxllm.spec.model import ModelSpec
from jaxllm.spec.ops import MLP, Attention, MoE

if TYPE_CHECKING:
    from jaxllm.train.config import RunConfig

__all__ = ["check_mesh", "note_whole", "tensor_sizes"]

TRAINS = ("data", "fsdp", "expert", "tensor")
"""Mesh axes that training takes; the others may have size 1."""


def _split_by_tensor(spec: ModelSpec) -> Iterator[tuple[str, int]]:
    """(what it is, its size) of every dim that has to divide by the tensor axis."""
    for block in spec.blocks:
        for part in block.subs:
            for named in part.ops:
                match named.op:
                    case Attention(heads=heads):
                        yield f"{named.name} in block {block.name} has {heads} heads", heads
                    case MLP(width=width) | MoE(mlp=MLP(width=width)):
                        yield f"{named.name} in block {block.name} is {width} wide", width


def tensor_sizes(spec: ModelSpec) -> tuple[int, ...]:
    """Sizes of the tensor axis that heads and feed-forward of a model divide by, rising."""
    common = math.gcd(*(size for _, size in _split_by_tensor(spec)))
    return tuple(n for n in range(1, common + 1) if common % n == 0) or (1,)


def _check_tensor(config: RunConfig, tensor: int) -> None:
    found = list(_split_by_tensor(config.spec))
    fits = ", ".join(map(str, tensor_sizes(config.spec)))
    for what, size in found:
        require(
            size % tensor == 0,
            f"{what}, no multiple of tensor={tensor} in mesh {config.mesh!r}; "
            f"with this model tensor can be {fits}",
        )
    require(
        not config.sequence_parallel or config.length % tensor == 0,
        f"length {config.length} is no multiple of tensor={tensor} in mesh {config.mesh!r}: take "
        "another length, or sequence_parallel=False to keep all tokens on every device",
    )


def _check_width(config: RunConfig, sizes: dict[str, int]) -> None:
    """A leaf whose width does not divide would silently lie whole on every device."""
    row, width = ROWS[config.sharding], config.spec.width
    for rules in (row.params, row.gradients, row.moments):
        axes = mesh_axes(rules, "width")
        shards = math.prod(sizes.get(axis, 1) for axis in axes)
        require(
            width % shards == 0,
            f"width {width} is no multiple of {' x '.join(axes)} = {shards} in mesh "
            f"{config.mesh!r}, which {config.sharding!r} splits it over; take another mesh, or "
            "sharding='replicated'",
        )


def _check_experts(config: RunConfig, shards: int) -> None:
    """Experts lie on the devices of an axis in equal numbers."""
    counts = {op.experts for op in config.spec.ops if isinstance(op, MoE)}
    require(bool(counts), f"mesh {config.mesh!r} has the axis expert, but the model has no experts")
    for count in sorted(counts):
        require(
            count % shards == 0,
            f"{count} experts are no multiple of expert={shards} in mesh {config.mesh!r}",
        )


def check_mesh(config: RunConfig) -> None:
    """Raise a ConfigError unless rows, width, heads and ffn divide by the axes that split them.

    Heads of keys and values and the vocabulary may stay whole: see `note_whole`.
    """
    sizes = parse_mesh(config.mesh)
    used = {name for name, size in sizes.items() if size > 1}
    require(used <= set(TRAINS), f"mesh {config.mesh!r}: training takes {', '.join(TRAINS)}")
    axes = ("data", "fsdp", "expert") if sizes.get("expert", 1) > 1 else ("data", "fsdp")
    shards = math.prod(sizes.get(axis, 1) for axis in axes)
    rows = config.batch // config.accumulate
    require(
        rows % shards == 0,
        f"{rows} rows at a time are no multiple of {' x '.join(axes)} = {shards} in "
        f"{config.mesh!r}",
    )
    if sizes.get("expert", 1) > 1:
        _check_experts(config, sizes["expert"])
    require(
        not sizes or "fsdp" in sizes or config.sharding in ("replicated", "zero3"),
        f"sharding {config.sharding!r} splits over the axis fsdp, which mesh {config.mesh!r} "
        "lacks; write fsdp=N in place of data=N",
    )
    _check_width(config, sizes)
    if sizes.get("tensor", 1) > 1:
        _check_tensor(config, sizes["tensor"])


def note_whole(spec: ModelSpec, tensor: int) -> None:
    """Say once what stays whole on every shard of the tensor axis because it does not divide."""
    if spec.vocab % tensor:
        note_once(f"mesh: the vocabulary of {spec.vocab} is not split over tensor={tensor}")
    for op in spec.ops:
        if isinstance(op, Attention) and op.kv_heads % tensor:
            note_once(f"mesh: {op.kv_heads} kv heads are not split over tensor={tensor}")
