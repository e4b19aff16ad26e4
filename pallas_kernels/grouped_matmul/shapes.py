"""The cases that the grouped product is timed on."""

from __future__ import annotations

import dataclasses

__all__ = ["CASES", "Shaped"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shaped:
    """One call: rows, sides of the matrices, number of groups."""

    rows: int
    inputs: int
    outputs: int
    groups: int

    @property
    def flops(self) -> float:
        """Of one product, or of one of its gradients."""
        return 2.0 * self.rows * self.inputs * self.outputs

    @property
    def bytes(self) -> float:
        """Least traffic of the product in 16 bits, if as many groups as can be have rows."""
        used = min(self.rows, self.groups)
        return 2.0 * (self.rows * (self.inputs + self.outputs) + used * self.inputs * self.outputs)


def _of(rows: int, inputs: int, outputs: int, groups: int) -> Shaped:
    return Shaped(rows=rows, inputs=inputs, outputs=outputs, groups=groups)


CASES = {
    "64 experts": _of(49152, 2048, 1408, 64),
    "8 experts": _of(8192, 4096, 14336, 8),
    "128 experts": _of(65536, 2048, 768, 128),
    "256 experts": _of(32768, 7168, 2048, 256),
    "32 experts": _of(16384, 2880, 2880, 32),
    "8 experts, 8 rows": _of(8, 4096, 14336, 8),
    "64 experts, 64 rows": _of(64, 2048, 1408, 64),
    "128 experts, 256 rows": _of(256, 2048, 768, 128),
    "256 experts, 256 rows": _of(256, 7168, 2048, 256),
}
