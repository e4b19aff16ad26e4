"""What to change when a plan does not fit, or what room is left: plain sentences, best first."""

from __future__ import annotations

import math
from typing import Any

from jaxllm.plan.result import Plan, ProgramPlan
from jaxllm.plan.show import gib

__all__ = ["explain"]

_SCORES = "BKMS"
"""Einsum letters of attention scores in the names of their products."""


def _bounded(program: ProgramPlan) -> str | None:
    time = program.time
    if time is None or time.seconds is None:
        return None
    advice = {
        "compute": "it is bound by the matrix units: only less work or more devices help",
        "memory": "it is bound by memory traffic: more rows a device share each read of the "
        "weights, and a fused attention kernel keeps scores out of memory",
        "network": "it is bound by the links: more rows a device, or a smaller fsdp or tensor "
        "axis, send less for each token",
    }
    kind = time.bound_by
    return None if kind is None else f"{program.name}: {advice[kind]}"


def _scores(program: ProgramPlan, attention: Any) -> str | None:
    largest = () if program.counts is None else program.counts.largest
    found = next((t for t in largest if _SCORES in t.name), None)
    if found is None or attention not in ("auto", "reference"):
        return None
    return (
        f"{program.name}: attention scores lie in memory ({gib(found.size_bytes)} each); a fused "
        "kernel never writes them: --attention mosaic_tpu (TPU), cudnn or mosaic_gpu (GPU)"
    )


def _logits(program: ProgramPlan, vocab_like: int = 16_384) -> str | None:
    """Large arrays with a dim that can only be a vocabulary."""
    largest = () if program.counts is None else program.counts.largest
    found = next(
        (t for t in largest if t.shape and max(t.shape) >= vocab_like and "dot_general" in t.name),
        None,
    )
    if found is None or program.memory.limit is None:
        return None
    if found.size_bytes < 0.1 * program.memory.limit:
        return None
    return (
        f"{program.name}: logits of a chunk take {gib(found.size_bytes)}; a smaller "
        "loss.chunk_tokens, logit_dtype=bfloat16 or a tensor axis cuts them"
    )


def _training(plan: Plan, step: ProgramPlan) -> list[str]:
    memory, limit = step.memory, step.memory.limit
    if limit is None:
        return []
    lines = []
    others = [(policy, size) for policy, size, *_ in plan.remat if policy != plan.settings["remat"]]
    better = [f"{policy} takes {gib(size)}" for policy, size in others if size <= limit]
    if better:
        lines.append(f"another remat policy fits: {', '.join(better)}")
    fixed = memory.total - memory.temporaries
    if fixed < limit:
        parts = math.ceil(memory.temporaries / (limit - fixed))
        rows = plan.settings["batch"] // plan.devices
        hint = f"--set accumulate={parts}" if rows >= parts else "a shorter --length"
        lines.append(
            f"temporaries of {gib(memory.temporaries)} shrink about with the tokens at a time: "
            f"{hint}, or 1/{parts} of the batch"
        )
    else:
        lines.append(
            f"parameters, optimizer and code alone take {gib(fixed)}, more than the device: shard "
            "them over more devices (a larger fsdp or tensor axis)"
        )
    if plan.settings["param_dtype"] == "float32":
        saved = (memory.parameters + memory.optimizer) // 2
        lines.append(
            f"--set param_dtype=bfloat16 saves {gib(saved)}; small updates are then rounded away"
        )
    more = math.ceil(memory.total / limit)
    lines.append(f"{more} times as many devices at the same batch would hold it")
    return lines


def _serving(plan: Plan, worst: ProgramPlan) -> list[str]:
    memory, limit = worst.memory, worst.memory.limit
    if limit is None:
        return []
    if memory.parameters > 0.9 * limit:
        devices = plan.devices * math.ceil(memory.parameters / (0.8 * limit))
        line = (
            f"the weights alone take {gib(memory.parameters)} of {gib(limit)}: split them over "
            f"{devices} devices or more, or quantize (int8 halves them, int4 quarters them)"
        )
        return [line]
    need = max(memory.total - memory.parameters, 1)
    share = (limit - memory.parameters) / need
    return [f"a batch or context of {max(share, 0):.2f} of what was asked would fit"]


def explain(plan: Plan) -> list[str]:
    """Sentences on what bounds a plan and what to change; the verdict first."""
    lines = []
    for program in plan.programs:
        limit, total = program.memory.limit, program.memory.total
        if program.fits is False and limit is not None:
            lines.append(
                f"{program.name} needs {gib(total)} of a device's {gib(limit)}: "
                f"{gib(max(total - limit, 0))} too much"
            )
        elif program.fits and limit is not None:
            lines.append(f"{program.name} leaves {gib(limit - total)} of {gib(limit)} free")
    bad = [program for program in plan.programs if program.fits is False]
    if bad:
        worst = max(bad, key=lambda p: p.memory.total)
        lines += _training(plan, worst) if plan.purpose == "train" else _serving(plan, worst)
    for program in plan.programs:
        found = (
            _scores(program, plan.settings.get("attention")),
            _logits(program) if plan.purpose == "train" else None,
            _bounded(program),
        )
        lines += [line for line in found if line]
    return lines
