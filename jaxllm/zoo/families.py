"""The families that are read and written: one literal dict."""

from jaxllm.zoo import (
    cohere2,
    gemma,
    gpt2,
    granite,
    llama,
    mixtral,
    olmo2,
    olmo_hybrid,
    olmoe,
    phi3,
    qwen3,
    qwen3_next,
    qwen_moe,
    smollm3,
)
from jaxllm.zoo.table import Family

__all__ = ["FAMILIES", "PRESETS"]

FAMILIES: dict[str, Family] = {
    "llama": llama.FAMILY,
    "qwen3": qwen3.FAMILY,
    "olmo2": olmo2.FAMILY,
    "gemma2": gemma.GEMMA2,
    "gemma3": gemma.GEMMA3,
    "smollm3": smollm3.FAMILY,
    "granite": granite.FAMILY,
    "phi3": phi3.FAMILY,
    "cohere2": cohere2.FAMILY,
    "gpt2": gpt2.FAMILY,
    "mixtral": mixtral.FAMILY,
    "olmoe": olmoe.FAMILY,
    "qwen2_moe": qwen_moe.QWEN2_MOE,
    "qwen3_moe": qwen_moe.QWEN3_MOE,
    "qwen3_next": qwen3_next.FAMILY,
    "olmo_hybrid": olmo_hybrid.FAMILY,
}

PRESETS = {**llama.PRESETS}
"""Named specs for benchmarks and random-weight runs."""
