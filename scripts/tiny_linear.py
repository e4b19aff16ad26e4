"""The tiny hybrids with linear attention of scripts/make_goldens.py."""

from tiny_models import SMALL, Tiny
from transformers import KimiLinearConfig as Kimi
from transformers import MiniMaxConfig as MiniMax
from transformers import OlmoHybridConfig as OlmoHybrid
from transformers import Qwen3NextConfig as Qwen3Next

__all__ = ["LINEAR"]

NEXT = SMALL | {
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "head_dim": 16,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_conv_kernel_dim": 3,
    "mlp_only_layers": [1],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
}
# Saving cuts the three convolutions into equal parts, so keys and values are equally wide.
HYBRID = SMALL | {
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 6,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
MINIMAX = SMALL | {
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_local_experts": 4,
    "block_size": 8,
    "full_attn_alpha_factor": 1.3,
    "full_attn_beta_factor": 0.7,
    "linear_attn_alpha_factor": 0.8,
    "linear_attn_beta_factor": 1.4,
    "mlp_alpha_factor": 1.2,
    "mlp_beta_factor": 0.6,
}
KIMI = SMALL | {
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-2,  # the reference's noise is less with it
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "linear_num_heads": 3,
    "linear_head_dim": 8,
    "linear_conv_kernel_dim": 3,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 5,
    "v_head_dim": 7,
    "moe_intermediate_size": 10,
    "num_local_experts": 6,
    "num_experts_per_tok": 3,
    "n_group": 3,
    "topk_group": 2,
}

LINEAR = {
    "kimi_linear": Tiny(Kimi, KIMI),
    "kimi_linear_hub": Tiny(
        Kimi,
        KIMI
        | {
            "num_hidden_layers": 2,
            "layer_types": ["linear_attention", "full_attention"],
            "mlp_layer_types": ["dense", "sparse"],
            "linear_conv_kernel_dim": 4,
            "q_lora_rank": 10,
            "attention_bias": True,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 2,
            "norm_topk_prob": False,
        },
        hub=True,
    ),
    "minimax": Tiny(
        MiniMax,
        MINIMAX | {"layer_types": ["linear_attention", "linear_attention", "full_attention"]},
    ),
    "minimax_hub": Tiny(
        MiniMax,
        MINIMAX
        | {
            "num_hidden_layers": 2,
            "head_dim": 10,
            "num_experts_per_tok": 1,
            "sliding_window": 9,
            "hidden_act": "gelu",
            "tie_word_embeddings": True,
            "mlp_alpha_factor": 1,
            "mlp_beta_factor": 1,
        },
        hub=True,
    ),
    "qwen3_next": Tiny(Qwen3Next, NEXT),
    "qwen3_next_hub": Tiny(
        Qwen3Next,
        NEXT
        | {
            "num_hidden_layers": 4,
            "rms_norm_eps": 1e-2,  # the reference's noise is less with it
            "layer_types": None,
            "linear_num_key_heads": 3,
            "linear_num_value_heads": 3,
            "linear_conv_kernel_dim": 4,
            "num_experts": 0,
            "tie_word_embeddings": True,
        },
        hub=True,
    ),
    "olmo_hybrid": Tiny(OlmoHybrid, HYBRID),
    "olmo_hybrid_nope": Tiny(
        OlmoHybrid,
        HYBRID
        | {
            "rope_parameters": {"rope_theta": None, "rope_type": "default"},
            "linear_allow_neg_eigval": False,
            "attention_bias": True,
            "layer_types": ["full_attention", "linear_attention", "linear_attention"],
        },
    ),
}
