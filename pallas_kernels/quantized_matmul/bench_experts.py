"""python -m pallas_kernels.quantized_matmul.bench_experts [part of a case's name …]: times experts.

One JSON line a case and implementation: the packed matrices by our kernel; the same unpacked first,
then our grouped product in bfloat16; and that product of matrices that lie there in bfloat16. Rows
choose experts by drawn chances. Inputs are rotated past the L2 cache.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.grouped_matmul.bench import drawn_sizes
from pallas_kernels.quantized_matmul.grouped import grouped_quantized_matmul
from pallas_kernels.quantized_matmul.reference import dequantized
from pallas_kernels.quantized_matmul.shapes import E2M1
from pallas_kernels.timing import seconds

__all__ = ["CASES", "Case", "main"]

_CALLS = 32
_COPY = 3.0e12  # bytes a second that an H100 copies


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Rows in all, experts, sizes of a matrix, and the format."""

    rows: int
    experts: int
    inputs: int
    outputs: int
    group: int = 128
    kind: str = "int4"

    @property
    def table(self) -> tuple[float, ...]:
        return E2M1 if self.kind == "mxfp4" else ()

    def sizes(self, seed: int) -> np.ndarray:
        """Rows of each expert."""
        return drawn_sizes(self.rows, self.experts, seed)

    def nbytes(self, seed: int = 0) -> float:
        """Of the packed matrices that have rows, with their scales."""
        bits = 8 if self.kind == "int8" else 4
        each = self.inputs * bits / 8 + self.inputs / self.group * (1 if self.table else 4)
        return float((self.sizes(seed) > 0).sum() * self.outputs * each)


def _of(rows: int, experts: int, inputs: int, outputs: int, **more) -> Case:
    return Case(rows=rows, experts=experts, inputs=inputs, outputs=outputs, **more)


CASES = {
    **{f"OLMoE gate/up, {r} rows": _of(r, 64, 2048, 2048) for r in (8, 64, 512, 2048)},
    "OLMoE gate/up int8, 64 rows": _of(64, 64, 2048, 2048, kind="int8"),
    "Mixtral gate/up, 16 rows": _of(16, 8, 4096, 28672),
    "Qwen3-MoE gate/up, 256 rows": _of(256, 128, 2048, 1536),
    "gpt-oss gate/up MXFP4, 64 rows": _of(64, 32, 2880, 5760, kind="mxfp4", group=32),
}


def _draw(case: Case, seed: int) -> tuple:
    @jax.jit
    def arrays(key):
        a, b, c = jax.random.split(key, 3)
        x = jax.random.normal(a, (case.rows, case.inputs), jnp.bfloat16)
        low, high, dtype = {
            "int4": (-8, 8, jnp.int4),
            "int8": (-127, 128, jnp.int8),
            "mxfp4": (0, 16, jnp.uint4),
        }[case.kind]
        shape = (case.experts, case.outputs, case.inputs)
        values = jax.random.randint(b, shape, low, high, jnp.int8).astype(dtype)
        shape = (*shape[:2], case.inputs // case.group)
        scale = jax.random.uniform(c, shape, jnp.float32, 0.5, 1.5)
        if case.table:
            scale = jnp.exp2(jnp.floor(8 * scale)).astype(jnp.float8_e8m0fnu)
        return x, values, scale

    return *arrays(jax.random.key(seed)), jnp.asarray(case.sizes(seed))


def _packed(case: Case, x, values, scale, sizes):
    how = {"table": case.table, "implementation": "mosaic_gpu", "out_dtype": "bfloat16"}
    return grouped_quantized_matmul(x, (values, scale, None), sizes, **how)


def _unpack(case: Case, values, scale):
    one = functools.partial(dequantized, offset=None, table=case.table)
    return jax.vmap(one)(values, scale).astype(jnp.bfloat16)


def _plain(x, w, sizes):
    return grouped_matmul(x, w, sizes, transpose_rhs=True)


def _unpacked(case: Case, x, values, scale, sizes):
    return _plain(x, _unpack(case, values, scale), sizes)


def main(words: list[str]) -> None:
    """Times the cases whose name holds one of `words`, all without any."""
    device = jax.devices()[0].device_kind
    for name, case in CASES.items():
        if words and not any(word in name for word in words):
            continue
        drawn = [_draw(case, seed) for seed in range(max(2, int(240e6 // case.nbytes()) + 1))]
        x, values, scale, sizes = drawn[0]
        exact = jax.jit(_plain)(x, jax.jit(functools.partial(_unpack, case))(values, scale), sizes)
        forms = {"mosaic_gpu": functools.partial(_packed, case)}
        forms["unpacked, then bfloat16"] = functools.partial(_unpacked, case)
        for who, function in (*forms.items(), ("bfloat16", _plain)):
            line = {"case": name, "implementation": who, "device": device}
            try:
                given = drawn
                if who == "bfloat16":
                    opened = jax.jit(functools.partial(_unpack, case))
                    given = [(x, opened(v, s), sizes) for x, v, s, sizes in drawn[:3]]
                found = jax.jit(function)(*given[0])
                miss = jnp.max(jnp.abs((found - exact).astype(jnp.float32)))
                line["error"] = float(miss / jnp.max(jnp.abs(exact.astype(jnp.float32))))
                taken, spread = seconds(function, given, rounds=8, calls=_CALLS)
                line |= {"us": round(1e6 * taken, 1), "spread_us": round(1e6 * spread, 1)}
                bound = case.nbytes() * (4 if who == "bfloat16" else 1) / _COPY
                print(json.dumps(line | {"of_limit": round(bound / taken, 3)}), flush=True)
            except Exception as failure:  # a form that fails is a line, not the end
                print(json.dumps(line | {"failed": repr(failure)[:300]}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
