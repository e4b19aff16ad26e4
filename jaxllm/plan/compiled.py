"""Compiling a described program for a place, and reading off what it takes."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Mapping
from typing import Any

import jax

from jaxllm.aot.program import Program
from jaxllm.aot.report import Report, report_of
from jaxllm.core.logging import log
from jaxllm.plan.counts import Counts, Tensor, count
from jaxllm.plan.place import Place
from jaxllm.plan.result import Memory, ProgramPlan, Roofline

__all__ = ["Parts", "Work", "device_bytes", "plan_program"]

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_USED = re.compile(r"(?:HLO temporaries \(|Used )([\d.]+)([KMGT]?)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """Trees of abstract arguments, by what they are; the rest of the arguments is `other`."""

    parameters: Any
    optimizer: Any = ()
    state: Any = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What one call is for.

    Attributes:
      name: of the program.
      tokens: over all devices.
      flops: needed, over all devices.
      dtype: of matmul inputs.
    """

    name: str
    tokens: int
    flops: float
    dtype: str


def device_bytes(x: Any) -> int:
    """Bytes of an abstract array on one device."""
    sharding = getattr(x, "sharding", None)
    shape = x.shape if sharding is None else sharding.shard_shape(x.shape)
    return math.prod(shape) * x.dtype.itemsize


def _total(tree: Any) -> int:
    return sum(device_bytes(x) for x in jax.tree.leaves(tree))


def _arguments(args: Any, top: int) -> tuple[Tensor, ...]:
    """The largest arguments by their paths."""
    out = []
    for path, x in jax.tree_util.tree_flatten_with_path(args)[0]:
        sharding = getattr(x, "sharding", None)
        shape = x.shape if sharding is None else sharding.shard_shape(x.shape)
        name = re.sub(r"\['([^']*)'\]", r".\1", jax.tree_util.keystr(path))
        name = re.sub(r"^\[\d+\]\.?", "", name)
        out.append(
            Tensor(name=name, dtype=str(x.dtype), shape=tuple(shape), size_bytes=device_bytes(x))
        )
    return tuple(sorted(out, key=lambda t: -t.size_bytes)[:top])


def _refused(error: Exception) -> int | None:
    """Bytes of temporaries that a compiler asked for in vain, or None if that is not the error."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text and "Ran out of memory" not in text:
        return None
    found = _USED.search(text)
    return int(float(found.group(1)) * _UNITS[found.group(2)]) if found else 0


def _roofline(counts: Counts, work: Work, place: Place) -> Roofline:
    devices = len(place.devices)
    peak, limits = place.peak(work.dtype), place.limits
    compute = moved = sent = None
    if peak is not None:
        compute = max(counts.flops, work.flops / devices) / peak
    if limits is not None and limits.memory_bytes_per_s and not place.estimated:
        moved = counts.moved_bytes / limits.memory_bytes_per_s
    if limits is not None and limits.link_bytes_per_s:
        sent = sum(c.sent_bytes for c in counts.collectives) / limits.link_bytes_per_s
    time_ = Roofline(compute_s=compute, memory_s=moved, network_s=sent, mfu_bound=None)
    if peak is None or not time_.seconds:
        return time_
    bound = work.flops / devices / peak / time_.seconds
    return dataclasses.replace(time_, mfu_bound=bound)


def plan_program(
    program: Program, place: Place, work: Work, *, parts: Parts, mesh: Mapping[str, int]
) -> ProgramPlan:
    """Compile a program for a place and say what it takes; nothing is allocated.

    Args:
      program: with abstract arguments on the place's devices.
      place: what is compiled for.
      work: what a call does.
      parts: which arguments are parameters, optimizer state and model state.
      mesh: axis sizes in the mesh's order.
    """
    log.info("plan: compiling %s for %s", work.name, place.name)
    start = time.perf_counter()
    refused, report, counts = None, Report(), None
    with place.traced():
        lowered = program.lower()
    try:
        compiled = lowered.compile(dict(program.options) or None)
    except jax.errors.JaxRuntimeError as error:
        refused = _refused(error)
        if refused is None:
            raise
        report = Report(temporary_bytes=refused)
    else:
        report = report_of(compiled, time.perf_counter() - start)
        counts = count(compiled.as_text(), mesh)
    known = (_total(parts.parameters), _total(parts.optimizer), _total(parts.state))
    limit = None if place.limits is None else place.limits.memory_bytes
    memory = Memory(
        parameters=known[0],
        optimizer=known[1],
        state=known[2],
        other_arguments=max(0, (report.argument_bytes or _total(program.args)) - sum(known)),
        outputs=max(0, report.output_bytes - report.aliased_bytes),
        temporaries=report.temporary_bytes,
        code=report.code_bytes,
        limit=limit,
        estimated=place.estimated,
        activations=min(report.temporary_bytes, 0 if counts is None else counts.kept_bytes),
    )
    fits = False if refused is not None else None if limit is None else memory.total <= limit
    return ProgramPlan(
        name=work.name,
        tokens=work.tokens,
        needed_flops=work.flops,
        memory=memory,
        counts=counts,
        time=None if counts is None else _roofline(counts, work, place),
        arguments=_arguments(program.args, 8),
        fits=fits,
        compile_s=time.perf_counter() - start,
    )
