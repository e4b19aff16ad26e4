"""The families that are read and written: one literal dict."""

from jaxllm.zoo import (
    bamba,
    bert,
    bigbird,
    cohere2,
    deepseek,
    falcon_h1,
    gemma,
    gpt2,
    gpt_oss,
    granite,
    granite_hybrid,
    jamba,
    lfm2,
    llama,
    longformer,
    mamba,
    mixtral,
    modernbert,
    nemotron_h,
    olmo2,
    olmoe,
    phi3,
    qwen3,
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
    "gpt_oss": gpt_oss.FAMILY,
    "deepseek_v3": deepseek.FAMILY,
    "olmoe": olmoe.FAMILY,
    "qwen2_moe": qwen_moe.QWEN2_MOE,
    "qwen3_moe": qwen_moe.QWEN3_MOE,
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
