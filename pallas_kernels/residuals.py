"""Names under which kernels keep what their backward needs of their forward."""

__all__ = ["FLASH_ATTENTION"]

FLASH_ATTENTION = "flash_attention"
"""A remat policy that saves this name runs the forward once."""
