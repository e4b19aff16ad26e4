"""python -m pallas_kernels.flash_attention.bench [part of a case's name …]: times every case.

One JSON line a case, pass and implementation, and a table at the end. Peers run in the same
process on the same drawn inputs.
"""

from __future__ import annotations

import functools
import json
import sys

import jax
import jax.numpy as jnp

from pallas_kernels.errors import UnsupportedError
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.flash_attention.shapes import CASES, Shaped
from pallas_kernels.timing import seconds

__all__ = ["main", "measure"]

CEILING_TFLOPS = 783.0  # an 8192^3 bf16 product of normal data on such a card


def _draw(case: Shaped, calls: int) -> list[tuple]:
    q = (case.batch, case.length, case.heads, case.width)
    k = (case.batch, case.length, case.kv_heads, case.width)
    normal = jax.jit(jax.random.normal, static_argnums=(1, 2))
    keys = (jax.random.split(jax.random.key(i), 4) for i in range(calls))
    return [
        tuple(
            normal(key, shape, jnp.bfloat16) for key, shape in zip(four, (q, k, k, q), strict=True)
        )
        for four in keys
    ]


def measure(case: Shaped, implementation: str, backward: bool) -> dict:
    """{us, spread_us, tflops, ceiling} of one pass; raises UnsupportedError."""
    options = {"causal": case.causal, "window": case.window, "softcap": case.softcap}
    run = functools.partial(flash_attention, implementation=implementation, **options)

    def both(q, k, v, dout):
        out, pull = jax.vjp(run, q, k, v)
        return out, pull(dout)

    flops = case.flops * (3.5 if backward else 1.0)
    calls = max(4, min(32, int(8e-3 * 500e12 / flops)))
    drawn = _draw(case, calls)
    function = both if backward else run
    median, spread = seconds(function, drawn if backward else [one[:3] for one in drawn])
    rate = flops / median / 1e12
    return {
        "us": round(median * 1e6, 1),
        "spread_us": round(spread * 1e6, 1),
        "tflops": round(rate, 1),
        "ceiling": round(rate / CEILING_TFLOPS, 3),
    }


def main(words: list[str]) -> None:
    """Times the cases whose name holds one of `words` (all without any) and prints the table."""
    device = jax.devices()[0].device_kind
    table = []
    for name, case in CASES.items():
        if words and not any(word in name for word in words):
            continue
        for backward in (False, True):
            rates = {}
            for implementation in ("mosaic_gpu", "cudnn"):
                line = {"case": name, "pass": "fwd+bwd" if backward else "fwd", "device": device}
                line["implementation"] = implementation
                try:
                    found = measure(case, implementation, backward)
                except UnsupportedError as error:
                    found = {"unsupported": str(error)}
                rates[implementation] = found.get("tflops")
                print(json.dumps(line | found), flush=True)
            table.append((name, line["pass"], rates))
    print(f"\n{'case':28}{'pass':9}{'ours':>8}{'cudnn':>8}{'ratio':>7}   TFLOP/s on {device}")
    for name, way, rates in table:
        ours, peer = rates["mosaic_gpu"], rates["cudnn"]
        ratio = f"{ours / peer:7.2f}" if ours and peer else "      –"
        print(f"{name:28}{way:9}{ours or '–':>8}{peer or '–':>8}{ratio}")


if __name__ == "__main__":
    main(sys.argv[1:])
