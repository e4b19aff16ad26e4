"""python -m pallas_kernels.flash_attention.bench [part of a case's name …]: times every case.

One JSON line a case, pass and implementation, and a table at the end. Peers run in the same
process on the same drawn inputs; tokamax is one of them where it is installed.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import sys

import jax
import jax.numpy as jnp

from pallas_kernels.errors import UnsupportedError
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.flash_attention.shapes import CASES, Shaped
from pallas_kernels.timing import seconds

__all__ = ["main", "measure"]

IMPLEMENTATIONS = ("mosaic_gpu", "cudnn", "tokamax")
CEILING_TFLOPS = 783.0  # an 8192^3 bf16 product of normal data on such a card


def _tokamax(case: Shaped):
    """tokamax's Mosaic kernel for a case."""
    if importlib.util.find_spec("tokamax") is None:
        raise UnsupportedError("tokamax is not installed")
    import tokamax  # pyright: ignore[reportMissingImports]

    return functools.partial(
        tokamax.dot_product_attention,
        is_causal=case.causal,
        local_window_size=case.window,
        logits_soft_cap=case.softcap,
        implementation="mosaic",
    )


def _ours(case: Shaped, implementation: str):
    options = {"causal": case.causal, "window": case.window, "softcap": case.softcap}
    return functools.partial(flash_attention, implementation=implementation, **options)


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
    run = _tokamax(case) if implementation == "tokamax" else _ours(case, implementation)

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
            for implementation in IMPLEMENTATIONS:
                line = {"case": name, "pass": "fwd+bwd" if backward else "fwd", "device": device}
                line["implementation"] = implementation
                try:
                    found = measure(case, implementation, backward)
                except (UnsupportedError, NotImplementedError) as error:
                    found = {"unsupported": str(error)}
                rates[implementation] = found.get("tflops")
                print(json.dumps(line | found), flush=True)
            table.append((name, line["pass"], rates))
    names = "".join(f"{name:>12}" for name in IMPLEMENTATIONS)
    print(f"\n{'case':28}{'pass':9}{names}{'to the best':>13}   TFLOP/s on {device}")
    for name, way, rates in table:
        ours, *peers = (rates[one] for one in IMPLEMENTATIONS)
        best = max((peer for peer in peers if peer), default=None)
        ratio = f"{ours / best:13.2f}" if ours and best else f"{'–':>13}"
        shown = "".join(f"{rates[one] or '–':>12}" for one in IMPLEMENTATIONS)
        print(f"{name:28}{way:9}{shown}{ratio}")


if __name__ == "__main__":
    main(sys.argv[1:])
