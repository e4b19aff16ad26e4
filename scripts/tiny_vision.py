"""The tiny models that see of scripts/make_goldens.py; their goldens are of text alone."""

from typing import Any

from tiny_experts import LLAMA4
from tiny_models import GEMMA3, SMALL, Tiny
from transformers import Gemma3Config, Gemma3TextConfig, Llama4Config, Llama4TextConfig

__all__ = ["VISION", "hub_text", "hub_vision"]

TOWER = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
LLAMA4_TOWER = TOWER | dict.fromkeys(
    ("vision_output_dim", "projector_input_dim", "projector_output_dim"), 8
)
# Of the text part: an absent key means it.
DEFAULTS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}


def _llama4(**text: Any) -> Llama4Config:
    inner = Llama4TextConfig(**text).to_dict()
    return Llama4Config(text_config=inner, vision_config=LLAMA4_TOWER)


def _gemma3(**text: Any) -> Gemma3Config:
    inner = Gemma3TextConfig(**text).to_dict()
    return Gemma3Config(text_config=inner, vision_config=TOWER, mm_tokens_per_image=4)


def hub_text(text: dict[str, Any]) -> dict[str, Any]:
    """The text part of a config without the keys that say what their absence means."""
    if text["model_type"] != "gemma3_text":
        return text
    return {k: v for k, v in text.items() if k not in DEFAULTS or v != DEFAULTS[k]}


def hub_vision(config: dict[str, Any]) -> dict[str, Any]:
    """The rest of a config of transformers 5 as files on the hub before it have it."""
    out = {k: v for k, v in config.items() if k not in ("dtype", "tie_word_embeddings")}
    return out | {"torch_dtype": config["dtype"], "eos_token_id": None}


VISION = {
    "llama4_vision": Tiny(
        _llama4, SMALL | LLAMA4 | {"num_hidden_layers": 2, "no_rope_layers": [1, 0]}
    ),
    "gemma3_vision": Tiny(_gemma3, SMALL | GEMMA3),
    "gemma3_vision_hub": Tiny(
        _gemma3,
        SMALL
        | GEMMA3
        | DEFAULTS
        | {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
        hub=True,
    ),
}
