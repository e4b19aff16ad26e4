"""What one call of a compiled program does on a device: FLOPs, bytes moved, largest results.

Unlike XLA's own cost analysis, a loop's body counts as often as the loop turns.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np

from jaxllm.plan import hlo
from jaxllm.plan.hlo import Computation, Instruction
from jaxllm.plan.kept import kept_bytes
from jaxllm.plan.moved import NO_TRAFFIC, moved_bytes
from jaxllm.plan.traffic import Collective, collectives

__all__ = ["Counts", "Tensor", "count", "product_flops"]

_KERNELS = ("tpu_custom_call", "mosaic_gpu", "__cudnn$fmha")
_CUBLAS = re.compile(r'"lhs_contracting_dimensions":\[([^\]]*)\]')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """A large array: its name, type and bytes on one device."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """Of one call on one device.

    Attributes:
      flops: multiply-adds x 2 of matrix products and convolutions; those inside of kernels of ours
        are not seen.
      moved_bytes: read from and written to the main memory, each result once.
      collectives: by kind and axes.
      kernels: calls of Pallas kernels.
      unknown_loops: loops that count as one turn because their text does not say more.
      largest: intermediate results that take most.
      kept_bytes: of the forward pass's results that the backward pass takes.
    """

    flops: float
    moved_bytes: float
    collectives: tuple[Collective, ...]
    kernels: int
    unknown_loops: int
    largest: tuple[Tensor, ...]
    kept_bytes: int = 0


def _pairs(size: int, out: int, window: Mapping[str, int]) -> int:
    """Pairs of an output and a kernel place that meet a real input, along one dim."""
    places = np.arange(out)[:, None] * window["stride"] - window["pad"]
    places = places + np.arange(window["size"])[None] * window["rhs_dilate"]
    dilate = window["lhs_dilate"]
    inside = (places >= 0) & (places <= (size - 1) * dilate) & (places % dilate == 0)
    return int(inside.sum())


def _window(one: Instruction, dims: int) -> list[dict[str, int]]:
    """Size, stride, lower padding and dilations of every spatial dim."""
    found = re.search(r"window=\{([^}]*)\}", one.attributes)
    parts = dict(re.findall(r"(\w+)=(\S+)", found.group(1))) if found else {}
    out = []
    for i in range(dims):
        take = lambda name, default, i=i: parts[name].split("x")[i] if name in parts else default  # noqa: E731
        out.append(
            {
                "size": int(take("size", "1")),
                "stride": int(take("stride", "1")),
                "pad": int(take("pad", "0_0").split("_")[0]),
                "lhs_dilate": int(take("lhs_dilate", "1")),
                "rhs_dilate": int(take("rhs_dilate", "1")),
            }
        )
    return out


def _convolution(one: Instruction, lhs: tuple[int, ...], rhs: tuple[int, ...]) -> float:
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
    if labels is None:
        return 0.0
    left, right, out = labels.groups()
    made = one.arrays[0].dims
    spatial = [c for c in left if c.isdigit()]
    windows = _window(one, len(spatial))
    total = 2.0 * made[out.index("b")] * made[out.index("f")] * rhs[right.index("i")]
    for number, window in enumerate(windows):
        digit = str(number)
        total *= _pairs(lhs[left.index(digit)], made[out.index(digit)], window)
    return total


def product_flops(one: Instruction, inside: Computation) -> float:
    """Multiply-adds x 2 of one product: a `dot`, a `convolution` as which a TPU holds one, or a
    call of cuBLAS as which a GPU does; 0 of anything else."""
    library = _CUBLAS.search(one.attributes) if one.opcode == "custom-call" else None
    if one.opcode not in ("dot", "convolution") and library is None:
        return 0.0
    sources = [inside.instructions.get(name) for name in one.operands[:2]]
    if len(sources) < 2 or any(x is None or not x.arrays for x in sources):
        return 0.0
    lhs, rhs = (x.arrays[0].dims for x in sources if x is not None)
    if one.opcode == "convolution":
        return _convolution(one, lhs, rhs)
    dims = one.numbers("lhs_contracting_dims")
    if library is not None:
        dims = tuple(int(x) for x in re.findall(r"\d+", library.group(1)))
    contracted = math.prod(lhs[dim] for dim in dims)
    return 2.0 * math.prod(one.arrays[0].dims) * contracted


def _largest(found: Mapping[str, Tensor], top: int) -> tuple[Tensor, ...]:
    return tuple(sorted(found.values(), key=lambda t: -t.size_bytes)[:top])


def count(text: str, mesh: Mapping[str, int], *, top: int = 8) -> Counts:
    """Counts of a program from its text.

    Args:
      text: of the compiled program, `compiled.as_text()`.
      mesh: axis sizes in the mesh's order; empty for one device.
      top: how many of the largest results to name.
    """
    module = hlo.parse(text)
    every = list(hlo.visits(module))
    flops = moved = 0.0
    kernels = unknown = 0
    large: dict[str, Tensor] = {}
    for visit in every:
        one = visit.instruction
        flops += visit.times * product_flops(one, visit.computation)
        if one.opcode == "custom-call":
            kernels += visit.times * any(name in one.attributes for name in _KERNELS)
        elif one.opcode == "while":
            unknown += hlo.trips(module, one, visit.computation) is None
        if visit.fused:
            continue
        moved += visit.times * moved_bytes(module, visit)
        if one.opcode not in NO_TRAFFIC and not one.opcode.endswith("-start"):
            for array in one.arrays:
                size = array.size_bytes if array.space == 0 else 0
                name = _short(one.op_name or one.name)
                if size > getattr(large.get(name), "size_bytes", 0):
                    large[name] = Tensor(
                        name=name, dtype=array.dtype, shape=array.dims, size_bytes=size
                    )
    return Counts(
        flops=flops,
        moved_bytes=moved,
        collectives=collectives(every, mesh) if mesh else (),
        kernels=kernels,
        unknown_loops=unknown,
        largest=_largest(large, top),
        kept_bytes=kept_bytes(module),
    )


def _short(op_name: str) -> str:
    """A traced path without the wrappers that every one has."""
    dull = re.compile(r"^(jit\(.*\)|while|body|closed_call|eval_jaxpr|checkpoint|shard_map)$")
    parts = [part for part in op_name.split("/") if not dull.match(part)]
    return "/".join(parts) or op_name
