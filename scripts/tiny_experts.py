"""The tiny models with experts of scripts/make_goldens.py."""

from tiny_models import SMALL, Tiny
from transformers import MixtralConfig as Mixtral
from transformers import OlmoeConfig as Olmoe
from transformers import Qwen2MoeConfig as Qwen2Moe
from transformers import Qwen3MoeConfig as Qwen3Moe

__all__ = ["EXPERTS"]

MOE = SMALL | {"intermediate_size": 20, "num_experts_per_tok": 2}
MANY = MOE | {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 12}

EXPERTS = {
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
