"""Softmax attention without a T x S matrix: one signature, several implementations."""

from pallas_kernels.flash_attention.api import (
    IMPLEMENTATIONS,
    Choice,
    explain,
    flash_attention,
    unfit,
)

__all__ = ["IMPLEMENTATIONS", "Choice", "explain", "flash_attention", "unfit"]
