"""Training: one compiled step, data by (seed, step), checkpoints, a run directory.

`jaxllm.train(config)` runs `jaxllm.train.loop.train`: the package can be called.
"""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING, Any

__all__ = ["Optimizer", "Result", "RunConfig"]

if TYPE_CHECKING:
    from jaxllm.train.config import Optimizer, RunConfig
    from jaxllm.train.loop import Result

_HOMES = {
    "Optimizer": "jaxllm.train.config",
    "Result": "jaxllm.train.loop",
    "RunConfig": "jaxllm.train.config",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'jaxllm.train' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


class _Package(types.ModuleType):
    """The package as a function."""

    def __call__(self, config: RunConfig, *, quiet: bool = False) -> Result:
        """See `jaxllm.train.loop.train`."""
        from jaxllm.train.loop import train

        return train(config, quiet=quiet)


sys.modules[__name__].__class__ = _Package
