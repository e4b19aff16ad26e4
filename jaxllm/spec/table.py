"""The table of parameters: shape, logical axes and initial spread of every leaf of a spec.

Import, initialisation, sharding and counting all read this table; nothing else knows shapes.
Matrices are stored [in, out] ([D, N, H], [N, H, D], [D, F], ...), the embedding [V, D].
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

from jaxllm.core.config import require
from jaxllm.core.tree import Segment, flatten, single_segments
from jaxllm.spec.model import Block, ModelSpec
from jaxllm.spec.ops import MLP, Attention, Norm, Op

__all__ = [
    "FUSED",
    "ParamDef",
    "block_table",
    "fuse_table",
    "fused_part",
    "layer_paths",
    "model_table",
    "norm_table",
    "op_table",
]

FUSED: dict[str, tuple[str, ...]] = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
"""Projections of one input that a run may hold as one matrix, joined on the dim before H or F."""


@dataclasses.dataclass(frozen=True)
class ParamDef:
    """One leaf: its logical shape, the name of each dim, and how it is drawn at the start.

    `std` is the standard deviation of a normal draw; 0 with `fill` gives a constant. `inputs`
    counts the contracted dims of a matrix (before the outputs, after a layers axis); it is 0 for
    vectors and tables. `tied` marks an embedding table that is the head as well.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    std: float = 0.0
    fill: float = 0.0
    inputs: int = 0
    tied: bool = False

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    def stack(self, repeats: int) -> ParamDef:
        """The same leaf stacked on a leading axis of layers."""
        return dataclasses.replace(self, shape=(repeats, *self.shape), axes=("layers", *self.axes))

    def hold(self, matrices: str) -> ParamDef:
        """The leaf as its array is held under `Policy.matrices`."""
        order = self.hold_order(matrices)
        return dataclasses.replace(
            self,
            shape=tuple(self.shape[i] for i in order),
            axes=tuple(self.axes[i] for i in order),
        )

    def hold_order(self, matrices: str) -> tuple[int, ...]:
        """Which of the leaf's dims stands where in the held array."""
        dims = tuple(range(len(self.shape)))
        if not self.held_inputs(matrices):
            return dims
        if self.tied:
            return dims[::-1]
        lead = int(self.axes[0] == "layers")
        stop = lead + self.inputs
        return (*dims[:lead], *dims[stop:], *dims[lead:stop])

    def held_inputs(self, matrices: str) -> int:
        """Number of leading dims that the held array has at its end; 0 where it is as it is."""
        if self.tied:
            return int(matrices == "in_out")
        return self.inputs if matrices == "out_in" else 0

    def unstack(self) -> ParamDef:
        """The leaf of one layer of a stacked one."""
        return dataclasses.replace(self, shape=self.shape[1:], axes=self.axes[1:])


def norm_table(norm: Norm, width: int) -> dict[str, ParamDef]:
    """Leaves of a norm over D values."""
    table = {"scale": ParamDef((width,), ("width",), fill=1.0 - norm.offset)}
    if norm.bias:
        table["bias"] = ParamDef((width,), ("width",))
    return table


def op_table(op: Op, width: int) -> dict[str, ParamDef]:
    """Leaves of one op on inputs of width D."""
    match op:
        case Attention():
            n, k, h = op.heads, op.kv_heads, op.head_dim
            std = width**-0.5
            table = {
                "q": ParamDef((width, n, h), ("width", "heads", "head_dim"), std, inputs=1),
                "k": ParamDef((width, k, h), ("width", "kv_heads", "head_dim"), std, inputs=1),
                "v": ParamDef((width, k, h), ("width", "kv_heads", "head_dim"), std, inputs=1),
                "o": ParamDef(
                    (n, h, width), ("heads", "head_dim", "width"), (n * h) ** -0.5, inputs=2
                ),
            }
            if op.qkv_bias:
                table["q_bias"] = ParamDef((n, h), ("heads", "head_dim"))
                table["k_bias"] = ParamDef((k, h), ("kv_heads", "head_dim"))
                table["v_bias"] = ParamDef((k, h), ("kv_heads", "head_dim"))
            if op.out_bias:
                table["o_bias"] = ParamDef((width,), ("width",))
            if op.gate:
                table["out_gate"] = table["q"]
            if op.sinks:
                table["sinks"] = ParamDef((n,), ("heads",))
            if op.global_projections:
                own = [x for x in table if x.removesuffix("_bias") in ("q", "k", "v")]
                table |= {f"{x[0]}_global{x[1:]}": table[x] for x in own}
            if op.length_projection is not None:
                length, rows = op.length_projection.length, op.length_projection.rows
                sums = ParamDef((length, rows), (None, None), length**-0.5)
                table |= {"k_length": sums, "v_length": sums}
            return table | _qk_norm_table(op)
        case MLP():
            up = ParamDef((width, op.width), ("width", "ffn"), width**-0.5, inputs=1)
            table = {"gate": up} if op.gated else {}
            down = ParamDef((op.width, width), ("ffn", "width"), op.width**-0.5, inputs=1)
            table |= {"up": up, "down": down}
            if op.bias:
                bias = ParamDef((op.width,), ("ffn",))
                table |= {"gate_bias": bias} if op.gated else {}
                table |= {"up_bias": bias, "down_bias": ParamDef((width,), ("width",))}
            return table


def _qk_norm_table(op: Attention) -> dict[str, ParamDef]:
    """Leaves of the norms of queries and keys."""
    norm, h = op.qk_norm, op.head_dim
    if norm is None or not norm.scale:
        return {}
    one = 1.0 - norm.offset
    if norm.over == "head":
        shared = ParamDef((h,), ("head_dim",), fill=one)
        return {"q_norm": shared, "k_norm": shared}
    return {
        "q_norm": ParamDef((op.heads, h), ("heads", "head_dim"), fill=one),
        "k_norm": ParamDef((op.kv_heads, h), ("kv_heads", "head_dim"), fill=one),
    }


def block_table(block: Block, width: int) -> dict[str, dict[str, ParamDef]]:
    """Leaves of one layer: ops and norms by name."""
    table: dict[str, dict[str, ParamDef]] = {}
    for sub in block.subs:
        table |= {name: norm_table(norm, width) for name, norm in sub.norms.items()}
        table |= {named.name: op_table(named.op, width) for named in sub.ops}
    return table


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
