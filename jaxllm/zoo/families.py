"""The families that are read and written: one literal dict."""

from jaxllm.zoo import llama
from jaxllm.zoo.table import Family

__all__ = ["FAMILIES", "PRESETS"]

FAMILIES: dict[str, Family] = {"llama": llama.FAMILY}

PRESETS = {**llama.PRESETS}
"""Named specs for benchmarks and random-weight runs."""
