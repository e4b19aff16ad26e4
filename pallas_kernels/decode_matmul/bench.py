"""python -m pallas_kernels.decode_matmul.bench [part of a case's name …]: times every case.

One JSON line a case and form: our kernel, the same function under one jit by XLA, and the bare
product. Weights are rotated past the L2 cache, 24 calls or more a program.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.decode_matmul import Packed, decode_matmul
from pallas_kernels.decode_matmul.shapes import CASES, Shaped
from pallas_kernels.errors import UnsupportedError
from pallas_kernels.timing import seconds

_ROTATED = 240e6  # bytes that the calls of one program read together; the L2 cache holds 50
_CALLS = 24  # in a program, so that its start does not count
_COPIES = {"NVIDIA H200": 4.3e12}  # bytes a second that a device copies
_COPY = 3.0e12


def _draw(case: Shaped, copies: int) -> list[tuple]:
    keys = jax.random.split(jax.random.key(0), 4 * copies)
    halves = () if case.gate is None else (2,)
    normal = functools.partial(jax.random.normal, dtype=jnp.bfloat16)

    def packed(key):
        assert case.group is not None
        shape, (b, c) = (*halves, case.outputs, case.inputs), jax.random.split(key)
        codes = jax.random.randint(b, shape, -8, 8, jnp.int8).astype(jnp.int4)
        spread = jax.random.uniform(c, (*shape[:-1], shape[-1] // case.group), minval=0.1)
        return Packed(codes, (spread * case.inputs**-0.5).astype(jnp.bfloat16))

    def plain(key):
        w = normal(key, (*halves, case.outputs, case.inputs)) * case.inputs**-0.5
        return w.astype(jnp.bfloat16)

    @jax.jit
    def one(a, b, c, d):
        w = plain(b) if case.group is None else packed(b)
        norm = 1 + normal(c, (case.inputs,)) / 3 if case.norm else None
        residual = normal(d, (case.rows, case.outputs)) if case.residual else None
        return normal(a, (case.rows, case.inputs)), w, norm, residual

    return [one(*keys[4 * i : 4 * i + 4]) for i in range(copies)]


def _call(case: Shaped, implementation: str):
    options = {"eps": 1e-5, "gate": case.gate, "implementation": implementation}
    return lambda x, w, norm, residual: decode_matmul(x, w, norm=norm, residual=residual, **options)


def _error(case: Shaped, arguments: tuple, function) -> float:
    """Root mean square error against float32, as part of the values'."""
    found = function(*arguments).astype(jnp.float32)
    twice: list = [
        a if a is None or isinstance(a, Packed) else a.astype(jnp.float32) for a in arguments
    ]
    for i in (0, 3):  # two rows: a product of one would be summed in another way
        twice[i] = None if twice[i] is None else jnp.concatenate([twice[i]] * 2)
    want = jax.jit(_call(case, "reference"))(*twice)[: case.rows]
    return float(jnp.sqrt(jnp.mean((found - want) ** 2) / jnp.mean(want**2)))


def main(names: list[str]) -> None:
    """Time the cases whose names contain one of `names`, or all."""
    device = jax.devices()[0].device_kind
    copy = _COPIES.get(device, _COPY)
    for name, case in CASES.items():
        if names and not any(part in name for part in names):
            continue
        drawn = _draw(case, max(2, int(-(-_ROTATED // case.nbytes))))
        forms: dict[str, Callable[..., jax.Array]] = {
            "mosaic_gpu": _call(case, "mosaic_gpu"),
            "reference": _call(case, "reference"),
        }
        if case.group is None:
            forms["bare product"] = lambda x, w, *_: x @ w.reshape(-1, w.shape[-1]).T
        for form, call in forms.items():
            line: dict = {"case": name, "form": form, "device": device}
            try:
                if form != "bare product":
                    line["error"] = round(_error(case, drawn[0], jax.jit(call)), 5)
                taken, spread = seconds(call, drawn, calls=_CALLS)
            except UnsupportedError as reason:
                print(json.dumps(line | {"skipped": str(reason)}), flush=True)
                continue
            line |= {"us": round(1e6 * taken, 2), "spread_us": round(1e6 * spread, 2)}
            line |= {"tb_per_s": round(case.nbytes / taken / 1e12, 2)}
            line |= {"of_copy": round(case.nbytes / taken / copy, 3)}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
