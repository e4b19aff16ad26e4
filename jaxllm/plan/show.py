"""A plan on the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from jaxllm.plan.result import Plan, ProgramPlan

__all__ = ["VERDICT", "gib", "milliseconds", "percent", "print_plan", "print_search", "quantity"]

_GIB = 2**30


def gib(number: int | float | None) -> str:
    """Bytes in GiB; small ones in MiB."""
    if number is None:
        return "unknown"
    return f"{number / _GIB:.2f} GiB" if number >= 0.1 * _GIB else f"{number / 2**20:.2f} MiB"


def milliseconds(seconds: float | None) -> str:
    """Seconds in ms."""
    return "unknown" if seconds is None else f"{1e3 * seconds:.2f} ms"


def percent(share: float | None) -> str:
    """A share of 1."""
    return "unknown" if share is None else f"{100 * share:.1f} %"


def quantity(number: int | float) -> str:
    """A count with a prefix: 1.24 G."""
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f} {letter}"
    return f"{number:.0f}"


VERDICT = {True: "fits", False: "does not fit", None: "memory of the device unknown"}
"""Words for whether a plan fits."""


def _memory(program: ProgramPlan) -> Table:
    memory = program.memory
    table = Table(title=f"{program.name}: memory of a device", title_justify="left")
    table.add_column("part")
    table.add_column("size", justify="right")
    for name, size in memory.parts.items():
        if size:
            table.add_row(name, gib(size))
    mark = " (estimated)" if memory.estimated else ""
    table.add_section()
    table.add_row(f"total{mark}", gib(memory.total))
    table.add_row("device", gib(memory.limit))
    return table


def _facts(program: ProgramPlan, devices: int) -> list[str]:
    lines = [f"needed {quantity(program.needed_flops / devices)}FLOP a device"]
    counts, time = program.counts, program.time
    if counts is None or time is None:
        return lines
    lines[0] += f", executed {quantity(counts.flops)}FLOP, moved {quantity(counts.moved_bytes)}B"
    lines.append(
        f"least time: compute {milliseconds(time.compute_s)}, memory "
        f"{milliseconds(time.memory_s)}, network {milliseconds(time.network_s)}"
        + (f"; bound by {time.bound_by}" if time.bound_by else "")
    )
    if time.mfu_bound is not None and program.tokens_per_s is not None:
        lines.append(
            f"at most {program.tokens_per_s:,.0f} tokens/s, MFU at most {percent(time.mfu_bound)}"
        )
    return lines


def _collectives(program: ProgramPlan) -> Table | None:
    counts = program.counts
    if counts is None or not counts.collectives:
        return None
    table = Table(title=f"{program.name}: collectives of a call", title_justify="left")
    for name in ("kind", "mesh axes", "devices", "count", "sent by a device"):
        table.add_column(name, justify="left" if name in ("kind", "mesh axes") else "right")
    for one in counts.collectives[:10]:
        axes = ", ".join(one.axes) or "?"
        table.add_row(one.kind, axes, str(one.devices), str(one.count), gib(one.sent_bytes))
    return table


def _largest(program: ProgramPlan) -> Table:
    table = Table(title=f"{program.name}: largest arrays of a device", title_justify="left")
    for name in ("array", "type", "size"):
        table.add_column(name, overflow="fold")
    results = program.counts.largest if program.counts is not None else ()
    for kind, tensors in (("argument", program.arguments[:5]), ("result", results[:5])):
        for one in tensors:
            shape = "x".join(map(str, one.shape))
            table.add_row(f"{kind} {one.name}", f"{one.dtype} {shape}", gib(one.size_bytes))
    return table


def _costs(plan: Plan) -> Table:
    table = Table(title="remat policies", title_justify="left")
    for name in ("policy", "memory", "executed / needed FLOP", "least time"):
        table.add_column(name, justify="left" if name == "policy" else "right")
    for policy, size, ratio, seconds in plan.remat:
        shown = "refused" if ratio is None else f"{ratio:.2f}"
        table.add_row(policy, gib(size), shown, milliseconds(seconds))
    return table


def _serving(plan: Plan, console: Console) -> None:
    serving = plan.serving
    if serving is None:
        return
    room = serving.kv_capacity_tokens
    console.print(
        f"keys and values: {serving.kv_bytes_per_token:,.0f} bytes a token; room for "
        f"{'unknown' if room is None else f'{room:,}'} tokens on {plan.devices} devices"
    )
    waste = ", ".join(f"{size}: {percent(share)}" for size, share in serving.waste)
    console.print(f"mean padding of prompts by bucket: {waste}")


def print_plan(plan: Plan, console: Any = None) -> None:
    """Tables of a plan.

    Args:
      plan: what to show.
      console: of rich; standard output by default.
    """
    console = console or Console(highlight=False)
    mesh = ", ".join(f"{axis}={size}" for axis, size in plan.mesh.items()) or "one device"
    console.print(
        f"{plan.source} ({quantity(plan.num_params)} parameters) to {plan.purpose} on "
        f"{plan.place}: {plan.devices} x {plan.kind}, mesh {mesh}"
    )
    console.print(", ".join(f"{name} {value}" for name, value in plan.settings.items()))
    for program in plan.programs:
        console.print(_memory(program))
        for line in _facts(program, plan.devices):
            console.print(line)
        traffic = _collectives(program)
        if traffic is not None:
            console.print(traffic)
        console.print(_largest(program))
    if len(plan.remat) > 1:
        console.print(_costs(plan))
    _serving(plan, console)
    for note in plan.notes:
        console.print(f"note: {note}")
    console.print(f"verdict: {VERDICT[plan.fits]}")


def print_search(trials: Any, console: Any = None, *, more: int = 3) -> None:
    """The table of a search's compiled trials and of a few that were left out."""
    console = console or Console(highlight=False)
    table = Table(title="search", title_justify="left")
    for name in ("mesh", "sharding", "batch", "remat", "memory", "tokens/s at most", "verdict"):
        table.add_column(name, overflow="fold")
    top = sum(trial.step is not None for trial in trials) + more
    for trial in trials[:top]:
        config, step = trial.config, trial.step
        rate = None if step is None else step.tokens_per_s
        table.add_row(
            config.mesh or "one device",
            config.sharding,
            str(config.batch),
            config.remat,
            "" if step is None else gib(step.memory.total),
            "" if rate is None else f"{rate:,.0f}",
            trial.verdict,
        )
    console.print(table)
    if len(trials) > top:
        console.print(f"and {len(trials) - top} more that the cost model puts behind these")
