"""Sharding: logical names on parameter dims -> a table -> NamedSharding."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from jaxllm.core.config import require

__all__ = [
    "DEFAULT_RULES",
    "ROWS",
    "Row",
    "Rules",
    "constrain",
    "island",
    "mesh_axes",
    "named_sharding",
    "partition_spec",
    "shard",
    "shards",
    "with_axes",
]

Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]

DEFAULT_RULES: Rules = (
    ("batch", ("data", "fsdp", "expert")),
    ("vocab", "tensor"),
    ("width", "fsdp"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("ffn", "tensor"),
    ("experts", "expert"),
    ("head_dim", None),
    ("layers", None),
    ("length", None),
    ("sequence", None),
)
"""Data parallel batches, FSDP on the width, tensor parallel heads, ffn and vocabulary.

Devices that split the experts among them split the batch as well: rows go to their experts.

`length` names the tokens inside of an op, `sequence` those of the hidden states between ops.
"""


def with_axes(rules: Rules, **axes: str | tuple[str, ...] | None) -> Rules:
    """The table with other mesh axes for some of its logical axes."""
    unknown = sorted(set(axes) - {name for name, _ in rules})
    require(not unknown, f"rules: no logical axis is called {', '.join(unknown)}")
    return tuple((name, axes.get(name, value)) for name, value in rules)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What lies where in training: one table each.

    Attributes:
      params: of parameters between steps, and of activations.
      gradients: of their gradients.
      moments: of what the optimizer remembers.
    """

    params: Rules
    gradients: Rules
    moments: Rules


_WHOLE = with_axes(DEFAULT_RULES, width=None)
_SPLIT = DEFAULT_RULES
_WIDE = with_axes(DEFAULT_RULES, width=("data", "fsdp"))

ROWS = {
    "replicated": Row(params=_WHOLE, gradients=_WHOLE, moments=_WHOLE),
    "zero1": Row(params=_WHOLE, gradients=_WHOLE, moments=_SPLIT),
    "zero2": Row(params=_WHOLE, gradients=_SPLIT, moments=_SPLIT),
    "zero3": Row(params=_SPLIT, gradients=_SPLIT, moments=_SPLIT),
    "hybrid": Row(params=_SPLIT, gradients=_WIDE, moments=_WIDE),
}
"""What the `fsdp` axis shards; `hybrid` shards gradients and moments over `data` as well."""


def mesh_axes(rules: Rules, axis: str) -> tuple[str, ...]:
    """Mesh axes of a logical axis; none if the table lacks it."""
    wanted = dict(rules).get(axis)
    return (wanted,) if isinstance(wanted, str) else tuple(wanted or ())


def partition_spec(
    axes: tuple[str | None, ...], rules: Rules, mesh_shape: Mapping[str, int], shape: Any = None
) -> Any:
    """PartitionSpec of an array from the logical names of its dims.

    A mesh axis that the mesh lacks, that has size 1 or that an earlier dim took is left out; so is
    one that does not divide the dim when `shape` is given (one kv head on two tensor shards).
    """
    from jax.sharding import PartitionSpec

    used, parts = set(), []
    for dim, axis in enumerate(axes):
        names = () if axis is None else mesh_axes(rules, axis)
        chosen: list[str] = []
        size = 1
        for name in names:
            grown = size * mesh_shape.get(name, 1)
            divides = shape is None or shape[dim] % grown == 0
            if mesh_shape.get(name, 1) > 1 and name not in used and divides:
                chosen.append(name)
                size = grown
        used.update(chosen)
        parts.append(tuple(chosen) if len(chosen) > 1 else chosen[0] if chosen else None)
    return PartitionSpec(*parts)


def named_sharding(mesh: Any, axes: tuple[str | None, ...], rules: Rules, shape: Any) -> Any:
    """NamedSharding of an array of a given shape on a mesh."""
    from jax.sharding import NamedSharding

    require(len(axes) == len(shape), f"axes {axes} do not fit the shape {shape}")
    return NamedSharding(mesh, partition_spec(axes, rules, dict(mesh.shape), shape))


def constrain(x: Any, axes: tuple[str | None, ...], rules: Rules) -> Any:
    """Hint the sharding of an activation under the mesh that is set; without a mesh, x as it is."""
    import jax

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(
        x, partition_spec(axes, rules, dict(mesh.shape), x.shape)
    )


def island(function: Callable[..., Any], args: Any, axes: Any, *, out: Any, rules: Rules) -> Any:
    """function(*args) under the mesh that is set, each device on its own part of every array.

    For kernels, which XLA cannot split. Without a mesh it is a plain call.

    Args:
      function: of arrays (or trees of them) that needs no other device's part.
      args: its arguments.
      axes: logical axes of every array of `args`: the same trees with tuples of names.
      out: (shape, axes) of the one array that comes out, or a list of them for a tuple.
      rules: logical axis -> mesh axes.
    """
    import jax

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function(*args)
    sizes = dict(mesh.shape)
    lie = lambda x, names: partition_spec(names, rules, sizes, x.shape)  # noqa: E731
    several = out if isinstance(out, list) else [out]
    specs = tuple(partition_spec(names, rules, sizes, shape) for shape, names in several)
    split = jax.shard_map(
        function,
        in_specs=jax.tree.map(lie, args, axes),
        out_specs=specs if isinstance(out, list) else specs[0],
        check_vma=False,  # a kernel does not say over which axes its results vary
    )
    return split(*args)


def shards(axis: str, rules: Rules) -> int:
    """In how many parts a logical axis is split under the mesh that is set; 1 without a mesh."""
    import jax

    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    return math.prod(sizes.get(name, 1) for name in mesh_axes(rules, axis))


def shard(tree: Any, shardings: Any) -> Any:
    """Put a tree of arrays on its shardings."""
    import jax

    return jax.device_put(tree, shardings)
