"""What a compiled program takes, known before it runs."""

from __future__ import annotations

import dataclasses
from typing import Any

__all__ = ["Report", "report_of"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Bytes and FLOPs of one compiled program on one device, as XLA counts them.

    FLOPs and bytes of loops are counted for one turn: XLA does not know how often they turn.
    """

    argument_bytes: int = 0
    output_bytes: int = 0
    aliased_bytes: int = 0
    temporary_bytes: int = 0
    code_bytes: int = 0
    flops: float = 0.0
    bytes_accessed: float = 0.0
    compile_seconds: float = 0.0

    @property
    def peak_bytes(self) -> int:
        """Arguments, outputs that alias none of them, temporaries and code."""
        fresh = self.output_bytes - self.aliased_bytes
        return self.argument_bytes + fresh + self.temporary_bytes + self.code_bytes

    def __str__(self) -> str:
        mb = 1 / 2**20
        return (
            f"arguments {self.argument_bytes * mb:.1f} MiB, outputs {self.output_bytes * mb:.1f} "
            f"({self.aliased_bytes * mb:.1f} in place), "
            f"temporaries {self.temporary_bytes * mb:.1f}, code {self.code_bytes * mb:.1f}; "
            f"{self.flops / 1e9:.2f} GFLOP, "
            f"{self.bytes_accessed * mb:.1f} MiB moved"
        )


def report_of(compiled: Any, compile_seconds: float) -> Report:
    """Read a compiled program's memory and cost analysis; what a backend does not say stays 0."""
    memory = compiled.memory_analysis()
    cost = compiled.cost_analysis() or {}
    read = lambda name: int(getattr(memory, f"{name}_size_in_bytes", 0) or 0)  # noqa: E731
    return Report(
        argument_bytes=read("argument"),
        output_bytes=read("output"),
        aliased_bytes=read("alias"),
        temporary_bytes=read("temp"),
        code_bytes=read("generated_code"),
        flops=float(cost.get("flops", 0.0)),
        bytes_accessed=float(cost.get("bytes accessed", 0.0)),
        compile_seconds=compile_seconds,
    )
