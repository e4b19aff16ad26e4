"""The cases that the product with packed integers is timed on."""

from __future__ import annotations

import dataclasses

__all__ = ["CASES", "Shaped"]

# fmt: off
NF4 = (  # arXiv 2305.14314, appendix E, to bfloat16's precision
    -1.0, -0.6953, -0.5234, -0.3945, -0.2852, -0.1846, -0.0913, 0.0,
    0.0796, 0.1611, 0.2461, 0.3379, 0.4414, 0.5625, 0.7227, 1.0,
)
# fmt: on
E2M1 = tuple(s * x for s in (1.0, -1.0) for x in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shaped:
    """One call: sizes and the type of the values, or `nf4` or `mxfp4`."""

    rows: int
    inputs: int
    outputs: int
    group: int = 128
    kind: str = "int4"

    @property
    def nbytes(self) -> int:
        """Of values and scales, which any implementation must read."""
        bits = 8 if self.kind in ("int8", "float8_e4m3fn") else 4
        each = 1 if self.kind == "mxfp4" else 4
        return self.outputs * (self.inputs * bits // 8 + self.inputs // self.group * each)

    @property
    def table(self) -> tuple[float, ...]:
        """What codes of four bits stand for; none for integers."""
        return {"nf4": NF4, "mxfp4": E2M1}.get(self.kind, ())

    @property
    def dtype(self) -> str:
        """Of the values."""
        return "uint4" if self.table else self.kind

    @property
    def flops(self) -> float:
        """Of the product."""
        return 2.0 * self.rows * self.inputs * self.outputs


def _of(rows: int, inputs: int, outputs: int, **more) -> Shaped:
    return Shaped(rows=rows, inputs=inputs, outputs=outputs, **more)


CASES = {
    **{
        f"W4 70B gate/up, {m} rows": _of(m, 8192, 28672)
        for m in (1, 16, 32, 64, 128, 256, 512, 4096)
    },
    "W4 8B down, 1 row": _of(1, 14336, 4096),
    "W4 8B gate/up, 1 row": _of(1, 4096, 28672),
    "W4 8B qkv, 1 row": _of(1, 4096, 6144),
    "W4 1B gate/up, 1 row": _of(1, 2048, 16384),
    **{f"W8 70B gate/up, {m} rows": _of(m, 8192, 28672, kind="int8") for m in (1, 64)},
    **{f"NF4 70B gate/up, {m} rows": _of(m, 8192, 28672, kind="nf4", group=64) for m in (1, 16)},
    "MXFP4 70B gate/up, 1 row": _of(1, 8192, 28672, kind="mxfp4", group=32),
    "FP8 70B gate/up, 1 row": _of(1, 8192, 28672, kind="float8_e4m3fn", group=8192),
}
