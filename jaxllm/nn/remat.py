"""Rematerialisation by named policy: what the forward pass of a layer keeps for the backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxllm.core.policy import Remat
from pallas_kernels.residuals import FLASH_ATTENTION

__all__ = ["keep", "remat"]

_policies = jax.checkpoint_policies
_FUSED_ATTENTION = "dot_product_attention_fwd"
"""Begins the names of the primitives of cuDNN's attention: its results are the output and the
softmax statistics, and both are needed lest the kernel run twice."""


def keep(x: Float[Array, "..."], kind: str = "dot") -> Float[Array, "..."]:
    """Mark a value that `save_dots` keeps, or `save_attention` too for the kind `attention`."""
    return checkpoint_name(x, kind)


def _attention(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name.startswith(_FUSED_ATTENTION)


def _saved(*kinds: str) -> Callable[..., Any]:
    names = _policies.save_only_these_names(*kinds, FLASH_ATTENTION)
    return _policies.save_from_both_policies(names, _attention)


def _offload(primitive: Any, *args: Any, **params: Any) -> Any:
    return _attention(primitive) or _to_host(primitive, *args, **params)


_to_host = _policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[FLASH_ATTENTION],
    names_which_can_be_offloaded=["dot", "attention"],
    offload_src="device",
    offload_dst="pinned_host",
)

POLICIES: dict[Remat, Callable[..., Any] | None] = {
    "save_dots": _saved("dot", "attention"),
    "save_attention": _saved("attention"),
    "offload": _offload,
    "full": None,
}


def remat(module: type[nn.Module], name: Remat, *, scanned: bool) -> type[nn.Module]:
    """A module whose backward pass recomputes what the policy does not keep.

    Args:
      module: the class of one layer.
      name: of the policy; see `Policy.remat`.
      scanned: whether the module is the body of a scan, which hides the first computation;
        elsewhere XLA would find it and undo the remat.
    """
    if name == "none":
        return module
    return nn.remat(module, prevent_cse=not scanned, policy=POLICIES[name])
