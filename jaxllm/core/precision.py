"""Dtypes by name, and what suits a device."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from jaxllm.core.config import nearest
from jaxllm.errors import ConfigError

__all__ = ["DTYPES", "DtypeName", "at_least_float32", "default_dtype", "dtype_of"]

DtypeName = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[DtypeName, ...] = ("float32", "bfloat16", "float16")


def dtype_of(name: str) -> Any:
    """The numpy dtype of a name.

    Raises:
      ConfigError: an unknown name.
    """
    if name not in DTYPES:
        raise ConfigError(f"dtype {name!r} is unknown; {nearest(name, DTYPES)}")
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def at_least_float32(dtype: Any) -> Any:
    """float32 for a narrower float, else the dtype itself: what sums are kept in."""
    return np.dtype(np.float32) if np.dtype(dtype).itemsize < 4 else np.dtype(dtype)


def default_dtype(platform: str) -> DtypeName:
    """float32 on a CPU (XLA casts narrower weights up at every step), bfloat16 elsewhere."""
    return "float32" if platform == "cpu" else "bfloat16"
