"""python -m pallas_kernels.gated_norm.bench [part of a case's name …]: times every case.

One JSON line a case, pass and implementation, with tokens a second and the ratio to the limit of
the forward's bytes. The peer is what XLA makes of plain jnp in the same run; errors of both are
against float32.
"""

from __future__ import annotations

import functools
import sys

import jax
import jax.numpy as jnp

from pallas_kernels.gated_norm import gated_norm
from pallas_kernels.gated_norm.shapes import CASES, Shaped
from pallas_kernels.timing import errors_of, time_scans

__all__ = ["draw", "forms", "main"]


def draw(case: Shaped, seed: int) -> tuple:
    """y, x, z, d, the scale and the gradient of the result."""

    @jax.jit
    def arrays(key):
        keys = jax.random.split(key, 6)
        wide = [jax.random.normal(k, (case.tokens, case.channels), jnp.bfloat16) for k in keys[:4]]
        d, scale = (1.0 + jax.random.normal(k, (case.channels,)) / 3 for k in keys[4:])
        return *wide[:3], d, scale, wide[3]

    return arrays(jax.random.key(seed))


def _call(implementation: str, groups: int, *arguments):
    return gated_norm(*arguments, eps=1e-5, groups=groups, implementation=implementation)


def forms(groups: int) -> dict:
    """Implementations to time."""
    return {n: functools.partial(_call, n, groups) for n in ("mosaic_gpu", "reference")}


def main(words: list[str]) -> None:
    """Times the cases whose name holds one of `words`, all without any."""
    for groups in sorted({case.groups for case in CASES.values()}):
        cases = {name: case for name, case in CASES.items() if case.groups == groups}
        exact = functools.partial(_call, "reference", groups)

        def error(function, arguments, exact=exact):
            short = [a[:512] if a.ndim == 2 else a for a in arguments]
            return errors_of(function, exact, tuple(short))

        time_scans(cases, forms(groups), draw, error, words=words, rounds=6)


if __name__ == "__main__":
    main(sys.argv[1:])
