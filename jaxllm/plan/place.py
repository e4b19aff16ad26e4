"""Where a program would run: devices that are here, or a topology that is not.

A TPU topology is compiled for by libtpu itself. A GPU that is not here is stood in for by as many
CPU devices: what such a program says of memory is an estimate.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import re
from collections.abc import Iterator
from typing import Any

from jaxllm.core import runtime
from jaxllm.core.config import nearest, require
from jaxllm.errors import CapacityError, ConfigError, UnsupportedError
from jaxllm.ops.stand_in import standing_in
from jaxllm.train.devices import Limits, limits, peak_flops
from jaxllm.train.memory import memory_limit
from pallas_kernels.target import targeting

__all__ = ["GPUS", "TPUS", "Place", "find_place"]

TPUS = {"v5e": "v5litepod-4", "v5p": "v5p-8", "v6e": "v6e-4", "tpu7x": "tpu7x-8"}
"""Generations that libtpu compiles for, with an accelerator type of each."""

GPUS = {
    "h100": "NVIDIA H100 80GB HBM3",
    "h200": "NVIDIA H200",
    "gh200": "NVIDIA GH200 480GB",
    "b200": "NVIDIA B200",
    "a100": "NVIDIA A100-SXM4-80GB",
    "a100-40gb": "NVIDIA A100-SXM4-40GB",
    "l4": "NVIDIA L4",
    "l40s": "NVIDIA L40S",
}
"""Short names of GPUs and jax's own."""

_MANY_CPUS = 1024
_CUDA = ("jax_cuda13_plugin", "jax_cuda12_plugin")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Devices to compile for.

    Attributes:
      name: as given, `v5e:4x4`.
      kind: jax's `device_kind` of what is planned for.
      platform: `tpu`, `gpu` or `cpu`: what the run will be on.
      devices: what is compiled for.
      estimated: whether these stand in for others.
    """

    name: str
    kind: str
    platform: str
    devices: tuple[Any, ...]
    estimated: bool

    @property
    def limits(self) -> Limits | None:
        """Memory and bandwidths of one device, where they are known."""
        known = limits(self.kind)
        room = memory_limit(self.devices[0]) if self.platform == "cpu" else None
        if known is None and room is not None:
            return Limits(memory_bytes=room, memory_bytes_per_s=0.0, link_bytes_per_s=0.0)
        return known

    @property
    def alone(self) -> bool:
        """Whether it is the one device that programs without a mesh run on."""
        import jax

        return self.devices == tuple(jax.devices()[:1])

    def peak(self, dtype: str) -> float | None:
        """FLOP/s of one device in a dtype, or None if it is not known."""
        return peak_flops(self.kind, dtype)

    @contextlib.contextmanager
    def traced(self) -> Iterator[None]:
        """Traces what stands inside for the platform that is compiled for.

        Of a GPU that is not here, its attention kernels are described.
        """
        kernels = standing_in(self.platform) if self.estimated else contextlib.nullcontext()
        with kernels, targeting("tpu" if self.platform == "tpu" else self.devices[0].platform):
            yield


def find_place(text: str) -> Place:
    """The devices that a text such as `v5p:8x8x8`, `h100:8` or `cpu:8` names.

    Raises:
      ConfigError: an unknown name or shape, with the known or nearest ones.
      UnsupportedError: libtpu is missing.
      CapacityError: this process cannot have as many CPU devices.
    """
    name, _, shape = text.strip().lower().partition(":")
    known = (*TPUS, *GPUS, "cpu")
    require(name in known, f"--devices {text}: unknown device {name!r}; {nearest(name, known)}")
    sizes = [int(x) for x in shape.split("x") if x.isdecimal()]
    example = "2x2x1" if name in ("v5p", "tpu7x") else "4x4" if name in TPUS else "8"
    require(
        re.fullmatch(r"\d+(x\d+)*", shape) is not None and math.prod(sizes) > 0,
        f"--devices {text}: write a shape of chips after the name, such as {name}:{example}",
    )
    if name in TPUS:
        return _tpu(text.strip().lower(), name, sizes)
    require(len(sizes) == 1, f"--devices {text}: write a number of devices, {name}:{example}")
    return _stand_ins(f"{name}:{sizes[0]}", name, sizes[0])


def _tpu(text: str, name: str, sizes: list[int]) -> Place:
    if importlib.util.find_spec("libtpu") is None:
        raise UnsupportedError(
            f"--devices {text}: TPU programs are compiled by libtpu, which is missing; "
            "install jaxllm[plan]"
        )
    most = 3 if name in ("v5p", "tpu7x") else 2
    require(
        2 <= len(sizes) <= most or (len(sizes) == 3 and sizes[2] == 1),
        f"--devices {text}: {name} has {most} dims, as in {name}:{'x'.join('221'[:most])}",
    )
    whole = math.prod(sizes) == 1
    even = [size + size % 2 for size in sizes[:2]]
    require(
        whole or even == sizes[:2],
        f"--devices {text}: hosts have 2x2 chips, so the first two sizes are even; "
        f"the nearest is {name}:{'x'.join(map(str, [*even, *sizes[2:]]))}",
    )
    runtime.compile_for_tpu(TPUS[name])
    _ask_for_cpus(1, alone=True)
    from jax.experimental import topologies

    more = {"chips_per_host_bounds": (1, 1, 1)} if whole else {}
    try:
        found = topologies.get_topology_desc(text, "tpu", **more)
    except Exception as error:  # libtpu's own errors have no common type
        first = str(error).splitlines()[0]
        raise ConfigError(f"--devices {text}: libtpu refuses this topology: {first}") from None
    devices = tuple(found.devices)
    return Place(
        name=text, kind=devices[0].device_kind, platform="tpu", devices=devices, estimated=False
    )


def _stand_ins(text: str, name: str, number: int) -> Place:
    """GPUs or CPUs: those that are here, else CPU devices in their place."""
    kind = GPUS.get(name, "cpu")
    _ask_for_cpus(number, alone=name == "cpu" or not any(map(importlib.util.find_spec, _CUDA)))
    if name == "cpu":
        devices = _cpus(text, number)
        return Place(name=text, kind="cpu", platform="cpu", devices=devices, estimated=False)
    here = [d for d in _gpus() if d.device_kind == kind]
    if len(here) >= number:
        devices = tuple(here[:number])
        return Place(name=text, kind=kind, platform="gpu", devices=devices, estimated=False)
    devices = _cpus(text, number)
    return Place(name=text, kind=kind, platform="gpu", devices=devices, estimated=True)


def _gpus() -> list[Any]:
    import jax

    try:
        return list(jax.devices("gpu"))
    except RuntimeError:
        return []


def _ask_for_cpus(number: int, *, alone: bool) -> None:
    """Before jax starts: at least so many CPU devices, and whether to look for others.

    When it has started there are as many as there are.
    """
    import jax

    if alone and not jax.config.jax_platforms:
        jax.config.update("jax_platforms", "cpu")
    if jax.config.jax_num_cpu_devices < number <= _MANY_CPUS:
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", number)


def _cpus(text: str, number: int) -> tuple[Any, ...]:
    """That many CPU devices of this process."""
    import jax

    require(
        number <= _MANY_CPUS, f"--devices {text}: at most {_MANY_CPUS} devices can be stood in for"
    )
    found = jax.devices("cpu")
    if len(found) < number:
        raise CapacityError(
            f"--devices {text}: this process has {len(found)} CPU devices already; "
            "start a new one, or set JAX_NUM_CPU_DEVICES"
        )
    return tuple(found[:number])
