"""Kernels are traced and lowered once for all layers alike of a program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

__all__ = ["lowered_once"]


def lowered_once(*static: str) -> Callable[[Callable[..., Any]], Any]:
    """A decorator: jit of a kernel's call, with these arguments static.

    Lowering a kernel takes 0.3 to 1 s in Python; a program with 16 unrolled layers would pay for
    each. A function of its own is lowered once for all calls of one shape.
    """
    return lambda function: jax.jit(function, static_argnames=static)
