"""Names of activations."""

from __future__ import annotations

from typing import Literal

__all__ = ["Activation"]

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]
