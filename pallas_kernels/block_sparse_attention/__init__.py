"""Attention under a mask by blocks."""

from pallas_kernels.block_sparse_attention.api import (
    IMPLEMENTATIONS,
    block_sparse_attention,
    explain,
)
from pallas_kernels.block_sparse_attention.blocks import BlockMap

__all__ = ["IMPLEMENTATIONS", "BlockMap", "block_sparse_attention", "explain"]
