"""What passes by a scan, its gate and its norm in one pass: one signature, several
implementations."""

from pallas_kernels.gated_norm.api import IMPLEMENTATIONS, Choice, explain, gated_norm, unfit

__all__ = ["IMPLEMENTATIONS", "Choice", "explain", "gated_norm", "unfit"]
