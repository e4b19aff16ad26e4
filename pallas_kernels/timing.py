"""Times of a function on the device: many calls in one program, each on inputs of its own; what
benchmarks share."""

from __future__ import annotations

import statistics
import time

import jax
import jax.numpy as jnp

__all__ = ["relative_errors", "seconds", "with_gradients"]


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
    inner = jax.jit(function)
    # The same arrays again are other parameters to XLA, which so takes no call for one it has made.
    arguments = arguments * -(-calls // len(arguments))
    program = jax.jit(lambda many: [inner(*one) for one in many])
    run = program.lower(arguments).compile()
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
