"""x times a matrix of packed integers, or rows times their groups' matrices."""

from pallas_kernels.quantized_matmul.api import IMPLEMENTATIONS, quantized_matmul, unfit
from pallas_kernels.quantized_matmul.grouped import grouped_quantized_matmul, grouped_unfit

__all__ = [
    "IMPLEMENTATIONS",
    "grouped_quantized_matmul",
    "grouped_unfit",
    "quantized_matmul",
    "unfit",
]
