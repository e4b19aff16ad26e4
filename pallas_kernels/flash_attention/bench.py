"""python -m pallas_kernels.flash_attention.bench [part of a case's name …]: times every case.

One JSON line a case, pass and implementation, and a table at the end. Peers run in the same
process on the same drawn inputs; tokamax is one of them where it is installed. Six cases are
compiled at a time, side by side, and then timed, one program at a time.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import sys
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import jax.numpy as jnp

from pallas_kernels.errors import UnsupportedError
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.flash_attention.shapes import CASES, Shaped
from pallas_kernels.timing import compiled, normal, timed, with_gradients

__all__ = ["main"]

IMPLEMENTATIONS = ("mosaic_gpu", "cudnn", "tokamax")
CEILING_TFLOPS = 783.0  # an 8192^3 bf16 product of normal data on an H100
_WAVE = 6
_PASSES = ("fwd", "fwd+bwd")


def _tokamax(case: Shaped):
    """tokamax's Mosaic kernel for a case."""
    if importlib.util.find_spec("tokamax") is None:
        raise UnsupportedError("tokamax is not installed")
    if case.documents > 1:
        raise UnsupportedError("documents are not asked of tokamax here")
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
    call = functools.partial(flash_attention, implementation=implementation, **options)
    if case.documents == 1:
        return call

    def packed(q, k, v):
        number = jnp.arange(case.length, dtype=jnp.int32) // (case.length // case.documents)
        ids = jnp.broadcast_to(number, (case.batch, case.length))
        return call(q, k, v, segment_ids=ids, packed=True)

    return packed


def _calls(case: Shaped, way: str) -> int:
    """Calls in one program: some 16 ms of work, beside which starting it is little."""
    flops = case.flops * (3.5 if way == "fwd+bwd" else 1.0)
    return max(4, min(96, int(16e-3 * 500e12 / flops)))


def _program(case: Shaped, implementation: str, way: str):
    run = _tokamax(case) if implementation == "tokamax" else _ours(case, implementation)
    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in case.shapes]
    if way == "fwd":
        return compiled(run, tuple(shapes[:3]), _calls(case, way))
    return compiled(with_gradients(run), tuple(shapes), _calls(case, way))


def _found(program: Future, case: Shaped, way: str, drawn: list[tuple]) -> dict:
    """{us, spread_us, tflops, ceiling} of a program, or why there is none."""
    try:
        run = program.result()
    except (UnsupportedError, NotImplementedError) as error:
        return {"unsupported": str(error)}
    except Exception as error:  # one that fails is a line, not the end
        return {"failed": repr(error)[:200]}
    arguments = [one if way == "fwd+bwd" else one[:3] for one in drawn]
    arguments = [arguments[i % len(arguments)] for i in range(_calls(case, way))]
    median, spread = timed(run, arguments)
    rate = case.flops * (3.5 if way == "fwd+bwd" else 1.0) / median / 1e12
    return {
        "us": round(median * 1e6, 1),
        "spread_us": round(spread * 1e6, 1),
        "tflops": round(rate, 1),
        "ceiling": round(rate / CEILING_TFLOPS, 3),
    }


def _wave(names: list[str], rates: dict) -> None:
    """Compiles and times these cases; adds to `rates` by case, pass and implementation."""
    device = jax.devices()[0].device_kind
    with ThreadPoolExecutor(12) as pool:
        programs = {
            (name, way, who): pool.submit(_program, CASES[name], who, way)
            for name in names
            for way in _PASSES
            for who in IMPLEMENTATIONS
        }
    for name in names:
        drawn = normal(CASES[name].shapes, 4)
        for way in _PASSES:
            for who in IMPLEMENTATIONS:
                found = _found(programs[name, way, who], CASES[name], way, drawn)
                rates[name, way, who] = found.get("tflops")
                line = {"case": name, "pass": way, "device": device, "implementation": who}
                print(json.dumps(line | found), flush=True)


def _table(names: list[str], rates: dict) -> None:
    heads = "".join(f"{name:>12}" for name in IMPLEMENTATIONS)
    device = jax.devices()[0].device_kind
    print(f"\n{'case':28}{'pass':9}{heads}{'to the best':>13}{'to plain':>10}   TFLOP/s, {device}")
    for name in names:
        for way in _PASSES:
            ours, *peers = (rates[name, way, who] for who in IMPLEMENTATIONS)
            best = max((peer for peer in peers if peer), default=None)
            plain = rates.get((CASES[name].like, way, "mosaic_gpu"))
            shares = [ours / x if ours and x else None for x in (best, plain)]
            shown = "".join(f"{rates[name, way, who] or '–':>12}" for who in IMPLEMENTATIONS)
            ends = "".join(
                f"{x:{n}.2f}" if x else f"{'–':>{n}}" for x, n in zip(shares, (13, 10), strict=True)
            )
            print(f"{name:28}{way:9}{shown}{ends}")


def main(words: list[str]) -> None:
    """Times the cases whose name holds one of `words` (all without any) and prints the table."""
    names = [name for name in CASES if not words or any(word in name for word in words)]
    if importlib.util.find_spec("tokamax") is not None:
        importlib.import_module("tokamax")  # first here: threads would wait for one another
    rates = {}
    for start in range(0, len(names), _WAVE):
        _wave(names[start : start + _WAVE], rates)
    _table(names, rates)


if __name__ == "__main__":
    main(sys.argv[1:])
