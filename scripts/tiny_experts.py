"""The tiny models with experts of scripts/make_goldens.py."""

from tiny_models import FACTORS, SMALL, Tiny
from transformers import DeepseekV2Config as DeepseekV2
from transformers import DeepseekV3Config as DeepseekV3
from transformers import Dots1Config as Dots1
from transformers import Glm4MoeConfig as Glm4Moe
from transformers import GptOssConfig as GptOss
from transformers import GraniteMoeConfig as GraniteMoe
from transformers import GraniteMoeSharedConfig as GraniteMoeShared
from transformers import Lfm2MoeConfig as Lfm2Moe
from transformers import Llama4TextConfig as Llama4
from transformers import MiniMaxM2Config as MiniMaxM2
from transformers import MixtralConfig as Mixtral
from transformers import OlmoeConfig as Olmoe
from transformers import Qwen2MoeConfig as Qwen2Moe
from transformers import Qwen3MoeConfig as Qwen3Moe

__all__ = ["EXPERTS", "LLAMA4"]

MOE = SMALL | {"intermediate_size": 20, "num_experts_per_tok": 2}
MANY = MOE | {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 12}

LATENT = MOE | {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 10,
    "n_routed_experts": 6,
    "n_group": 3,
    "topk_group": 2,
    "num_experts_per_tok": 3,
    "kv_lora_rank": 12,
    "q_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8,
    "v_head_dim": 5,
    "first_k_dense_replace": 1,
    "rms_norm_eps": 1e-5,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.8,
}

OSS = MOE | {
    "num_local_experts": 5,
    "head_dim": 16,
    "intermediate_size": 14,
    "sliding_window": 6,
    "swiglu_limit": 0.8,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1.5e4,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 4.0,
        "beta_slow": 1.0,
        "truncate": False,
    },
}

LLAMA4 = MOE | {
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "head_dim": 10,
    "intermediate_size": 14,
    "intermediate_size_mlp": 18,
    "num_hidden_layers": 4,
    "interleave_moe_layer_step": 2,
    "no_rope_layers": [1, 1, 0, 1],
    "attention_chunk_size": 8,
    "floor_scale": 6,
    "attn_scale": 0.5,
}
GROUPED = MOE | {
    "moe_intermediate_size": 10,
    "n_routed_experts": 6,
    "n_group": 3,
    "topk_group": 2,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "routed_scaling_factor": 1.7,
    "first_k_dense_replace": 1,
}

EXPERTS = {
    "glm4_moe": Tiny(Glm4Moe, GROUPED | {"use_qk_norm": True, "head_dim": 12}),
    "glm4_moe_hub": Tiny(
        Glm4Moe,
        GROUPED
        | {
            "n_group": 1,
            "topk_group": 1,
            "attention_bias": True,
            "head_dim": 8,
            "norm_topk_prob": False,
            "n_shared_experts": 2,
        },
        hub=True,
    ),
    "lfm2_moe": Tiny(
        Lfm2Moe,
        MANY
        | {
            "rms_norm_eps": ...,
            "num_hidden_layers": 4,
            "num_dense_layers": 1,
            "layer_types": ["conv", "full_attention", "conv", "full_attention"],
            "routed_scaling_factor": 1.4,
            "conv_bias": True,
        },
    ),
    "dots1": Tiny(
        Dots1,
        GROUPED
        | {"num_hidden_layers": 3, "sliding_window": 6, "max_window_layers": 2, "head_dim": 8},
    ),
    "minimax_m2": Tiny(
        MiniMaxM2,
        MOE
        | {
            "num_local_experts": 5,
            "head_dim": 12,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
    "minimax_m2_hub": Tiny(
        MiniMaxM2,
        MOE
        | {
            "num_local_experts": 4,
            "head_dim": 8,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.75,
            },
        },
        hub=True,
    ),
    "llama4": Tiny(Llama4, LLAMA4),
    "llama4_hub": Tiny(
        Llama4,
        LLAMA4
        | {
            "num_hidden_layers": 2,
            "num_experts_per_tok": 2,
            "interleave_moe_layer_step": 1,
            "no_rope_layers": [1, 0],
            "use_qk_norm": False,
            "attn_temperature_tuning": False,
        },
        hub=True,
    ),
    "gpt_oss": Tiny(GptOss, OSS),
    "gpt_oss_hub": Tiny(
        GptOss,
        OSS | {"num_hidden_layers": 1, "swiglu_alpha": 1.3, "layer_types": ["full_attention"]},
        hub=True,
        dtype="bfloat16",
    ),
    "granite_moe": Tiny(GraniteMoe, MOE | FACTORS | {"num_local_experts": 5}),
    "granite_moe_hub": Tiny(
        GraniteMoe,
        MOE
        | FACTORS
        | {
            "num_hidden_layers": 1,
            "num_local_experts": 4,
            "num_experts_per_tok": 3,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "hidden_act": "gelu",
        },
        hub=True,
    ),
    "granite_moe_shared": Tiny(
        GraniteMoeShared,
        MOE | FACTORS | {"num_local_experts": 5, "shared_intermediate_size": 18},
        hub=True,
    ),
    "deepseek_v2": Tiny(
        DeepseekV2,
        LATENT
        | {
            "rope_parameters": YARN,
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 1.7,
            "n_shared_experts": 2,
        },
    ),
    "deepseek_v2_hub": Tiny(
        DeepseekV2,
        LATENT | {"q_lora_rank": None, "n_shared_experts": 1, "n_routed_experts": 5, "n_group": 1},
        hub=True,
    ),
    "deepseek_v3": Tiny(DeepseekV3, LATENT | {"rope_parameters": YARN}),
    "deepseek_v3_hub": Tiny(
        DeepseekV3,
        LATENT
        | {
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 2,
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.5,
            "rope_interleave": False,
            "attention_bias": True,
        },
        hub=True,
    ),
    "mixtral": Tiny(Mixtral, MOE | {"num_local_experts": 4, "sliding_window": None}),
    "mixtral_hub": Tiny(
        Mixtral,
        MOE | {"num_local_experts": 5, "sliding_window": 9, "num_hidden_layers": 1},
        hub=True,
    ),
    "olmoe": Tiny(Olmoe, MOE | {"num_experts": 6, "num_experts_per_tok": 3}),
    "olmoe_hub": Tiny(
        Olmoe,
        MOE
        | {
            "num_experts": 4,
            "norm_topk_prob": True,
            "attention_bias": True,
            "num_hidden_layers": 1,
        },
        hub=True,
    ),
    "qwen2_moe": Tiny(
        Qwen2Moe,
        MANY
        | {
            "shared_expert_intermediate_size": 16,
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 2,
            "decoder_sparse_step": 2,
        },
    ),
    "qwen2_moe_hub": Tiny(
        Qwen2Moe,
        MANY
        | {
            "shared_expert_intermediate_size": 10,
            "num_hidden_layers": 2,
            "norm_topk_prob": True,
            "qkv_bias": False,
        },
        hub=True,
    ),
    "qwen3_moe": Tiny(
        Qwen3Moe,
        MANY
        | {"head_dim": 10, "norm_topk_prob": True, "num_hidden_layers": 3, "mlp_only_layers": [1]},
    ),
    "qwen3_moe_hub": Tiny(
        Qwen3Moe,
        MANY | {"head_dim": 10, "attention_bias": True, "tie_word_embeddings": True},
        hub=True,
    ),
}
