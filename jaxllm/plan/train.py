"""Planning a training step."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jaxllm.core.config import require
from jaxllm.core.mesh import AXES, make_mesh, parse_mesh
from jaxllm.plan.compiled import Parts, Work, plan_program
from jaxllm.plan.place import Place
from jaxllm.plan.result import Plan, ProgramPlan
from jaxllm.spec.cost import num_params
from jaxllm.train.config import RunConfig
from jaxllm.train.devices import row_flops
from jaxllm.train.memory import remat_order
from jaxllm.train.programs import plan_programs

__all__ = ["general_notes", "nearest_mesh", "plan_step", "plan_training", "present", "settle"]

SETTINGS = (
    "batch", "accumulate", "length", "remat", "layout", "fused", "dtype", "param_dtype",
    "attention", "sharding", "sequence_parallel",
)  # fmt: skip


def settle(config: RunConfig, place: Place, mesh: str | None = None) -> tuple[RunConfig, list[str]]:
    """The config on the place's mesh, and notes on what had to change for it.

    Without a mesh that names all devices, `fsdp` takes them. A batch that the mesh does not divide
    is raised to the next one that it does.

    Raises:
      ConfigError: a mesh of another number of devices, or one that the model cannot be split over.
    """
    notes = []
    devices = len(place.devices)
    text = mesh or config.mesh
    sizes = parse_mesh(text)
    if mesh is None and math.prod(sizes.values()) != devices:
        text = "" if devices == 1 else f"fsdp={devices}"
        if sizes:
            notes.append(f"mesh: the config's {config.mesh!r} is not for {devices} devices")
        sizes = parse_mesh(text)
    require(
        math.prod(sizes.values()) == devices,
        f"mesh {text!r} is of {math.prod(sizes.values())} devices, {place.name} has {devices}; "
        f"the nearest is {nearest_mesh(sizes, devices)!r}",
    )
    rows = math.prod(sizes.get(axis, 1) for axis in ("data", "fsdp", "expert")) * config.accumulate
    batch = -(-config.batch // rows) * rows
    if batch != config.batch:
        notes.append(f"batch: {config.batch} rows do not divide over {text}; planned with {batch}")
    return dataclasses.replace(config, mesh=text, batch=batch), notes


def nearest_mesh(sizes: dict[str, int], devices: int) -> str:
    """A mesh of that many devices: axes cut down to divisors, what is left over in the largest."""
    left, out = devices, {}
    for axis in sorted(sizes, key=lambda a: AXES.index(a), reverse=True):
        out[axis] = math.gcd(sizes[axis], left)
        left //= out[axis]
    grown = max(sizes, key=lambda a: sizes[a], default="fsdp")
    grown = next((axis for axis in ("fsdp", "data") if axis in sizes), grown)
    out[grown] = out.get(grown, 1) * left
    return ",".join(f"{axis}={out[axis]}" for axis in AXES if axis in out)


def plan_step(config: RunConfig, place: Place) -> ProgramPlan:
    """The step of a settled config with a remat policy that is named."""
    sizes = parse_mesh(config.mesh)
    mesh: Any = None if place.alone else make_mesh(sizes, place.devices)
    step = plan_programs(config, mesh).step
    state = step.args[0]
    work = Work(
        name="step",
        tokens=config.batch * config.length,
        flops=config.batch * row_flops(config.spec, config.length),
        dtype=config.dtype,
    )
    axes = {axis: sizes.get(axis, 1) for axis in AXES} if mesh is not None else {}
    parts = Parts(parameters=state.params, optimizer=state.opt_state)
    return plan_program(step, place, work, parts=parts, mesh=axes)


def _cost(policy: str, step: ProgramPlan, devices: int) -> tuple[str, int, Any, Any]:
    seconds = None if step.time is None else step.time.seconds
    flops = None if step.counts is None else step.counts.flops * devices / step.needed_flops
    return policy, step.memory.total, flops, seconds


def plan_training(
    config: RunConfig, place: Place, *, source: str, mesh: str | None = None, every: bool = False
) -> Plan:
    """The plan of a run's step: with remat `auto`, of the first policy that fits.

    Args:
      config: the run.
      place: the devices.
      source: its name for readers.
      mesh: text that takes the place of the config's.
      every: compile every remat policy, to compare them.

    Raises:
      ConfigError: as `settle`.
    """
    config, notes = settle(config, place, mesh)
    devices = len(place.devices)
    order = remat_order(config, place.platform) if config.remat == "auto" else (config.remat,)
    tried: dict[str, ProgramPlan] = {}
    for policy in order:
        tried[policy] = plan_step(dataclasses.replace(config, remat=policy), place)
        if tried[policy].fits is not False:
            break
    fitting = [policy for policy, step in tried.items() if step.fits is not False]
    chosen = fitting[0] if fitting else min(tried, key=lambda p: tried[p].memory.total)
    if every:
        for policy in ("none", "save_dots", "save_attention", "full"):
            if policy not in tried:
                tried[policy] = plan_step(dataclasses.replace(config, remat=policy), place)
    config = dataclasses.replace(config, remat=chosen)
    remat = tuple(_cost(policy, one, devices) for policy, one in tried.items())
    made = present(config, tried[chosen], place, source=source)
    return dataclasses.replace(made, remat=remat, notes=(*notes, *made.notes))


_TILE = 128
"""Values along the last dim of a TPU's tile."""


def _narrow(config: RunConfig, place: Place) -> list[str]:
    """A note where `fsdp` cuts the width finer than a TPU's tiles."""
    fsdp, width = parse_mesh(config.mesh).get("fsdp", 1), config.spec.width
    if place.platform != "tpu" or fsdp == 1 or width // fsdp >= _TILE:
        return []
    line = (
        f"fsdp={fsdp} leaves {width // fsdp} of {width} values a device, less than a tile of "
        f"{_TILE}: XLA then gathers by all-reduce, which sends twice as much; fsdp up to "
        f"{max(1, width // _TILE)}, with data for the other devices, does not"
    )
    return [line]


def present(config: RunConfig, step: ProgramPlan, place: Place, *, source: str) -> Plan:
    """The plan of a settled config whose step was compiled."""
    devices = len(place.devices)
    return Plan(
        source=source,
        purpose="train",
        place=place.name,
        kind=place.kind,
        devices=devices,
        mesh={axis: size for axis, size in parse_mesh(config.mesh).items() if size > 1},
        settings={name: getattr(config, name) for name in SETTINGS},
        num_params=num_params(config.spec),
        programs=(step,),
        remat=(_cost(config.remat, step, devices),),
        notes=(*_narrow(config, place), *general_notes(place, step)),
    )


def general_notes(place: Place, *programs: ProgramPlan) -> list[str]:
    """What limits the numbers of these programs."""
    notes = []
    if place.estimated:
        notes.append(
            f"memory is estimated: {place.kind} is not here, and a CPU program stands in, whose "
            "attention only takes and gives what a kernel does; XLA fuses otherwise there, and how "
            "much memory traffic the GPU's own program would have is not known"
        )
    for program in programs:
        counts = program.counts
        if counts is None:
            notes.append(f"{program.name}: the compiler refused it; only its temporaries are known")
        elif counts.unknown_loops:
            notes.append(
                f"{program.name}: {counts.unknown_loops} loops of unknown turns count once"
            )
        if counts is not None and counts.kernels:
            notes.append(
                f"{program.name}: {counts.kernels} kernel calls, whose FLOPs are taken from the "
                "analytic count"
            )
    return notes
