"""Attention over keys and values in pages."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pallas_kernels.paged_attention.fits import unfit

if TYPE_CHECKING:
    from pallas_kernels.paged_attention.api import IMPLEMENTATIONS, explain, paged_attention

__all__ = ["IMPLEMENTATIONS", "explain", "paged_attention", "unfit"]


def __getattr__(name: str) -> Any:
    """What needs Pallas, at its first use: an engine whose programs are stored never does."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.api"), name)
