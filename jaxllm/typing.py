"""The one legend of axis letters, used in every annotation, einsum and formula of the house.

B batch            T new tokens (queries)   S keys in context     N query heads
K key/value heads  G = N / K                H head width          D model width
F ffn width        V vocabulary             E experts             A experts active a token
L stacked layers   P pages                  Z tokens a page       R adapter rank
M state width      C chunk              Hv value width, where it is not H

A *mesh axis* is called an axis, a *tensor dimension* a dim; counts are `num_*`; units stand in the
name (`_ms`, `_bytes`, `_tokens`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Array

__all__ = ["AnyArray", "Params", "Path", "Slot", "State"]

AnyArray = Array | np.ndarray
"""An array on the devices, traced, or on the host."""

Params = Mapping[str, Any]
"""Nested dict of leaves: plain arrays, `QArray`s or `AdaptedWeight`s."""

State = Any
"""What the model remembers of its sequences: a pytree shaped by the layers, or None in training."""

Slot = Any
"""A field of a pytree node: an array, or in its place a tracer, a `ShapeDtypeStruct`, a sharding or
a tuple of axis names, since trees of all of these take the node's form. The node's docstring gives
the shape."""

Path = str
"""Dotted path of a leaf with unstacked layer numbers, for example `layers.3.mlp.down`."""
