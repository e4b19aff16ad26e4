"""More tiny models of scripts/make_goldens.py: later dense families, and GGUF of several."""

from tiny_models import GEMMA2, GEMMA3, SMALL, Tiny
from transformers import Gemma2Config as Gemma2
from transformers import Gemma3TextConfig as Gemma3
from transformers import GemmaConfig as Gemma
from transformers import GPTNeoXConfig as GPTNeoX
from transformers import MixtralConfig as Mixtral
from transformers import Olmo3Config as Olmo3
from transformers import Phi3Config as Phi3
from transformers import PhiConfig as Phi
from transformers import Qwen3Config as Qwen3
from transformers import Zamba2Config as Zamba2

__all__ = ["MORE"]

OLMO3 = SMALL | {"num_hidden_layers": 4, "sliding_window": 6}
OLMO_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
    "full_attention": {
        "rope_type": "yarn",
        "rope_theta": 3e3,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}
NEOX = SMALL | dict.fromkeys(("num_key_value_heads", "rms_norm_eps"), ...) | {
    "num_attention_heads": 3,
}  # fmt: skip

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.3, 2.1],
    "long_factor": [1.2, 3.0, 5.5],
}
PHI3 = SMALL | {"num_attention_heads": 3, "num_key_value_heads": 1}
ZAMBA2 = SMALL | {
    "num_hidden_layers": 5,
    "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid", "hybrid"],
    "num_key_value_heads": 4,
    "rms_norm_eps": 1.0,  # ops follow each other without residuals: it keeps noise from growing
    "n_mamba_heads": 6,
    "mamba_d_state": 5,
    "mamba_ngroups": 2,
    "num_mem_blocks": 2,
    "adapter_rank": 3,
    "use_shared_attention_adapter": True,
    "use_mem_rope": True,
}

MORE = {
    # Two sets of parameters in turns. The reference's decode step has no least step size.
    "zamba2": Tiny(Zamba2, ZAMBA2, cache=False),
    "zamba2_hub": Tiny(
        Zamba2,
        ZAMBA2
        | {
            "num_hidden_layers": 3,
            "layers_block_type": ["hybrid", "linear_attention", "hybrid"],
            "num_key_value_heads": 2,
            "num_mem_blocks": 1,
            "use_shared_attention_adapter": False,
            "use_mem_rope": False,
            "add_bias_linear": True,
            "mamba_expand": 1,
            "mamba_d_conv": 3,
            "time_step_min": 0.1,
        },
        hub=True,
        cache=False,
    ),
    # The prompts lie within the original context, or past it.
    "phi3_longrope": Tiny(
        Phi3,
        PHI3
        | {
            "rope_parameters": LONGROPE | {"original_max_position_embeddings": 48},
            "original_max_position_embeddings": 48,
            "max_position_embeddings": 192,
        },
    ),
    "phi3_longrope_hub": Tiny(
        Phi3,
        PHI3
        | {
            "rope_parameters": LONGROPE | {"original_max_position_embeddings": 16},
            "original_max_position_embeddings": 16,
            "num_key_value_heads": 3,
            "num_hidden_layers": 1,
            "sliding_window": 9,
        },
        hub=True,
    ),
    "olmo3": Tiny(Olmo3, OLMO3),
    "olmo3_hub": Tiny(
        Olmo3,
        OLMO3
        | {
            "num_hidden_layers": 2,
            "layer_types": ["full_attention", "sliding_attention"],
            "rope_parameters": OLMO_ROPES,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
        hub=True,
    ),
    "gemma1": Tiny(Gemma, SMALL | {"head_dim": 10, "num_key_value_heads": 1}),
    "gemma1_hub": Tiny(
        Gemma,
        SMALL
        | {"head_dim": 12, "hidden_act": "gelu", "attention_bias": True, "num_hidden_layers": 1},
        hub=True,
    ),
    "gpt_neox": Tiny(GPTNeoX, NEOX),
    "gpt_neox_hub": Tiny(
        GPTNeoX,
        NEOX
        | {
            "num_attention_heads": 4,
            "use_parallel_residual": False,
            "attention_bias": False,
            "hidden_act": "gelu_new",
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 300.0,
                "partial_rotary_factor": 0.67,
            },
        },
        hub=True,
    ),
    "gpt_neox_whole": Tiny(
        GPTNeoX,
        NEOX
        | {
            "num_hidden_layers": 1,
            "rope_parameters": {
                "rope_type": "linear",
                "factor": 2.0,
                "rope_theta": 1e4,
                "partial_rotary_factor": 1.0,
            },
        },
        hub=True,
    ),
    "phi2": Tiny(
        Phi, SMALL | {"rms_norm_eps": ..., "num_attention_heads": 3, "num_key_value_heads": 3}
    ),
    "phi2_hub": Tiny(
        Phi,
        SMALL
        | {
            "rms_norm_eps": ...,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "num_hidden_layers": 1,
            "hidden_act": "gelu",
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 300.0,
                "partial_rotary_factor": 0.75,
            },
        },
        hub=True,
    ),
    "gguf_qwen3": Tiny(Qwen3, SMALL | {"head_dim": 10, "tie_word_embeddings": True}, gguf="F32"),
    "gguf_gemma2": Tiny(Gemma2, SMALL | GEMMA2 | {"query_pre_attn_scalar": 10}, gguf="F32"),
    "gguf_gemma3": Tiny(
        Gemma3,
        SMALL
        | GEMMA3
        | {
            "num_hidden_layers": 6,
            "layer_types": None,
            "query_pre_attn_scalar": 10,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 700.0},
            },
        },
        gguf="F32",
    ),
    "gguf_phi3": Tiny(
        Phi3,
        SMALL
        | {
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "sliding_window": 9,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.75,
            },
        },
        gguf="F32",
    ),
    "gguf_mixtral": Tiny(
        Mixtral,
        SMALL
        | {
            "intermediate_size": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": None,
        },
        gguf="F32",
    ),
}
