"""The selective scan (Mamba-1): one signature, several implementations."""

from pallas_kernels.selective_scan.api import (
    IMPLEMENTATIONS,
    Choice,
    explain,
    selective_scan,
    unfit,
)

__all__ = ["IMPLEMENTATIONS", "Choice", "explain", "selective_scan", "unfit"]
