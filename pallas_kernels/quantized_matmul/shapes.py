"""The cases that the product with packed integers is timed on."""

from __future__ import annotations

import dataclasses

__all__ = ["CASES", "Shaped"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shaped:
    """One call: sizes and the type of the values."""

    rows: int
    inputs: int
    outputs: int
    group: int = 128
    kind: str = "int4"

    @property
    def nbytes(self) -> int:
        """Of values and scales, which any implementation must read."""
        bits = 4 if "4" in self.kind else 8
        return self.outputs * (self.inputs * bits // 8 + self.inputs // self.group * 4)

    @property
    def flops(self) -> float:
        """Of the product."""
        return 2.0 * self.rows * self.inputs * self.outputs


def _of(rows: int, inputs: int, outputs: int, **more) -> Shaped:
    return Shaped(rows=rows, inputs=inputs, outputs=outputs, **more)


CASES = {
    **{f"W4 70B gate/up, {m} rows": _of(m, 8192, 28672) for m in (1, 16, 32, 64)},
    "W4 8B down, 1 row": _of(1, 14336, 4096),
    "W4 8B gate/up, 1 row": _of(1, 4096, 28672),
    "W4 8B qkv, 1 row": _of(1, 4096, 6144),
    "W4 1B gate/up, 1 row": _of(1, 2048, 16384),
    **{f"W8 70B gate/up, {m} rows": _of(m, 8192, 28672, kind="int8") for m in (1, 64)},
}
