"""What kernels are traced for: the device at hand, or one that is named.

It decides which implementations may serve a call. Naming one lets a machine without the device
lower for it (`gpu`, `tpu`), or run the kernels' own code slowly on a CPU (`interpreter`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import jax

__all__ = ["device_name", "interpreting", "not_hopper", "processors", "target", "targeting"]

TARGETS = ("cpu", "gpu", "tpu", "interpreter")
_named = jax.make_user_context(None)  # part of jit's cache keys: no trace is used for another


def target() -> str:
    """The platform that kernels are traced for, one of `TARGETS`."""
    return _named.value or jax.default_backend()


def interpreting() -> bool:
    """Whether kernels are traced for the interpreter."""
    return target() == "interpreter"


@contextmanager
def targeting(name: str) -> Iterator[None]:
    """Traces what stands inside for a platform that need not be at hand.

    Args:
      name: one of `TARGETS`.

    Raises:
      ValueError: another name.
    """
    if name not in TARGETS:
        raise ValueError(f"there is no target {name!r}; there are {', '.join(TARGETS)}")
    with _named(name):
        yield


def not_hopper(platform: str) -> str | None:
    """Why the device at hand, if it is what is traced for, runs no kernel for Hopper, or None."""
    if platform == jax.default_backend() == "gpu":
        found = getattr(jax.devices()[0], "compute_capability", "unknown")
        if found != "9.0":
            return f"it needs compute capability 9.0 (Hopper), this device has {found}"
    return None


def device_name() -> str:
    """The name of the device that kernels are traced for; an H100 where there is no GPU."""
    if jax.default_backend() == "gpu":
        return jax.devices()[0].device_kind
    return "NVIDIA H100 80GB HBM3"


def processors() -> int:
    """Multiprocessors that a kernel's grid is for: two in the interpreter, else those of the
    device, or of an H100 where there is none."""
    if interpreting():
        return 2
    if jax.default_backend() == "gpu":
        return getattr(jax.devices()[0], "core_count", 132)
    return 132
