"""The families that are read and written: one literal dict."""

from jaxllm.zoo import (
    bamba,
    bert,
    bigbird,
    cohere2,
    falcon_h1,
    gemma,
    gpt2,
    granite,
    granite_hybrid,
    jamba,
    lfm2,
    llama,
    longformer,
    mamba,
    modernbert,
    nemotron_h,
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
    "mamba": mamba.FAMILY,
    "mamba2": mamba.FAMILY2,
    "jamba": jamba.FAMILY,
    "bamba": bamba.FAMILY,
    "nemotron_h": nemotron_h.FAMILY,
    "falcon_h1": falcon_h1.FAMILY,
    "lfm2": lfm2.FAMILY,
    "granitemoehybrid": granite_hybrid.FAMILY,
    "bert": bert.FAMILY,
    "modernbert": modernbert.FAMILY,
    "longformer": longformer.FAMILY,
    "bigbird": bigbird.FAMILY,
}

PRESETS = {**llama.PRESETS}
"""Named specs for benchmarks and random-weight runs."""
