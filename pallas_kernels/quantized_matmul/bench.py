"""python -m pallas_kernels.quantized_matmul.bench [part of a case's name …]: times every case.

One JSON line a case and implementation. The bfloat16 product of the same sizes (cuBLAS) and, where
torch is there, its tinygemm run in the same process. Inputs are rotated past the L2 cache.
"""

from __future__ import annotations

import functools
import importlib
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.errors import UnsupportedError
from pallas_kernels.quantized_matmul import quantized_matmul
from pallas_kernels.quantized_matmul.shapes import CASES, Shaped
from pallas_kernels.timing import seconds

_ROTATED = 240e6  # bytes that the calls of one program read together; the L2 cache holds 50
_CALLS = 64  # in a program, so that its start does not count
_COPY = 2.8e12  # bytes a second that an H100 copies
_PRODUCT = 800e12  # operations a second that its products in bfloat16 come to


def _draw(case: Shaped, copies: int) -> list[tuple]:
    keys = jax.random.split(jax.random.key(0), 3 * copies)
    groups = case.inputs // case.group
    low, high = {"int4": (-8, 8), "uint4": (0, 16)}.get(case.dtype, (-127, 128))

    @jax.jit
    def one(a, b, c):
        x = jax.random.normal(a, (case.rows, case.inputs), jnp.bfloat16)
        values = jax.random.randint(b, (case.outputs, case.inputs), low, high, jnp.int8)
        scale = jax.random.uniform(c, (case.outputs, groups), jnp.float32, 0.5, 1.5)
        if case.kind == "mxfp4":
            scale = jnp.exp2(jnp.floor(8 * scale)).astype(jnp.float8_e8m0fnu)
        return x, values.astype(case.dtype), scale

    return [one(*keys[3 * i : 3 * i + 3]) for i in range(copies)]


def _plain(case: Shaped, copies: int) -> list[tuple]:
    keys = jax.random.split(jax.random.key(1), 2 * copies)

    @jax.jit
    def one(a, b):
        x = jax.random.normal(a, (case.rows, case.inputs), jnp.bfloat16)
        return x, jax.random.normal(b, (case.outputs, case.inputs), jnp.bfloat16)

    return [one(*keys[2 * i : 2 * i + 2]) for i in range(copies)]


def _error(case: Shaped, arguments: tuple, function) -> float:
    """Largest error against the reference in float32, over the largest value."""
    x, values, scale = arguments
    part = slice(0, 512)
    exact = quantized_matmul(x.astype(jnp.float32), values[part], scale[part], table=case.table)
    found = function(*arguments)[:, part]
    return float(jnp.max(jnp.abs(found - exact)) / jnp.max(jnp.abs(exact)))


def _tinygemm(case: Shaped, copies: int) -> float | None:
    """Seconds of torch's product of packed int4, or None where it cannot be had."""
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError:
        return None
    if not torch.cuda.is_available() or case.kind != "int4":
        return None
    make = functools.partial(torch.randint, 0, 256, dtype=torch.uint8, device="cuda")
    weights, scales = [], []
    for _ in range(copies):
        packed = make((case.outputs, case.inputs // 2))
        weights.append(torch.ops.aten._convert_weight_to_int4pack(packed, 8))
        shape = (case.inputs // case.group, case.outputs, 2)
        scales.append(torch.randn(shape, dtype=torch.bfloat16, device="cuda"))
    x = torch.randn((case.rows, case.inputs), dtype=torch.bfloat16, device="cuda")

    def run() -> None:
        for w, s in zip(weights, scales, strict=True):
            torch.ops.aten._weight_int4pack_mm(x, w, case.group, s)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(12):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / copies / 1e3)
    return sorted(times)[len(times) // 2]


def _line(name: str, case: Shaped, implementation: str, time: float, **more) -> None:
    bound = max(case.nbytes / _COPY, case.flops / _PRODUCT)
    line = {"case": name, "implementation": implementation, "us": round(1e6 * time, 2)}
    line |= {"of_limit": round(bound / time, 3), "tflops": round(case.flops / time / 1e12, 1)}
    print(json.dumps(line | more | {"device": jax.devices()[0].device_kind}), flush=True)


def main(names: list[str]) -> None:
    """Time the cases whose names contain one of `names`, or all."""
    for name, case in CASES.items():
        if names and not any(part in name for part in names):
            continue
        copies = max(2, int(-(-_ROTATED // case.nbytes)))
        arguments = _draw(case, copies)
        for implementation in ("mosaic_gpu", "mosaic_gpu_streamed", "reference"):
            options = {"implementation": implementation, "table": case.table}
            call = functools.partial(quantized_matmul, out_dtype="bfloat16", **options)
            try:
                error = _error(case, arguments[0], jax.jit(call))
                time, spread = seconds(call, arguments, calls=_CALLS)
            except UnsupportedError as reason:
                print(json.dumps({"case": name, "skipped": str(reason)}), flush=True)
                continue
            _line(name, case, implementation, time, spread_us=round(1e6 * spread, 2), error=error)
        del arguments
        plain = _plain(case, max(2, copies // 4))
        time, _ = seconds(lambda x, w: x @ w.T, plain, calls=_CALLS)
        _line(name, case, "bfloat16 cuBLAS", time)
        del plain
        torch_time = _tinygemm(case, copies)
        if torch_time is not None:
            _line(name, case, "torch tinygemm", torch_time)


if __name__ == "__main__":
    main(sys.argv[1:])
