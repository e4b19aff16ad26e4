"""python -m pallas_kernels.grouped_matmul.bench [part of a case's name …]: times every case.

One JSON line a case, product, sizes of groups and implementation, and a table at the end. Peers run
in the same process: XLA's `ragged_dot`, and torch's grouped product where torch is there.
"""

from __future__ import annotations

import functools
import importlib
import json
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.grouped_matmul.shapes import CASES, Shaped
from pallas_kernels.timing import seconds

__all__ = ["drawn_sizes", "main", "measure"]

CEILING_TFLOPS = 783.0  # an 8192^3 bf16 product of normal data on such a card
BYTES_A_SECOND = 3.0e12  # a copy on such a card
LEAST_BYTES = 200e6  # four times an L2 cache
PASSES = ("forward", "dlhs", "drhs")


def group_sizes(case: Shaped, kind: str) -> np.ndarray:
    """`even`, or `drawn` from chances that differ by e^0.5 at one deviation, one group empty."""
    if kind == "even":
        sizes = np.full(case.groups, case.rows // case.groups)
        sizes[: case.rows % case.groups] += 1
        return sizes.astype(np.int32)
    return drawn_sizes(case.rows, case.groups, 3)


def drawn_sizes(rows: int, groups: int, seed: int) -> np.ndarray:
    """Rows of each group by chances that differ by e^0.5 at one deviation, one group empty."""
    random = np.random.default_rng(seed)
    chances = np.exp(0.5 * random.standard_normal(groups))
    chances[groups // 2] = 0
    return random.multinomial(rows, chances / chances.sum()).astype(np.int32)


def _draw(case: Shaped) -> list[tuple]:
    """(lhs, rhs, cotangent) of as many calls as exceed the cache."""
    calls = max(2, int(np.ceil(LEAST_BYTES / case.bytes)))
    normal = jax.jit(jax.random.normal, static_argnums=(1, 2))
    shapes = (
        (case.rows, case.inputs),
        (case.groups, case.inputs, case.outputs),
        (case.rows, case.outputs),
    )
    return [
        tuple(normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True))
        for keys in (jax.random.split(jax.random.key(i), 3) for i in range(calls))
    ]


def measure(drawn: list[tuple], sizes: np.ndarray, implementation: str, way: str) -> float:
    """Seconds of one call."""
    run = functools.partial(grouped_matmul, implementation=implementation)
    counts = jnp.asarray(sizes)

    def function(lhs, rhs, pull, counts):
        if way == "forward":
            return run(lhs, rhs, counts)
        by = (lambda x: run(x, rhs, counts)) if way == "dlhs" else (lambda w: run(lhs, w, counts))
        return jax.vjp(by, lhs if way == "dlhs" else rhs)[1](pull)

    rounds = 2 if implementation == "ragged_dot" else 12
    return seconds(function, [(*one, counts) for one in drawn], rounds=rounds)[0]


def measure_torch(case: Shaped, sizes: np.ndarray, way: str) -> float:
    """Seconds of one call of torch's grouped product."""
    torch: Any = importlib.import_module("torch")
    make = functools.partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    ends = torch.tensor(np.cumsum(sizes), device="cuda", dtype=torch.int32)
    lhs, pull = make(case.rows, case.inputs), make(case.rows, case.outputs)
    rhs = make(0 if way == "drhs" else case.groups, case.inputs, case.outputs)
    function = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    arguments = {
        "forward": lambda: (lhs, rhs),
        "dlhs": lambda: (pull, rhs.transpose(1, 2)),
        "drhs": lambda: (lhs.t(), pull),
    }[way]()
    times = []
    for _ in range(6):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(8):
            function(*arguments, offs=ends)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) / 8)
    torch.cuda.empty_cache()
    return statistics.median(times[1:])


def _line(case: Shaped, took: float) -> dict:
    limit = max(case.flops / (CEILING_TFLOPS * 1e12), case.bytes / BYTES_A_SECOND)
    return {
        "us": round(took * 1e6, 1),
        "tflops": round(case.flops / took / 1e12, 1),
        "limit": round(limit / took, 3),
    }


def main(words: list[str]) -> None:
    """Times the cases whose name holds one of `words` (all without any) and prints the table."""
    device = jax.devices()[0].device_kind
    table = []
    for name, case in CASES.items():
        if words and not any(word in name for word in words):
            continue
        drawn = _draw(case)
        for way in PASSES if case.rows >= 4096 else PASSES[:1]:
            for kind in ("even", "drawn"):
                sizes, rates = group_sizes(case, kind), {}
                for who in ("mosaic_gpu", "torch", "ragged_dot"):
                    line = {"case": name, "pass": way, "sizes": kind, "implementation": who}
                    try:
                        if who == "torch":
                            took = measure_torch(case, sizes, way)
                        else:
                            took = measure(drawn, sizes, who, way)
                        line |= _line(case, took)
                    except Exception as error:  # a peer that fails is a line, not the end
                        line["failed"] = repr(error)[:200]
                    rates[who] = line.get("us")
                    print(json.dumps(line | {"device": device}), flush=True)
                table.append((name, way, kind, rates))
    _print_table(table, device)


def _print_table(table: list[tuple], device: str) -> None:
    print(
        f"\n{'case':24}{'pass':9}{'sizes':7}{'ours':>10}{'torch':>10}{'xla':>11}   us on {device}"
    )
    for name, way, kind, rates in table:
        shown = "".join(f"{rates[who] or '–':>10}" for who in ("mosaic_gpu", "torch"))
        print(f"{name:24}{way:9}{kind:7}{shown}{rates['ragged_dot'] or '–':>11}")


if __name__ == "__main__":
    main(sys.argv[1:])
