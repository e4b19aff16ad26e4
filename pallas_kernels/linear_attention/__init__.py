"""Linear attention, with decays and the delta rule: one signature, several implementations."""

from pallas_kernels.linear_attention.api import (
    IMPLEMENTATIONS,
    Choice,
    explain,
    linear_attention,
    unfit,
)

__all__ = ["IMPLEMENTATIONS", "Choice", "explain", "linear_attention", "unfit"]
