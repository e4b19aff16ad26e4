"""The cases that the product of eight-bit floats is timed on."""

from __future__ import annotations

import dataclasses

__all__ = ["CASES", "Shaped"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shaped:
    """One call: rows, inputs, outputs."""

    rows: int
    inputs: int
    outputs: int

    @property
    def nbytes(self) -> int:
        """Of both sides and of a result in 16 bits."""
        return self.inputs * (self.rows + self.outputs) + 2 * self.rows * self.outputs

    @property
    def flops(self) -> float:
        """Of the product."""
        return 2.0 * self.rows * self.inputs * self.outputs


CASES = {
    "70B gate/up, 4096 rows": Shaped(rows=4096, inputs=8192, outputs=28672),
    "DeepSeek-V3 up, 4096 rows": Shaped(rows=4096, inputs=7168, outputs=4096),
    "8B down, 4096 rows": Shaped(rows=4096, inputs=14336, outputs=4096),
    "70B gate/up, 256 rows": Shaped(rows=256, inputs=8192, outputs=28672),
    "70B gate/up, 16 rows": Shaped(rows=16, inputs=8192, outputs=28672),
}
