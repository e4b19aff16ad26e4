"""GGUF's metadata in the words of config.json, which the families read.

Keys of an architecture come without its prefix, through a reader that knows what was asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxllm.zoo.table import ConfigReader

__all__ = ["DECODER", "SANDWICH", "read_common", "read_scaling", "short"]

DECODER = {
    "embed.table": "token_embd",
    "final_norm": "output_norm",
    "head.kernel": "output",
    "attn.q": "attn_q",
    "attn.k": "attn_k",
    "attn.v": "attn_v",
    "attn.o": "attn_output",
    "attn.q_norm": "attn_q_norm",
    "attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
    "attn_norm": "attn_norm",
    "mlp_norm": "ffn_norm",
}
"""Names of tensors in most architectures."""
SANDWICH = DECODER | {
    "attn_out_norm": "post_attention_norm",
    "mlp_out_norm": "post_ffw_norm",
}


def short(value: float) -> float:
    """GGUF keeps float32: the shortest decimal of the same value, 1e-05 and not 9.99999974e-06."""
    return float(str(np.float32(value)))


def read_common(config: ConfigReader, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes, base of the rope, and what the tensors say.

    Args:
      config: reader of the architecture's keys; problems are left with it.
      tensors: of the file, by name.
    """
    config.ignore("tensor_data_layout", "attention.layer_norm_epsilon", "rope.scaling.finetuned")
    width = config.take("embedding_length", int)
    heads = config.take("attention.head_count", int)
    head_dim = config.take("attention.key_length", int, width // max(heads, 1))
    if config.take("attention.value_length", int, head_dim) != head_dim:
        config.problem("attention.value_length differs from attention.key_length")
    rotated = config.take("rope.dimension_count", int, head_dim)
    table = tensors["token_embd.weight"].shape if "token_embd.weight" in tensors else (1,)
    found = {
        "vocab_size": config.take("vocab_size", int, table[0]),
        "hidden_size": width,
        "intermediate_size": config.take("feed_forward_length", int),
        "num_hidden_layers": config.take("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": config.take("attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "max_position_embeddings": config.take("context_length", int),
        "rms_norm_eps": short(config.take("attention.layer_norm_rms_epsilon", float)),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    if rotated != head_dim:
        found["partial_rotary_factor"] = rotated / max(head_dim, 1)
    if config.has("rope.freq_base"):
        found["rope_theta"] = short(config.take("rope.freq_base", float))
    return found | read_scaling(config, tensors)


def read_scaling(config: ConfigReader, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_scaling`: none, linear or yarn; a factor without a type is linear."""
    factor = config.take("rope.scaling.factor", float, config.take("rope.scale_linear", float, 1.0))
    kind = config.take("rope.scaling.type", str, "linear")
    original = config.take("rope.scaling.original_context_length", int, None)
    config.ignore("rope.scaling.attn_factor")
    for name in ("rope_freqs.weight", "rope_factors_long.weight"):
        if name in tensors:
            config.problem(f"{name} (a scaling as a tensor) is not supported; use the safetensors")
    if kind not in ("none", "linear", "yarn"):
        config.problem(f"rope.scaling.type {kind!r} is not supported; none, linear and yarn are")
    if kind == "none" or factor in (0, 1):
        return {}
    words: dict[str, Any] = {"rope_type": kind, "factor": short(factor)}
    if kind == "yarn" and original is not None:
        words["original_max_position_embeddings"] = original
    return {"rope_scaling": words}
