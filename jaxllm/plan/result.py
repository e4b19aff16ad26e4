"""What a plan says, as frozen values with a JSON form."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxllm.plan.counts import Counts, Tensor

__all__ = ["Memory", "Plan", "ProgramPlan", "Roofline", "Serving"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one program on one device.

    Attributes:
      parameters: of the model.
      optimizer: what the optimizer remembers; 0 outside of training.
      state: keys, values and recurrent states; 0 in training.
      other_arguments: batches, counters.
      outputs: that take the place of no argument.
      temporaries: activations, gradients and all else that lives within a call.
      activations: of these, what the forward pass keeps for the backward pass.
      code: of the program.
      limit: of the device, or None where it is not known.
      estimated: whether a program of another platform stands in.
    """

    parameters: int
    optimizer: int
    state: int
    other_arguments: int
    outputs: int
    temporaries: int
    code: int
    limit: int | None
    estimated: bool
    activations: int = 0

    @property
    def parts(self) -> dict[str, int]:
        """What the total is made of, by name."""
        return {
            "parameters": self.parameters,
            "optimizer": self.optimizer,
            "state (keys, values)": self.state,
            "other arguments": self.other_arguments,
            "outputs": self.outputs,
            "activations": self.activations,
            "other temporaries" if self.activations else "temporaries": (
                self.temporaries - self.activations
            ),
            "code": self.code,
        }

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.parts.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roofline:
    """The least time of one call, each resource alone at its peak; seconds, None where unknown.

    Attributes:
      compute_s: FLOPs (those executed, or those needed if kernels hide more) over the peak.
      memory_s: bytes moved over the memory's bandwidth.
      network_s: bytes sent over all links of a device together.
      mfu_bound: needed FLOPs over what the peak does in the longest of the three.
    """

    compute_s: float | None
    memory_s: float | None
    network_s: float | None
    mfu_bound: float | None

    @property
    def seconds(self) -> float | None:
        """The longest of the known times: everything else hides behind it."""
        known = [t for t in (self.compute_s, self.memory_s, self.network_s) if t is not None]
        return max(known, default=None)

    @property
    def bound_by(self) -> str | None:
        """Which resource that is."""
        names = {"compute": self.compute_s, "memory": self.memory_s, "network": self.network_s}
        known = {name: t for name, t in names.items() if t is not None}
        return max(known, key=lambda name: known[name]) if known else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramPlan:
    """One program on the devices.

    Attributes:
      name: `step`, `prefill` or `decode`.
      tokens: of one call, over all devices.
      needed_flops: of one call over all devices, masked pairs and recomputation left out.
      memory: of a device; temporaries alone are known of a program that the compiler refused.
      counts: of a device; None for a program that the compiler refused.
      time: the roofline; None without counts.
      arguments: the largest arguments on a device.
      fits: whether it does; None where the device's memory is not known.
      compile_s: seconds that it took to compile here.
    """

    name: str
    tokens: int
    needed_flops: float
    memory: Memory
    counts: Counts | None
    time: Roofline | None
    arguments: tuple[Tensor, ...]
    fits: bool | None
    compile_s: float

    @property
    def tokens_per_s(self) -> float | None:
        """Most tokens a second over all devices."""
        seconds = None if self.time is None else self.time.seconds
        return self.tokens / seconds if seconds else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serving:
    """What is left for sequences.

    Attributes:
      kv_bytes_per_token: of the state, over all devices.
      kv_capacity_tokens: that all devices together hold beside the parameters and the largest
        temporaries; None where the memory is not known.
      waste: (bucket, mean share of a prompt's positions that is padding) of every prompt bucket.
    """

    kv_bytes_per_token: float
    kv_capacity_tokens: int | None
    waste: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The answer.

    Attributes:
      source: what was planned.
      purpose: `train` or `serve`.
      place: the devices' name.
      kind: jax's name of one.
      devices: how many.
      mesh: axis sizes above 1.
      settings: batch, length, remat, dtypes …
      num_params: of the model.
      programs: in the order in which they run.
      serving: for `serve`.
      remat: (policy, bytes on a device, executed over needed FLOPs, least seconds) of the policies
        that were compiled.
      notes: what a reader should know about these numbers.
    """

    source: str
    purpose: str
    place: str
    kind: str
    devices: int
    mesh: Mapping[str, int]
    settings: Mapping[str, Any]
    num_params: int
    programs: tuple[ProgramPlan, ...]
    serving: Serving | None = None
    remat: tuple[tuple[str, int, float | None, float | None], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool | None:
        """Whether every program does; None where that is not known."""
        found = [program.fits for program in self.programs]
        return False if False in found else None if None in found else True

    def to_json(self) -> dict[str, Any]:
        """Plain values; sums and rates are included."""
        out = _plain(self)
        out["fits"] = self.fits
        for row, program in zip(out["programs"], self.programs, strict=True):
            row["memory"]["total"] = program.memory.total
            row["tokens_per_s"] = program.tokens_per_s
            if program.time is not None:
                row["time"] |= {"seconds": program.time.seconds, "bound_by": program.time.bound_by}
        return out


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, (tuple, list)) else value
