"""The cases that a decoding step's products are timed on."""

from __future__ import annotations

import dataclasses

__all__ = ["CASES", "Shaped"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shaped:
    """One call: inputs, outputs (of a half, with a gate), and what it is fused with.

    With a `group` weights are int4 under a scale in bfloat16 for each so many inputs.
    """

    inputs: int
    outputs: int
    rows: int = 1
    norm: bool = False
    gate: str | None = None
    residual: bool = False
    group: int | None = None

    @property
    def halves(self) -> int:
        return 1 if self.gate is None else 2

    @property
    def nbytes(self) -> int:
        """Of the weights, in bfloat16 where they are not packed, which must be read."""
        numbers = self.halves * self.inputs * self.outputs
        return 2 * numbers if self.group is None else numbers // 2 + 2 * numbers // self.group


_FORMS = {
    "1B qkv": Shaped(inputs=2048, outputs=3072, norm=True),
    "1B output": Shaped(inputs=2048, outputs=2048, residual=True),
    "1B gate/up": Shaped(inputs=2048, outputs=8192, norm=True, gate="silu"),
    "1B down": Shaped(inputs=8192, outputs=2048, residual=True),
    "1B head": Shaped(inputs=2048, outputs=128256, norm=True),
    "8B qkv": Shaped(inputs=4096, outputs=6144, norm=True),
    "8B gate/up": Shaped(inputs=4096, outputs=14336, norm=True, gate="silu"),
    "8B down": Shaped(inputs=14336, outputs=4096, residual=True),
}
CASES = {
    f"{name}, {rows} rows{kind}": dataclasses.replace(form, rows=rows, group=group)
    for kind, group in (("", None), (", int4", 128))
    for rows in (1, 4, 8)
    for name, form in _FORMS.items()
}
