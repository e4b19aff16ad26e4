"""Times of a function on the device: many calls in one program, each on inputs of its own; what
benchmarks share."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

__all__ = [
    "compiled",
    "errors_of",
    "normal",
    "relative_errors",
    "seconds",
    "time_scans",
    "timed",
    "with_gradients",
]

_COPY = 3.0e12  # bytes a second that an H100 copies
_PRODUCT = 783e12  # an 8192^3 bf16 product of normal data on such a card
_ROTATED = 200e6


def normal(shapes: tuple[tuple[int, ...], ...], sets: int) -> list[tuple[jax.Array, ...]]:
    """So many sets of normal bfloat16 arrays of these shapes."""
    draw = jax.jit(jax.random.normal, static_argnums=(1, 2))
    keys = (jax.random.split(jax.random.key(i), len(shapes)) for i in range(sets))
    return [
        tuple(draw(key, shape, jnp.bfloat16) for key, shape in zip(each, shapes, strict=True))
        for each in keys
    ]


def with_gradients(function):
    """(*inputs, gradient of the result) -> (result, *gradients of the inputs)."""

    def run(*arguments):
        *inputs, pull = arguments
        y, back = jax.vjp(function, *inputs)
        return y, *back(pull)

    return run


def relative_errors(found: tuple, want: tuple) -> list[float]:
    """Root mean square errors of each array, as part of the true values'."""

    def ratio(got, true):
        miss = jnp.mean(jnp.square(got.astype(jnp.float32) - true))
        return float(jnp.sqrt(miss / jnp.mean(jnp.square(true))))

    return [round(ratio(*pair), 5) for pair in zip(found, want, strict=True)]


def errors_of(function, exact, arguments: tuple) -> list[float]:
    """Relative errors of a function's result and gradients against an exact one's in float32.

    Args:
      function, exact: of all arguments but the last, which is the gradient of the result.
      arguments: arrays, or None for what is not there.
    """
    wide = [None if z is None else z.astype(jnp.float32) for z in arguments]
    found = jax.jit(with_gradients(function))(*arguments)
    want = jax.jit(with_gradients(exact))(*wide)
    there = [i for i, z in enumerate(want) if z is not None]
    return relative_errors(tuple(found[i] for i in there), tuple(want[i] for i in there))


def seconds(
    function, arguments: list[tuple], *, rounds: int = 12, calls: int = 1
) -> tuple[float, float]:
    """(median, spread) of one call, in seconds.

    Args:
      function: of arrays. It is compiled once and called once for each of `arguments` in one
        program, so that neither the host's dispatch nor a warm L2 cache enters.
      arguments: the inputs of each call; together they should exceed the L2 cache.
      rounds: runs of that program; the spread is between their quartiles.
      calls: at least so many in the program, by going through `arguments` again: for calls so short
        that starting a program takes as long.
    """
    arguments = arguments * -(-calls // len(arguments))
    return timed(compiled(function, arguments[0], len(arguments)), arguments, rounds=rounds)


def compiled(function, arguments: tuple, calls: int) -> Any:
    """The program of `calls` calls of a function, which `timed` takes.

    Args:
      arguments: arrays of one call, or their shapes and dtypes.
    """
    inner = jax.jit(function)
    # The same arrays again are other parameters to XLA, which so takes no call for one it has made.
    program = jax.jit(lambda many: [inner(*one) for one in many])
    return program.lower([arguments] * calls).compile()


def timed(run, arguments: list[tuple], *, rounds: int = 12) -> tuple[float, float]:
    """`seconds` of a program that `compiled` made for as many calls as there are `arguments`."""
    for _ in range(2):
        jax.block_until_ready(run(arguments))
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        jax.block_until_ready(run(arguments))
        times.append((time.perf_counter() - begin) / len(arguments))
        time.sleep(0.01)  # long back-to-back runs throttle the card
    quarter = statistics.quantiles(times, n=4)
    return statistics.median(times), quarter[2] - quarter[0]


def time_scans(
    cases: Mapping[str, Any],
    forms: Mapping[str, Callable[..., Any]],
    draw: Callable[[Any, int], tuple],
    error: Callable[[Callable[..., Any], tuple], list[float]],
    *,
    words: list[str],
    rounds: int,
) -> None:
    """Prints a line for each case, form and pass: microseconds, tokens a second, errors.

    Args:
      cases: of `bytes`, `flops` and `tokens`, by name.
      forms: functions of five arrays, by name.
      draw: (case, seed) -> those and the gradient of the result.
      error: (form, arrays) -> its errors.
      words: a case's name holds one of them; all without any.
      rounds: see `seconds`.
    """
    device = jax.devices()[0].device_kind
    for name, case in cases.items():
        if words and not any(word in name for word in words):
            continue
        limit = max(case.bytes / _COPY, case.flops / _PRODUCT)
        count = max(2, int(_ROTATED // case.bytes) + 1)
        drawn = [draw(case, seed) for seed in range(count)]
        for who, function in forms.items():
            line: dict[str, Any] = {"case": name, "implementation": who, "device": device}
            try:
                line["errors"] = error(function, drawn[0])
                for way in ("forward", "forward and backward"):
                    call = with_gradients(function)
                    if way == "forward":
                        call = lambda *z, f=function: f(*z[:5])  # noqa: E731
                    taken, spread = seconds(call, drawn, rounds=rounds)
                    line |= {"pass": way, "us": round(1e6 * taken, 1)}
                    line |= {"spread_us": round(1e6 * spread, 1)}
                    line["mega_tokens_per_s"] = round(case.tokens / taken / 1e6, 2)
                    of_limit = {"of_limit": round(limit / taken, 3)} if way == "forward" else {}
                    print(json.dumps(line | of_limit), flush=True)
            except Exception as failure:  # a form that fails is a line, not the end
                print(json.dumps(line | {"failed": repr(failure)[:200]}), flush=True)
