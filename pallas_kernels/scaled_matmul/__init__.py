"""Products of eight-bit floats with scales for blocks of both sides: Hopper, and plain jnp."""

from pallas_kernels.scaled_matmul.api import (
    BLOCK,
    IMPLEMENTATIONS,
    explain,
    rounded,
    scaled_matmul,
    unfit,
)

__all__ = ["BLOCK", "IMPLEMENTATIONS", "explain", "rounded", "scaled_matmul", "unfit"]
