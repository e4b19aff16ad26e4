"""Looking for the fastest run that fits: mesh shapes, sharding tables, batch and remat."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

from jaxllm.core.config import require
from jaxllm.core.logging import log
from jaxllm.core.mesh import make_mesh
from jaxllm.errors import ConfigError
from jaxllm.plan.model import Guess, guess
from jaxllm.plan.place import Place
from jaxllm.plan.result import ProgramPlan
from jaxllm.plan.show import gib
from jaxllm.plan.train import plan_step
from jaxllm.train.config import RunConfig
from jaxllm.train.mesh import tensor_sizes

__all__ = ["Found", "Trial", "candidates", "search"]

_ROWS = (1, 2, 4, 8, 16)
_REMATS = ("none", "save_dots", "save_attention", "full")
_ROOM = 1.5
"""The model's memory is rough: what it puts above this many times the device is not compiled."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """One way to run.

    Attributes:
      config: of the run.
      guess: by the cost model.
      step: compiled; None where it was not.
      verdict: `fastest`, or why it lost.
    """

    config: RunConfig
    guess: Guess
    step: ProgramPlan | None = None
    verdict: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        config, step = self.config, self.step
        return {
            "mesh": config.mesh,
            "sharding": config.sharding,
            "batch": config.batch,
            "remat": config.remat,
            "guessed_tokens_per_s": self.guess.tokens_per_s,
            "guessed_bytes": self.guess.memory_bytes,
            "tokens_per_s": None if step is None else step.tokens_per_s,
            "bytes": None if step is None else step.memory.total,
            "fits": None if step is None else step.fits,
            "verdict": self.verdict,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """What a search found.

    Attributes:
      best: the fastest that fits, or None.
      trials: all, the compiled ones first, each with why it lost.
    """

    best: Trial | None
    trials: tuple[Trial, ...]

    @property
    def shown(self) -> tuple[RunConfig, ProgramPlan]:
        """The best run and its step; where none fits, the one that needs least."""
        known = [(t.config, t.step) for t in self.trials if t.step is not None]
        if self.best is not None and self.best.step is not None:
            return self.best.config, self.best.step
        return min(known, key=lambda pair: pair[1].memory.total)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _lies(sizes: dict[str, int], place: Place) -> bool:
    """Whether a place holds a mesh; a TPU's torus does not hold all."""
    try:
        make_mesh(sizes, place.devices)
    except ConfigError:
        return False
    return True


def _meshes(config: RunConfig, place: Place) -> Iterator[tuple[str, str]]:
    """(mesh, sharding table) of all ways to lay devices out."""
    devices = len(place.devices)
    tensors = [n for n in tensor_sizes(config.spec) if devices % n == 0 and n <= 16]
    for tensor in tensors:
        for fsdp in _divisors(devices // tensor):
            data = devices // tensor // fsdp
            axes = {"data": data, "fsdp": fsdp, "tensor": tensor}
            text = ",".join(f"{axis}={size}" for axis, size in axes.items() if size > 1)
            if not _lies(axes, place):
                continue
            yield text, "zero3"
            if fsdp > 1:
                yield text, "zero1" if data == 1 else "hybrid"


def candidates(config: RunConfig, place: Place, *, batch: int | None) -> list[Trial]:
    """All ways that the model allows, the fastest by the cost model first; hopeless ones last.

    Args:
      config: the run; its mesh, table, batch and remat are varied.
      place: the devices.
      batch: rows of a step; None tries 1 to 16 a group of devices that share a row.

    Raises:
      ConfigError: the device's peaks are not known, or nothing is allowed.
    """
    limits = place.limits
    require(
        limits is not None and place.peak(config.dtype) is not None,
        f"--search: peak and bandwidths of {place.kind} in {config.dtype} are not known",
    )
    assert limits is not None
    devices, trials = len(place.devices), []
    for (mesh, table), remat in itertools.product(_meshes(config, place), _REMATS):
        tensor = int(mesh.partition("tensor=")[2] or 1)
        wanted = [rows * devices // tensor * config.accumulate for rows in _ROWS]
        for rows in wanted if batch is None else [batch]:
            changes = {"mesh": mesh, "sharding": table, "batch": rows, "remat": remat}
            if tensor > 1:
                changes["fused"] = False
            try:
                made = dataclasses.replace(config, **changes)
            except ConfigError:  # this model cannot be laid out so
                continue
            trials.append(Trial(config=made, guess=guess(made, place)))
    require(bool(trials), f"--search: no mesh of {devices} devices fits this model and batch")
    room = _ROOM * limits.memory_bytes
    return sorted(
        trials,
        key=lambda t: (t.guess.memory_bytes > room, -t.guess.tokens_per_s, t.guess.memory_bytes),
    )


def _why(trial: Trial, best: Trial | None) -> str:
    """Why a trial lost, or that it won."""
    step = trial.step
    if step is None:
        rate = trial.guess.tokens_per_s
        if best is None:
            return f"not compiled: {rate:,.0f} tokens/s by the cost model"
        return f"not compiled: {rate / best.guess.tokens_per_s:.2f} of the best by the cost model"
    if step.fits is False:
        return f"needs {gib(step.memory.total)} of {gib(step.memory.limit)}"
    if best is None or best.step is None or best is trial:
        return "the fastest that fits"
    slower = (best.step.tokens_per_s or 0.0) / (step.tokens_per_s or 1.0)
    bound = None if step.time is None else step.time.bound_by
    if slower < 1.005:
        ratio = _serial_s(trial) / _serial_s(best)
        return f"the same bound, but {ratio:.2f} x the time where nothing overlaps"
    return f"{slower:.2f} x slower, bound by {bound}"


def search(config: RunConfig, place: Place, *, batch: int | None, tries: int) -> Found:
    """Compile the promising ways to run, at most `tries`, and say why the others lost.

    Where a step turns out larger than the cost model said, the model's memory is scaled by that
    before the next is chosen.

    Args:
      config: the run; its mesh, table, batch and remat are varied.
      place: the devices.
      batch: rows of a step, or None to vary them.
      tries: steps to compile.

    Raises:
      ConfigError: as `candidates`.
    """
    require(tries >= 1, f"--tries is at least 1, found {tries}")
    ordered = candidates(config, place, batch=batch)
    done: dict[int, Trial] = {}
    factor = 1.0
    while len(done) < min(tries, len(ordered)):
        number = _next(ordered, done, factor, place)
        trial = done[number] = _compiled(ordered[number], place)
        if trial.step is not None and trial.step.fits is False:
            factor = max(factor, trial.step.memory.total / trial.guess.memory_bytes)
    winner = max(done.values(), key=lambda t: (float(f"{_rate(t):.3g}"), -_serial_s(t)))
    best = winner if _rate(winner) else None
    rest = [trial for n, trial in enumerate(ordered) if n not in done]
    said = [dataclasses.replace(t, verdict=_why(t, best)) for t in (*done.values(), *rest)]
    return Found(
        best=None if best is None else said[list(done.values()).index(best)], trials=tuple(said)
    )


def _serial_s(trial: Trial) -> float:
    """Seconds a token if compute, memory and network took turns; breaks ties."""
    step = trial.step
    if step is None or step.time is None:
        return math.inf
    times = (step.time.compute_s, step.time.memory_s, step.time.network_s)
    return sum(t for t in times if t is not None) / step.tokens


def _next(ordered: list[Trial], done: dict[int, Trial], factor: float, place: Place) -> int:
    """The fastest that should fit, at most two of one mesh; else the smallest."""
    limits = place.limits
    assert limits is not None
    left = [n for n in range(len(ordered)) if n not in done]
    meshes = [trial.config.mesh for trial in done.values()]
    for number in left:
        trial = ordered[number]
        small = factor * trial.guess.memory_bytes <= limits.memory_bytes
        if small and meshes.count(trial.config.mesh) < 2:
            return number
    return min(left, key=lambda n: ordered[n].guess.memory_bytes)


def _rate(trial: Trial) -> float:
    """Tokens a second at most; 0 for what does not fit."""
    step = trial.step
    return 0.0 if step is None or step.fits is False else step.tokens_per_s or 0.0


def _compiled(trial: Trial, place: Place) -> Trial:
    c = trial.config
    log.info("search: mesh %s, %s, batch %d, remat %s", c.mesh, c.sharding, c.batch, c.remat)
    return dataclasses.replace(trial, step=plan_step(c, place))
