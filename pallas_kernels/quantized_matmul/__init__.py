"""x times a matrix of packed integers."""

from pallas_kernels.quantized_matmul.api import IMPLEMENTATIONS, quantized_matmul, unfit

__all__ = ["IMPLEMENTATIONS", "quantized_matmul", "unfit"]
