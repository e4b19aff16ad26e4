"""The table of parameters: shape, logical axes and initial spread of every leaf of a spec.

Import, initialisation, sharding and counting all read this table; nothing else knows shapes.
Matrices are stored [in, out] ([D, N, H], [N, H, D], [D, F], ...), the embedding [V, D].
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from jaxllm.core.config import require
from jaxllm.core.tree import Segment, flatten, single_segments
from jaxllm.spec.model import Block, ModelSpec, Sub
from jaxllm.spec.op_table import adapters, norm_table, op_table, values_table
from jaxllm.spec.param import ParamDef

__all__ = [
    "FUSED",
    "block_table",
    "fuse_table",
    "fused_part",
    "layer_paths",
    "model_table",
]

FUSED: dict[str, tuple[str, ...]] = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
"""Projections of one input that a run may hold as one matrix, joined on the dim before H or F."""


def block_table(block: Block, width: int) -> dict[str, dict[str, ParamDef]]:
    """Leaves of one layer, ops and norms by name; without those that it shares."""
    table: dict[str, dict[str, ParamDef]] = {}
    for sub in block.subs:
        if sub.share is None:
            table |= _sub_table(sub, width)
        else:
            ops = {o.name: adapters(op_table(o.op, sub.width_in(width))) for o in sub.ops}
            table |= {name: own for name, own in ops.items() if own}
    return table


def _sub_table(sub: Sub, width: int) -> dict[str, dict[str, ParamDef]]:
    """Leaves of one residual update, ops and norms by name."""
    wide, after = sub.width_in(width), (f"{sub.name}_out_norm", f"{sub.name}_after_norm")
    table = {
        name: norm_table(norm, width if name in after else wide) for name, norm in sub.norms.items()
    }
    return table | {named.name: op_table(named.op, wide) for named in sub.ops}


def _shared_tables(spec: ModelSpec) -> dict[str, Any]:
    """Leaves that several layers read, by the name that they share."""
    tables: dict[str, Any] = {
        name: {"values": values_table(op, spec.width)} for name, op in spec.shared.items()
    }
    for share, subs in spec.shared_subs.items():
        found: dict[str, dict[str, ParamDef]] = {}
        for sub in subs.values():
            found |= _sub_table(sub, spec.width)
        tables[share] = {
            name: {leaf: d for leaf, d in leaves.items() if leaf not in adapters(leaves)}
            for name, leaves in found.items()
        }
    return tables


def fuse_table(table: dict[str, ParamDef]) -> dict[str, ParamDef]:
    """The leaves of an op after its fusible projections are concatenated on their output dim."""
    out = dict(table)
    for suffix in ("", "_bias"):
        for fused, parts in FUSED.items():
            names = [part + suffix for part in parts]
            if not all(name in out for name in names):
                continue
            defs = [out.pop(name) for name in names]
            dim = fused_dim(defs[0])
            shape = list(defs[0].shape)
            shape[dim] = sum(d.shape[dim] for d in defs)
            axes = list(defs[0].axes)
            axes[dim] = None
            out[fused + suffix] = dataclasses.replace(defs[0], shape=tuple(shape), axes=tuple(axes))
    return out


def fused_dim(part: ParamDef) -> int:
    """The dim (from the end) on which parts of a fused projection are concatenated."""
    return -2 if part.axes[-1] == "head_dim" else -1


def fused_part(spec: ModelSpec, path: str) -> tuple[str, tuple[Any, ...]]:
    """(unstacked path of the fused leaf that holds a leaf, the index that cuts it out).

    Raises:
      ConfigError: the leaf is part of none.
    """
    parent, _, name = path.rpartition(".")
    stem, bias = (name.removesuffix("_bias"), "_bias") if name.endswith("_bias") else (name, "")
    fused = next((f for f, parts in FUSED.items() if stem in parts), None)
    require(fused is not None, f"{path} is part of no fused projection")
    start = 0
    for part in FUSED[str(fused)]:
        definition = layer_paths(spec)[f"{parent}.{part}{bias}"]
        dim = fused_dim(definition)
        if part == stem:
            break
        start += definition.shape[dim]
    after = (slice(None),) * (-1 - dim)
    return f"{parent}.{fused}{bias}", (..., slice(start, start + definition.shape[dim]), *after)


@functools.lru_cache(maxsize=64)
def model_table(
    spec: ModelSpec, segments: tuple[Segment, ...] | None = None, fused: bool = False
) -> dict[str, Any]:
    """The whole tree of `ParamDef`s in a given segmentation (canonical by default).

    Args:
      spec: the model.
      segments: how layers are stacked; None is the canonical form, also on disk.
      fused: whether query/key/value and gate/up stand as one matrix each.
    """
    layers: dict[str, Any] = {}
    for segment in segments or spec.segments:
        units = [_layer_table(spec, segment.start + place, fused) for place in range(segment.unit)]
        if segment.stacked:
            units = [_stack_table(unit, segment.repeats) for unit in units]
        layers[segment.key] = (
            {str(i): unit for i, unit in enumerate(units)} if segment.unit > 1 else units[0]
        )
    table: dict[str, Any] = {
        "embed": {
            "table": ParamDef(
                (spec.vocab, spec.width),
                ("vocab", "width"),
                spec.width**-0.5,
                tied=spec.head.tied,
            )
        },
        "layers": layers,
    }
    table["embed"] |= _embed_tables(spec)
    if shared := _shared_tables(spec):
        table["shared"] = shared
    if spec.embedding.norm is not None:
        table["embed_norm"] = norm_table(spec.embedding.norm, spec.width)
    if spec.final_norm is not None:
        table["final_norm"] = norm_table(spec.final_norm, spec.width)
    return table | _head_tables(spec)


def _embed_tables(spec: ModelSpec) -> dict[str, ParamDef]:
    """Tables whose rows are added to those of the tokens."""
    rows = {"positions": spec.embedding.positions, "types": spec.embedding.types}
    std = spec.width**-0.5
    return {
        name: ParamDef((count, spec.width), (None, "width"), std)
        for name, count in rows.items()
        if count is not None
    }


def _head_tables(spec: ModelSpec) -> dict[str, dict[str, ParamDef]]:
    """Leaves of the head, none where it has none."""
    head, width, std = spec.head, spec.width, spec.width**-0.5
    leaves, out = {}, {}
    if head.logits and not head.tied:
        leaves["kernel"] = ParamDef((width, spec.vocab), ("width", "vocab"), std, inputs=1)
    if head.bias:
        leaves["bias"] = ParamDef((spec.vocab,), ("vocab",))
    if head.transform is not None:
        leaves["dense"] = ParamDef((width, width), ("width", None), std, inputs=1)
        if head.transform.bias:
            leaves["dense_bias"] = ParamDef((width,), ("width",))
        out["head_norm"] = norm_table(head.transform.norm, width)
    return out | ({"head": leaves} if leaves else {})


def _layer_table(spec: ModelSpec, layer: int, fused: bool) -> dict[str, dict[str, ParamDef]]:
    table = block_table(spec.block(layer), spec.width)
    return {name: fuse_table(leaves) if fused else leaves for name, leaves in table.items()}


def _stack_table(table: dict[str, dict[str, ParamDef]], repeats: int) -> dict[str, Any]:
    return {
        name: {leaf: d.stack(repeats) for leaf, d in leaves.items()}
        for name, leaves in table.items()
    }


def layer_paths(spec: ModelSpec) -> dict[str, ParamDef]:
    """Unstacked path -> definition of every leaf of the model, unfused."""
    return dict(flatten(model_table(spec, single_segments(spec.num_layers))))
