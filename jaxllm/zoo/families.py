"""The families that are read and written: one literal dict."""

from jaxllm.zoo import (
    bert,
    bigbird,
    cohere2,
    gemma,
    gpt2,
    granite,
    llama,
    longformer,
    modernbert,
    olmo2,
    phi3,
    qwen3,
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
    "bert": bert.FAMILY,
    "modernbert": modernbert.FAMILY,
    "longformer": longformer.FAMILY,
    "bigbird": bigbird.FAMILY,
}

PRESETS = {**llama.PRESETS}
"""Named specs for benchmarks and random-weight runs."""
