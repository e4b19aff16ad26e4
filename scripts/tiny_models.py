"""The tiny models of scripts/make_goldens.py: configs in which every feature of a family counts."""

import dataclasses
from typing import Any

from golden_ropes import LINEAR, LLAMA3, MODELS
from tiny_hybrids import HYBRIDS
from transformers import Cohere2Config as Cohere2
from transformers import Gemma2Config as Gemma2
from transformers import Gemma3TextConfig as Gemma3
from transformers import GPT2Config as GPT2
from transformers import GraniteConfig as Granite
from transformers import LlamaConfig as Llama
from transformers import MistralConfig as Mistral
from transformers import Olmo2Config as Olmo2
from transformers import Phi3Config as Phi3
from transformers import Qwen2Config as Qwen2
from transformers import Qwen3Config as Qwen3
from transformers import SmolLM3Config as SmolLM3

__all__ = ["BASE", "FACTORS", "GEMMA2", "GEMMA3", "SMALL", "TINY", "Tiny"]

BASE = {
    "vocab_size": 80,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": None,
}
# Small and odd: the goldens of many families stand in the repository.
SMALL = {"hidden_size": 24, "intermediate_size": 40, "vocab_size": 67, "pad_token_id": None}
GEMMA2 = {
    "num_hidden_layers": 3,
    "head_dim": 10,
    "query_pre_attn_scalar": 7,
    "sliding_window": 6,
    "attn_logit_softcapping": 1.25,
    "final_logit_softcapping": 1.5,
}
GEMMA3 = {
    "num_hidden_layers": 4,
    "layer_types": [f"{kind}_attention" for kind in ("sliding", "sliding", "full", "sliding")],
    "head_dim": 10,
    "query_pre_attn_scalar": 13,
    "sliding_window": 6,
}
TWO_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
    "full_attention": {"rope_type": "default", "rope_theta": 2000.0},
}
FACTORS = {
    "embedding_multiplier": 3.5,
    "attention_multiplier": 0.21,
    "residual_multiplier": 0.22,
    "logits_scaling": 0.7,
}
COHERE2 = SMALL | {
    "num_hidden_layers": 5,
    "logit_scale": 0.3,
    "sliding_window": 6,
    "layer_norm_eps": 1e-5,
    "rms_norm_eps": ...,
}
GPT = dict.fromkeys(BASE, ...) | {
    "vocab_size": 67,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 3,
    "n_positions": 48,
    "bos_token_id": None,
    "eos_token_id": None,
}


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A tiny model: its config, and how its files are written.

    Attributes:
      config: class of the config.
      changes: what differs from `BASE`; a key with `...` is left out.
      hub: rewrite config.json as files on the hub before transformers 5 have it.
      dtype: of the tensors on disk.
      shard: size of a shard, or None for one file.
      gguf: types of the matrices in a GGUF file, which stands in place of config and safetensors.
      cache: take the greedy answer with a cache; without where the reference's decode step goes
        without what its whole pass does.
    """

    config: Any
    changes: dict[str, Any]
    hub: bool = False
    dtype: str = "float32"
    shard: str | None = None
    gguf: str | None = None
    cache: bool = True


TINY = {
    "llama_mha": Tiny(Llama, {"num_key_value_heads": 4}, hub=True),
    "llama_gqa_scaled": Tiny(
        Llama, {"head_dim": 32, "rope_parameters": LLAMA3, "intermediate_size": 40}
    ),
    "llama_gqa_scaled_hub": Tiny(
        Llama,
        {"head_dim": 32, "rope_parameters": LLAMA3 | {"factor": 4.0}, "tie_word_embeddings": True},
        hub=True,
    ),
    "llama_linear": Tiny(Llama, {"rope_parameters": LINEAR}),
    "llama_linear_hub": Tiny(
        Llama, {"rope_parameters": LINEAR | {"factor": 2.5}, "num_hidden_layers": 1}, hub=True
    ),
    "llama_mqa": Tiny(
        Llama,
        {"hidden_size": 39, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16},
    ),
    "llama_bias": Tiny(
        Llama, {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu", "vocab_size": 97}
    ),
    "llama_odd": Tiny(
        Llama,
        {
            "hidden_size": 35,
            "intermediate_size": 53,
            "num_hidden_layers": 3,
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
            "head_dim": 6,
            "vocab_size": 71,
            "hidden_act": "gelu_pytorch_tanh",
        },
    ),
    "smollm2": Tiny(
        Llama,
        {
            "hidden_size": 36,
            "intermediate_size": 96,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
            "tie_word_embeddings": True,
        },
        hub=True,
    ),
    "mistral_full": Tiny(Mistral, {"sliding_window": None}),
    "mistral_window": Tiny(Mistral, {"sliding_window": 8}),
    "mistral_window_hub": Tiny(
        Mistral, {"sliding_window": 12, "head_dim": 16, "num_hidden_layers": 1}, hub=True
    ),
    "qwen2": Tiny(Qwen2, {"tie_word_embeddings": True, "rms_norm_eps": 1e-6}),
    "qwen2_hub": Tiny(Qwen2, {"num_attention_heads": 2, "num_key_value_heads": 1}, hub=True),
    "llama_sharded": Tiny(Llama, {"num_hidden_layers": 3}, dtype="bfloat16", shard="24KB"),
    "gguf_f32": Tiny(Llama, {"attention_bias": True, "mlp_bias": True}, gguf="F32"),
    "gguf_q8": Tiny(
        Llama, {"head_dim": 16, "intermediate_size": 64, "tie_word_embeddings": True}, gguf="Q8_0"
    ),
    "gguf_qwen2": Tiny(Qwen2, {"num_key_value_heads": 1, "num_hidden_layers": 1}, gguf="F32"),
    **{name: Tiny(Llama, c, hub=name.endswith("_hub")) for name, c in MODELS.items()},
    "qwen3": Tiny(Qwen3, SMALL | {"head_dim": 10, "tie_word_embeddings": True}, hub=True),
    "qwen3_window": Tiny(
        Qwen3,
        SMALL
        | {
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 1,
            "head_dim": 10,
            "attention_bias": True,
        },
    ),
    "olmo2": Tiny(Olmo2, SMALL),
    "olmo2_hub": Tiny(Olmo2, SMALL | {"num_hidden_layers": 1, "attention_bias": True}, hub=True),
    "gemma2": Tiny(Gemma2, SMALL | GEMMA2),
    "gemma2_hub": Tiny(
        Gemma2,
        SMALL
        | GEMMA2
        | {
            "num_hidden_layers": 2,
            "attn_logit_softcapping": None,
            "tie_word_embeddings": False,
            "attention_bias": True,
        },
        hub=True,
    ),
    "gemma3": Tiny(Gemma3, SMALL | GEMMA3 | {"rope_parameters": TWO_ROPES}),
    "gemma3_hub": Tiny(
        Gemma3,
        SMALL
        | GEMMA3
        | {
            "rope_parameters": TWO_ROPES
            | {"full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 700.0}},
            "tie_word_embeddings": False,
        },
        hub=True,
    ),
    "smollm3": Tiny(SmolLM3, SMALL | {"num_hidden_layers": 5, "tie_word_embeddings": False}),
    "smollm3_hub": Tiny(
        SmolLM3,
        SMALL
        | {
            "num_hidden_layers": 4,
            "no_rope_layers": [0, 1, 1, 0],
            "use_sliding_window": True,
            "sliding_window": 7,
            "layer_types": ["full_attention", "sliding_attention"] + ["sliding_attention"] * 2,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 900.0},
        },
        hub=True,
    ),
    "granite": Tiny(Granite, SMALL | FACTORS),
    "granite_hub": Tiny(
        Granite,
        SMALL
        | FACTORS
        | {
            "logits_scaling": 8,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
        hub=True,
    ),
    "phi3_partial": Tiny(
        Phi3,
        SMALL
        | {
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.75,
            },
        },
    ),
    "phi3_partial_hub": Tiny(
        Phi3,
        SMALL
        | {
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "sliding_window": 8,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
            },
            "tie_word_embeddings": True,
        },
        hub=True,
    ),
    "cohere2": Tiny(Cohere2, COHERE2),
    "cohere2_hub": Tiny(
        Cohere2,
        COHERE2
        | {
            "num_hidden_layers": 4,
            "attention_bias": True,
            "tie_word_embeddings": False,
            "layer_types": None,
        },
        hub=True,
    ),
    "gpt2": Tiny(GPT2, GPT | {"n_inner": 40}),
    "gpt2_hub": Tiny(
        GPT2,
        GPT | {"scale_attn_weights": False, "activation_function": "relu"},
        hub=True,
    ),
}
TINY |= {name: Tiny(**fields) for name, fields in HYBRIDS.items()}
