"""Products of a decoding step's few rows, fused with their neighbours: Hopper, and plain jnp."""

from pallas_kernels.decode_matmul.api import (
    IMPLEMENTATIONS,
    MOST_ROWS,
    Link,
    decode_chain,
    decode_matmul,
    explain,
    unfit,
)
from pallas_kernels.decode_matmul.packed import Packed, Packing

__all__ = [
    "IMPLEMENTATIONS",
    "MOST_ROWS",
    "Link",
    "Packed",
    "Packing",
    "decode_chain",
    "decode_matmul",
    "explain",
    "unfit",
]
