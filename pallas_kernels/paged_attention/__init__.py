"""Attention over keys and values in pages."""

from pallas_kernels.paged_attention.api import IMPLEMENTATIONS, explain, paged_attention, unfit

__all__ = ["IMPLEMENTATIONS", "explain", "paged_attention", "unfit"]
