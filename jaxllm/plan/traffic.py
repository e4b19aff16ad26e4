"""Collectives of a program: kind, mesh axes, and the bytes that a device sends.

Bytes are those of the ring or pairwise algorithm that sends the least: with n devices in a group
and B the bytes of the whole array, an all-gather or reduce-scatter sends (n-1)/n B, an all-reduce
twice that, an all-to-all (n-1)/n of what a device holds, a permute what it holds.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping

import numpy as np

from jaxllm.plan.hlo import Instruction, Visit

__all__ = ["Collective", "axes_of", "collectives"]

_PAIRS = re.compile(r"source_target_pairs=(\{\{.*?\}\})")
_GROUPS = re.compile(
    r"replica_groups=(mesh\[[^\]]*\][^,]*\{[^}]*\}"  # axes of a named mesh
    r"|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]*\))?"  # an iota, reshaped and perhaps transposed
    r"|\{\{.*?\}\})"  # lists
)
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """All collectives of one kind over the same mesh axes.

    Attributes:
      kind: `all-gather`, `all-reduce`, `reduce-scatter`, `all-to-all` or `collective-permute`.
      axes: of the mesh; empty where the text does not say.
      devices: of one group.
      count: how often one runs in a call.
      array_bytes: of the whole arrays, all runs together.
      sent_bytes: that a device sends.
    """

    kind: str
    axes: tuple[str, ...]
    devices: int
    count: int
    array_bytes: int
    sent_bytes: float


def _kind(opcode: str) -> str | None:
    name = opcode.removesuffix("-start").removeprefix("ragged-")
    return name if name in KINDS and not opcode.endswith("-done") else None


def _groups(text: str) -> np.ndarray | None:
    """Groups [G, n] of an attribute's text: a list, an iota, or axes of a named mesh."""
    named = re.match(r"mesh\[([^\]]*)\]\s*\{([^}]*)\}", text)
    if named is not None:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named.group(1))}
        over = re.findall(r"'(\w+)'", named.group(2))
        if re.search(r"device_ids|:\(", text) or not set(over) <= set(sizes):
            return None
        ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        places = [list(sizes).index(name) for name in over]
        moved = np.moveaxis(ids, places, range(ids.ndim - len(places), ids.ndim))
        return moved.reshape(-1, math.prod(sizes[name] for name in over))
    iota = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota is not None:
        shape, dims = (tuple(int(x) for x in iota.group(i).split(",")) for i in (1, 2))
        ids = np.arange(math.prod(dims)).reshape(dims)
        if iota.group(3):
            ids = ids.transpose(tuple(int(x) for x in iota.group(3).split(",")))
        return ids.reshape(shape[0], -1)
    rows = re.findall(r"\{([\d,\s]+)\}", text)
    sizes = {row.count(",") for row in rows}
    if not rows or len(sizes) > 1:
        return None
    return np.array([[int(x) for x in row.split(",")] for row in rows])


def axes_of(one: Instruction, mesh: Mapping[str, int]) -> tuple[tuple[str, ...], int]:
    """(mesh axes that a collective goes over, devices of a group).

    Args:
      one: the instruction.
      mesh: axis sizes in the mesh's order; devices are numbered in that order.
    """
    pairs, groups = _PAIRS.search(one.attributes), _GROUPS.search(one.attributes)
    found = pairs or groups
    total = math.prod(mesh.values())
    ids = _groups(found.group(1)) if found else np.arange(total)[None]
    if ids is None or int(ids.max(initial=0)) >= total:
        return (), total
    shape = tuple(mesh.values())
    places = np.stack(np.unravel_index(ids, shape))  # [axes, G, n]
    varies = np.any(places != places[..., :1], axis=(1, 2))
    axes = tuple(name for name, moves in zip(mesh, varies, strict=True) if moves)
    devices = math.prod(mesh[name] for name in axes) if pairs else ids.shape[1]
    return axes, devices


def _is_scattered(visit: Visit) -> bool:
    """Whether a fused all-reduce is sliced at once: so a TPU's text writes a reduce-scatter."""
    inside = visit.computation.instructions
    names = {visit.instruction.name}
    for one in inside.values():
        if names & set(one.operands):
            if one.opcode == "dynamic-slice":
                return True
            names.add(one.name)
    return False


def _sizes(visit: Visit, kind: str, devices: int) -> tuple[int, float]:
    """(bytes of the whole array, bytes that a device sends) of one run."""
    one = visit.instruction
    known = (visit.computation.instructions.get(name) for name in one.operands)
    given = sum(source.size_bytes for source in known if source is not None)
    made = sum(array.size_bytes for array in one.arrays if array.dims)
    if one.opcode.endswith("-start") and kind in ("all-gather", "collective-permute"):
        made = max(made - given, 0)  # the tuple holds what goes in as well
    share = (devices - 1) / devices
    match kind:
        case "all-gather":
            return made, share * made
        case "reduce-scatter":
            return given, share * given
        case "all-reduce":
            return given, 2 * share * given
        case "all-to-all":
            return given, share * given
    return made, float(made)


def collectives(visits: Iterable[Visit], mesh: Mapping[str, int]) -> tuple[Collective, ...]:
    """Collectives that run, by kind and axes, those that send most first.

    Args:
      visits: of the program.
      mesh: axis sizes in the mesh's order.
    """
    seen: set[tuple[str, str, str]] = set()
    found: dict[tuple[str, tuple[str, ...], int], list[float]] = {}
    for visit in visits:
        one = visit.instruction
        kind = _kind(one.opcode)
        if kind is None:
            continue
        if kind == "all-reduce" and visit.fused and _is_scattered(visit):
            kind = "reduce-scatter"
        channel = one.attribute("channel_id")
        if visit.fused and channel is not None:  # a TPU's asynchronous parts name one channel
            key = (kind, channel, visit.owner)
            if key in seen:
                continue
            seen.add(key)
        axes, devices = axes_of(one, mesh)
        if devices < 2:
            continue
        whole, sent = _sizes(visit, kind, devices)
        row = found.setdefault((kind, axes, devices), [0, 0, 0.0])
        row[0] += visit.times
        row[1] += visit.times * whole
        row[2] += visit.times * sent
    made = [
        Collective(
            kind=kind,
            axes=axes,
            devices=devices,
            count=int(row[0]),
            array_bytes=int(row[1]),
            sent_bytes=row[2],
        )
        for (kind, axes, devices), row in found.items()
    ]
    return tuple(sorted(made, key=lambda c: -c.sent_bytes))
