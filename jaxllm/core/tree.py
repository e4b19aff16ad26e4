"""Parameter trees: segments of layers, dotted paths, selection by rule, stacking and unstacking.

`params["layers"]` is a dict of *segments*; its keys say which layers they hold:

  "7"        layer 7, parameters as they are
  "0:30"     layers 0 to 29, each leaf stacked on a leading axis of 30
  "0:48:6"   layers 0 to 47 as 8 repeats of a unit of 6; holds "0".."5", leaves stacked on 8

Which segmentation a tree has is the run's choice; `unstack` and `restack` go between them.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxllm.errors import ConfigError, WeightsError

__all__ = [
    "Segment",
    "flatten",
    "map_leaves",
    "merge",
    "partition",
    "restack",
    "runs",
    "segments_of",
    "select",
    "single_segments",
    "stack_equal",
    "take_repeat",
    "unflatten",
    "unstack",
    "unstacked_paths",
]


@dataclasses.dataclass(frozen=True, order=True)
class Segment:
    """Layers start..stop-1, as (stop - start) / unit repeats of `unit` layers."""

    start: int
    stop: int
    unit: int = 1
    stacked: bool = True

    def __post_init__(self) -> None:
        if (
            self.start < 0
            or self.unit < 1
            or (self.stop - self.start) % self.unit
            or self.repeats < 1
        ):
            raise ConfigError(
                f"layers {self.start}:{self.stop} are no repeats of a unit of {self.unit}"
            )

    @property
    def repeats(self) -> int:
        """How many times the unit is repeated: the length of the stacked axis."""
        return (self.stop - self.start) // self.unit

    @property
    def key(self) -> str:
        """The key of this segment in `params["layers"]`."""
        if not self.stacked:
            return str(self.start)
        return f"{self.start}:{self.stop}" + (f":{self.unit}" if self.unit > 1 else "")

    @staticmethod
    def parse(key: str) -> Segment:
        """The segment that a key names."""
        parts = key.split(":")
        if not all(p.isdecimal() for p in parts) or len(parts) > 3:
            raise WeightsError(f"{key!r} is no segment of layers; write 7, 0:30 or 0:48:6")
        numbers = [int(p) for p in parts]
        if len(numbers) == 1:
            return Segment(numbers[0], numbers[0] + 1, 1, stacked=False)
        start, stop, *unit = numbers
        return Segment(start, stop, unit[0] if unit else 1)


def is_node(value: Any) -> bool:
    """Whether a value is an inner node (a mapping), not a leaf."""
    return isinstance(value, Mapping)


def segments_of(layers: Mapping[str, Any]) -> tuple[Segment, ...]:
    """The segments of a layers dict, in order; they must tile 0..num_layers."""
    found = sorted(Segment.parse(key) for key in layers)
    position = 0
    for segment in found:
        if segment.start != position:
            raise WeightsError(f"layers {position}:{segment.start} are missing or held twice")
        position = segment.stop
    return tuple(found)


def flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, leaf) in the order of the dicts."""
    if not is_node(tree):
        yield prefix, tree
        return
    for key, value in tree.items():
        yield from flatten(value, f"{prefix}.{key}" if prefix else key)


def unflatten(items: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dict from (dotted path, leaf) pairs; the inverse of `flatten`."""
    out: dict[str, Any] = {}
    for path, leaf in items.items():
        *parents, last = path.split(".")
        node = out
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return out


def map_leaves(function: Callable[[str, Any], Any], tree: Any, prefix: str = "") -> Any:
    """The same tree with `function(path, leaf)` in place of every leaf."""
    if not is_node(tree):
        return function(prefix, tree)
    return {k: map_leaves(function, v, f"{prefix}.{k}" if prefix else k) for k, v in tree.items()}


def layer_tree(segment: Segment, tree: Any, layer: int, take: Callable[[Any, int], Any]) -> Any:
    """The tree of one layer of a segment; `take(leaf, repeat)` slices a stacked leaf."""
    if not segment.stacked:
        return tree
    repeat, place = divmod(layer - segment.start, segment.unit)
    node = tree[str(place)] if segment.unit > 1 else tree
    return map_leaves(lambda _, leaf: take(leaf, repeat), node)


def single_segments(num_layers: int) -> tuple[Segment, ...]:
    """The segmentation with one entry a layer."""
    return tuple(Segment(i, i + 1, 1, stacked=False) for i in range(num_layers))


def take_repeat(leaf: Any, index: int) -> Any:
    """One repeat of a stacked leaf."""
    import jax

    return jax.tree.map(lambda array: array[index], leaf)


def _stack(leaves: list[Any]) -> Any:
    import jax

    def stack(*arrays: Any) -> Any:
        if all(isinstance(a, np.ndarray) for a in arrays):
            return np.stack(arrays)
        return jax.numpy.stack(arrays)

    return jax.tree.map(stack, *leaves)


def unstack(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters with one entry a layer: `layers.0`, `layers.1`, ..."""
    layers: dict[str, Any] = {}
    for segment in segments_of(params["layers"]):
        tree = params["layers"][segment.key]
        for layer in range(segment.start, segment.stop):
            layers[str(layer)] = layer_tree(segment, tree, layer, take_repeat)
    return {**params, "layers": layers}


def restack(params: Mapping[str, Any], segments: tuple[Segment, ...]) -> dict[str, Any]:
    """Parameters in another segmentation; layers stacked together must have equal leaf types.

    Raises:
      WeightsError: layers of one stacked segment differ in their leaves (kind, shape or dtype).
    """
    if segments_of(params["layers"]) == segments:
        return dict(params)
    single = unstack(params)["layers"]
    layers: dict[str, Any] = {}
    for segment in segments:
        if not segment.stacked:
            layers[segment.key] = single[str(segment.start)]
            continue
        places = []
        for place in range(segment.unit):
            group = [
                single[str(i)] for i in range(segment.start + place, segment.stop, segment.unit)
            ]
            places.append(_stack_layers(group, segment))
        layers[segment.key] = (
            {str(i): p for i, p in enumerate(places)} if segment.unit > 1 else places[0]
        )
    return {**params, "layers": layers}


def leaf_type(layer: Any) -> Any:
    """What must agree for two layers to be stacked: structure, shapes and dtypes."""
    import jax

    leaves, structure = jax.tree.flatten(layer)
    return structure, tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)


def stack_equal(kinds: Sequence[Any]) -> tuple[Segment, ...]:
    """The segmentation that stacks neighbours of an equal kind; `kinds` has one entry a layer."""
    starts = [i for i, kind in enumerate(kinds) if i == 0 or kind != kinds[i - 1]]
    ends = [*starts[1:], len(kinds)]
    return tuple(Segment(a, b, 1, stacked=b - a > 1) for a, b in zip(starts, ends, strict=True))


def runs(params: Mapping[str, Any], names: Sequence[str] | None = None) -> tuple[Segment, ...]:
    """The segmentation that stacks neighbouring layers with equal leaf types.

    Args:
      params: parameters in any layout.
      names: the block of each layer (`spec.pattern.names`), where blocks may differ in more than
        their leaves, for example in a mask.
    """
    layers = unstack(params)["layers"]
    names = names or ("",) * len(layers)
    return stack_equal([(name, leaf_type(layers[str(i)])) for i, name in enumerate(names)])


def _stack_layers(group: list[Any], segment: Segment) -> Any:
    if len({leaf_type(layer) for layer in group}) > 1:
        raise WeightsError(
            f"layers {segment.key} differ in their leaves and cannot be stacked; "
            "use the layout 'runs' or 'unrolled'"
        )
    flat = [dict(flatten(layer)) for layer in group]
    return unflatten({path: _stack([f[path] for f in flat]) for path in flat[0]})


def unstacked_paths(path: str) -> list[str]:
    """The paths of the layers behind a path: `layers.0:2.q` -> `layers.0.q`, `layers.1.q`."""
    parts = path.split(".")
    if parts[0] != "layers" or len(parts) < 2:
        return [path]
    segment = Segment.parse(parts[1])
    if not segment.stacked:
        return [path]
    place, rest = (int(parts[2]), parts[3:]) if segment.unit > 1 else (0, parts[2:])
    return [
        ".".join(["layers", str(i), *rest])
        for i in range(segment.start + place, segment.stop, segment.unit)
    ]


def select(path: str, rules: tuple[str, ...]) -> bool:
    """Whether a path matches any rule; rules are globs over unstacked paths (`layers.*.mlp.down`).

    Raises:
      ConfigError: a stacked leaf of which the rules take only some layers.
    """
    hits = [any(fnmatch.fnmatchcase(p, r) for r in rules) for p in unstacked_paths(path)]
    if any(hits) and not all(hits):
        raise ConfigError(
            f"rules {rules} take some layers of the stacked leaf {path!r}; unstack first"
        )
    return all(hits)


def partition(params: Any, rule: Callable[[str], bool] | tuple[str, ...]) -> tuple[Any, Any]:
    """Split a tree into (chosen, rest), each with only its own leaves; `merge` puts them together.

    Args:
      params: nested dict of leaves.
      rule: predicate over paths, or globs for `select`.
    """
    chosen = rule if callable(rule) else lambda path: select(path, rule)
    both: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for path, leaf in flatten(params):
        both[0 if chosen(path) else 1][path] = leaf
    return unflatten(both[0]), unflatten(both[1])


def merge(first: Any, second: Any) -> Any:
    """The union of two disjoint trees; where both hold a leaf, the first wins."""
    if not is_node(first) or not is_node(second):
        return first
    keys = [*first, *(k for k in second if k not in first)]
    return {
        k: merge(first[k], second[k]) if k in first and k in second else first.get(k, second.get(k))
        for k in keys
    }
