"""python -m pallas_kernels.block_sparse_attention.bench [part of a case's name …]

One JSON line a case and pass: the time, that of the dense flash kernel on the same arrays, and
time / (dense time x share of visible pairs), which is 1 where sparsity costs nothing.
"""

from __future__ import annotations

import functools
import json
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_attention import block_sparse_attention
from pallas_kernels.block_sparse_attention.shapes import CASES
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.timing import compiled, normal, timed, with_gradients

__all__ = ["main"]

_CALLS = 8


def _programs(name: str, pool: ThreadPoolExecutor) -> dict:
    """Futures of a case's programs, by pass and kernel, and its density."""
    case = CASES[name]
    blocks = case.make(case.length, case.heads)
    forms = {
        "sparse": functools.partial(
            block_sparse_attention, blocks=blocks, implementation="mosaic_gpu"
        ),
        "dense": functools.partial(flash_attention, implementation="mosaic_gpu"),
    }
    shapes = tuple(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in case.shapes)
    out: dict = {"density": float(blocks.dense().mean())}
    for form, call in forms.items():
        out["fwd", form] = pool.submit(compiled, call, shapes[:3], _CALLS)
        out["fwd+bwd", form] = pool.submit(compiled, with_gradients(call), shapes, _CALLS)
    return out


def main(words: list[str]) -> None:
    """Times the cases whose name holds one of `words`, or all."""
    names = [name for name in CASES if not words or any(word in name for word in words)]
    with ThreadPoolExecutor(12) as pool:
        programs = {name: _programs(name, pool) for name in names}
    for name in names:
        drawn = [x for x in normal(CASES[name].shapes, 4) for _ in range(_CALLS // 4)]
        density = programs[name]["density"]
        for way in ("fwd", "fwd+bwd"):
            arguments = [x[:3] if way == "fwd" else x for x in drawn]
            line = {"case": name, "pass": way}
            line |= {"device": jax.devices()[0].device_kind, "density": round(density, 4)}
            try:
                runs = {form: programs[name][way, form].result() for form in ("sparse", "dense")}
                times = {form: timed(run, arguments)[0] for form, run in runs.items()}
                line |= {f"{form}_us": round(1e6 * time, 1) for form, time in times.items()}
                line["ratio"] = round(times["sparse"] / (times["dense"] * density), 3)
            except Exception as failure:  # one that fails is a line, not the end
                line["failed"] = repr(failure)[:200]
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
