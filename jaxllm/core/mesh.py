"""Device meshes by named axes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

from jaxllm.core.config import nearest, require
from jaxllm.errors import CapacityError, ConfigError

__all__ = ["AXES", "make_mesh", "parse_mesh"]

AXES = ("data", "fsdp", "stage", "expert", "context", "tensor")
"""Mesh axes from the slowest links to the fastest."""


def parse_mesh(text: str) -> dict[str, int]:
    """Axis sizes from a text such as `data=2,tensor=4`."""
    sizes: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        name, _, size = part.partition("=")
        require(name in AXES, f"mesh {text!r}: unknown axis {name!r}; {nearest(name, AXES)}")
        require(
            size.isdecimal() and int(size) > 0, f"mesh {text!r}: write {name}=2, found {part!r}"
        )
        sizes[name] = int(size)
    return sizes


def make_mesh(sizes: Mapping[str, int], devices: Any = None) -> Any:
    """A mesh with all axes of `AXES`, those not named of size 1.

    With several processes a mesh takes the devices of all: one without a part in the program would
    wait for ever.

    Raises:
      ConfigError: an unknown axis, devices of several processes left out, or axes that a TPU's
        torus does not hold.
      CapacityError: more devices asked for than there are.
    """
    import jax

    for name in sizes:
        require(name in AXES, f"mesh: unknown axis {name!r}; {nearest(name, AXES)}")
    available = list(jax.devices() if devices is None else devices)
    wanted = math.prod(sizes.values())
    if wanted > len(available):
        raise CapacityError(
            f"mesh {dict(sizes)} needs {wanted} devices; {len(available)} are there"
        )
    processes = len({device.process_index for device in available})
    require(
        wanted == len(available) or processes == 1,
        f"mesh {dict(sizes)} takes {wanted} devices of {len(available)} on {processes} processes; "
        f"name all, for example --mesh fsdp={len(available)}",
    )
    auto = jax.sharding.AxisType.Auto
    try:
        return jax.make_mesh(
            tuple(sizes.get(name, 1) for name in AXES),
            AXES,
            axis_types=(auto,) * len(AXES),
            devices=available[:wanted],
        )
    except NotImplementedError:  # jax's word for axes that do not lie on a TPU's torus
        sides = _sides(available)
        fits = sorted({math.prod(c) for n in range(4) for c in itertools.combinations(sides, n)})
        raise ConfigError(
            f"mesh {dict(sizes)} does not lie on the torus of these devices: every size has to be "
            f"the product of some of its sides, {' x '.join(map(str, sides))}, so one of "
            f"{', '.join(map(str, fits))}"
        ) from None


def _sides(devices: list[Any]) -> list[int]:
    """Sides of the torus that TPUs lie on."""
    return [1 + max(places) for places in zip(*(d.coords for d in devices), strict=True)]
