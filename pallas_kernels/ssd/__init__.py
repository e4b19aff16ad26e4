"""The dual state space scan (Mamba-2): one signature, several implementations."""

from pallas_kernels.ssd.api import IMPLEMENTATIONS, Choice, explain, ssd, unfit

__all__ = ["IMPLEMENTATIONS", "Choice", "explain", "ssd", "unfit"]
