"""ParamDef: shape, logical axes and initial spread of one leaf."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

__all__ = ["Draw", "ParamDef"]

Draw = tuple[Literal["log_steps", "log_uniform", "inverse_softplus", "powers"], float, float]
"""`log_steps`: log(1), log(2), ... along the last dim. `log_uniform` low, high: logarithms of a
uniform draw. `inverse_softplus` low, high: what softplus takes to a log-uniform draw. `powers`
first, last: a geometric sequence along the last dim."""


@dataclasses.dataclass(frozen=True)
class ParamDef:
    """One leaf: its logical shape, the name of each dim, and how it is drawn at the start.

    `std` is the standard deviation of a normal draw; 0 with `fill` gives a constant. `inputs`
    counts the contracted dims of a matrix (before the outputs, after layers and experts); it is 0
    for vectors and tables. `tied` marks an embedding table that is the head as well, `wide` a leaf
    that is float32 whatever the run's dtype. A token uses a share `active` of the leaf: of experts,
    which stand on a leading dim, the chosen ones. `draw` names another way than these, with its
    numbers.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    std: float = 0.0
    fill: float = 0.0
    inputs: int = 0
    tied: bool = False
    wide: bool = False
    active: float = 1.0
    draw: Draw | None = None

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    def stack(self, repeats: int) -> ParamDef:
        """The same leaf stacked on a leading axis of layers."""
        return dataclasses.replace(self, shape=(repeats, *self.shape), axes=("layers", *self.axes))

    def repeat(self, experts: int, active: int) -> ParamDef:
        """The leaves of all experts, of which a token uses `active`, on a leading dim."""
        shape, axes = (experts, *self.shape), ("experts", *self.axes)
        return dataclasses.replace(self, shape=shape, axes=axes, active=active / experts)

    @property
    def lead(self) -> int:
        """Number of leading dims that only count leaves: layers, experts."""
        return sum(axis in ("layers", "experts") for axis in self.axes[:2])

    def hold(self, matrices: str) -> ParamDef:
        """The leaf as its array is held under `Policy.matrices`."""
        order = self.hold_order(matrices)
        return dataclasses.replace(
            self,
            shape=tuple(self.shape[i] for i in order),
            axes=tuple(self.axes[i] for i in order),
        )

    def hold_order(self, matrices: str) -> tuple[int, ...]:
        """Which of the leaf's dims stands where in the held array."""
        dims = tuple(range(len(self.shape)))
        if not self.held_inputs(matrices):
            return dims
        if self.tied:
            return dims[::-1]
        lead = self.lead
        stop = lead + self.inputs
        return (*dims[:lead], *dims[stop:], *dims[lead:stop])

    def held_inputs(self, matrices: str) -> int:
        """Number of leading dims that the held array has at its end; 0 where it is as it is."""
        if self.tied:
            return int(matrices == "in_out")
        if "experts" in self.axes:  # grouped products read them one way
            return 0
        return self.inputs if matrices == "out_in" else 0

    def unstack(self) -> ParamDef:
        """The leaf of one layer of a stacked one."""
        return dataclasses.replace(self, shape=self.shape[1:], axes=self.axes[1:])
