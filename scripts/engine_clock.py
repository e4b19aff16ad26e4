"""What a step of the engine costs: host time by part, and programs by themselves."""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any


class Clock:
    """Seconds of the calls of some functions of an engine, by name."""

    def __init__(self, engine: Any):
        self.times: dict[str, list[float]] = {}
        runner = engine.runner
        for holder, name in (
            (engine.scheduler, "plan"),
            (engine, "_set_options"),
            (runner, "_pack"),
            (runner, "dispatch"),
            (runner, "shape_of"),
        ):
            setattr(holder, name, self._timed(name.strip("_"), getattr(holder, name)))
        for shape, program in runner._programs.items():
            runner._programs[shape] = self._timed("launch", program)

    def _timed(self, name: str, function: Any) -> Any:
        held = self.times.setdefault(name, [])

        def call(*args: Any) -> Any:
            begin = time.perf_counter()
            out = function(*args)
            held.append(time.perf_counter() - begin)
            return out

        return call

    def taken(self) -> dict[str, float]:
        """Median milliseconds by name, forgotten after."""
        out = {n: round(1e3 * statistics.median(t), 4) for n, t in self.times.items() if t}
        for times in self.times.values():
            times.clear()
        return out


def host_of(engine: Any, clock: Clock) -> dict[str, Any]:
    """Host time of the steps since the last call."""
    times = list(engine.host_times)
    engine.host_times.clear()
    if len(times) < 4:
        return {}
    return {
        "steps": len(times),
        "host_ms_median": round(1e3 * statistics.median(times), 4),
        "host_ms_p90": round(1e3 * statistics.quantiles(times, n=10)[-1], 4),
        "parts_ms_median": clock.taken(),
    }


def filled(shape: Any, memory: Any) -> Any:
    """A step's integers on the device: all rows in use, each with pages of its own."""
    import jax
    import numpy as np

    from jaxllm.serve.programs import unpack

    parts = shape.parts(memory)
    packed = np.zeros((sum(int(np.prod(part)) for part in parts.values()),), np.int32)
    views, count = unpack(packed, parts), shape.tokens // shape.rows * shape.steps
    views["counts"][:] = count
    views["starts"][:] = min(1000, shape.context - count) if shape.longest == 1 else 0
    views["slots"][:] = np.arange(shape.rows)
    for group in memory.windows:
        width = views[f"pages:{group}"].shape[1]
        pages = np.arange(shape.rows * width).reshape(shape.rows, width)
        views[f"pages:{group}"][:] = pages % memory.pages[group]
    return jax.device_put(packed)


def steps(given: argparse.Namespace, engine: Any) -> dict[str, Any]:
    """Milliseconds of a step of some programs by themselves: the engine has nothing to do."""
    import jax

    runner, out = engine.runner, {}
    for shape, program in runner.executables.items():
        if not any(name in shape.name for name in given.shapes):
            continue
        ints, masks = filled(shape, runner.memory), runner._no_masks[shape.places]

        def call(ints: Any = ints, masks: Any = masks, program: Any = program) -> Any:
            args = (runner.params, runner.state, runner.carry, runner._on_device, ints, masks)
            runner.state, runner.carry, drawn = program(*args)
            return drawn.tokens

        jax.block_until_ready([call() for _ in range(3)])
        launches, times = [], []
        for _ in range(3):
            begin = time.perf_counter()
            drawn = call()
            launches.append(time.perf_counter() - begin)
            jax.block_until_ready(drawn)
            begin = time.perf_counter()
            for _ in range(given.repeats):
                drawn = call()
            jax.block_until_ready(drawn)
            times.append((time.perf_counter() - begin) / given.repeats)
        out[shape.name] = [round(1e3 * statistics.median(x), 3) for x in (times, launches)]
    return {"bench": "a step by itself and its launch, ms, 1,000 tokens remembered", "ms": out}
