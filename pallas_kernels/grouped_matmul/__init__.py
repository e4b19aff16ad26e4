"""The product of rows with the matrix of their group: one signature, several implementations."""

from pallas_kernels.grouped_matmul.api import (
    IMPLEMENTATIONS,
    Choice,
    explain,
    grouped_matmul,
    unfit,
)

__all__ = ["IMPLEMENTATIONS", "Choice", "explain", "grouped_matmul", "unfit"]
