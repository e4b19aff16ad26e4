"""What kernels are traced for: the device at hand, or one that is named.

It decides which implementations may serve a call. Naming one lets a machine without the device
lower for it (`gpu`, `tpu`), or run the kernels' own code slowly on a CPU (`interpreter`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import jax

__all__ = ["interpreting", "target", "targeting"]

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
