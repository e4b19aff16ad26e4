"""One new token a sequence: rotation, the cache's write and attention over it in one kernel."""

from pallas_kernels.decode_attention.api import (
    IMPLEMENTATIONS,
    Choice,
    Problem,
    decode_attention,
    explain,
    unfit,
)

__all__ = ["IMPLEMENTATIONS", "Choice", "Problem", "decode_attention", "explain", "unfit"]
