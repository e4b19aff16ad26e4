"""Tiny models with recurrences for make_goldens.py, and how older files say them."""

from typing import Any

from transformers import BambaConfig as Bamba
from transformers import FalconH1Config as FalconH1
from transformers import GraniteMoeHybridConfig as GraniteHybrid
from transformers import JambaConfig as Jamba
from transformers import Lfm2Config as Lfm2
from transformers import Mamba2Config as Mamba2
from transformers import MambaConfig as Mamba
from transformers import NemotronHConfig as NemotronH

__all__ = ["HYBRIDS", "hub_hybrid"]

SMALL = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "vocab_size": 67,
    "pad_token_id": None,
}
# Keys of the common base that a stack of one op does not have.
ALONE = SMALL | dict.fromkeys(
    (
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "rms_norm_eps",
    ),
    ...,
)
MIXER = {
    "mamba_n_heads": 6,
    "mamba_d_head": 8,
    "mamba_d_state": 5,
    "mamba_n_groups": 2,
    "mamba_expand": 2,
}
BAMBA = SMALL | MIXER | {"num_attention_heads": 3, "num_key_value_heads": 1}
LFM2 = SMALL | {"rms_norm_eps": ...}
NEMOTRON = (
    SMALL
    | dict.fromkeys(("rms_norm_eps", "num_hidden_layers"), ...)
    | {
        "layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention"],
        "mamba_num_heads": 6,
        "mamba_head_dim": 5,
        "n_groups": 3,
        "ssm_state_size": 7,
        "head_dim": 6,
    }
)
FALCON = SMALL | MIXER | {
    "num_hidden_layers": 2,
    "mamba_d_ssm": 30,
    "mamba_d_head": 5,
    "lm_head_multiplier": 0.7,
    "embedding_multiplier": 1.7,
    "mlp_multipliers": [0.6, 1.3],
    "key_multiplier": 1.6,
    "attention_out_multiplier": 0.8,
    "attention_in_multiplier": 1.4,
    "ssm_multipliers": [0.5, 1.5, 1.2, 0.9, 0.7],
    "ssm_in_multiplier": 1.3,
    "ssm_out_multiplier": 0.9,
}  # fmt: skip
FACTORS = {
    "embedding_multiplier": 3.5,
    "attention_multiplier": 0.21,
    "residual_multiplier": 0.22,
    "logits_scaling": 0.7,
}
GRANITE = SMALL | MIXER | FACTORS | {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "num_local_experts": 0,
    "shared_intermediate_size": 36,
}  # fmt: skip

EXPERTS = {
    "n_routed_experts": 6,
    "num_experts_per_tok": 3,
    "n_group": 3,
    "topk_group": 2,
    "moe_intermediate_size": 14,
    "moe_shared_expert_intermediate_size": 18,
    "routed_scaling_factor": 1.5,
}

# The reference clips step sizes in whole passes and not in decode steps.
UNCACHED = {"cache": False}

HYBRIDS: dict[str, dict[str, Any]] = {
    "mamba": {"config": Mamba, "changes": ALONE | {"state_size": 3}},
    "gguf_mamba": {
        "config": Mamba,
        "changes": ALONE | {"num_hidden_layers": 2, "state_size": 3},
        "gguf": "F32",
    },
    "mamba_hub": {
        "config": Mamba,
        "changes": ALONE
        | {
            "num_hidden_layers": 2,
            "state_size": 5,
            "time_step_rank": 3,
            "expand": 1,
            "conv_kernel": 3,
            "use_bias": True,
            "use_conv_bias": False,
            "hidden_act": "gelu",
            "tie_word_embeddings": False,
        },
        "hub": True,
    },
    "mamba2": {
        "config": Mamba2,
        "changes": ALONE | {"state_size": 5, "num_heads": 6, "head_dim": 8, "n_groups": 3},
    },
    "mamba2_hub": {
        "config": Mamba2,
        "changes": ALONE
        | {
            "num_hidden_layers": 2,
            "state_size": 7,
            "num_heads": 4,
            "head_dim": 6,
            "expand": 1,
            "n_groups": 1,
            "conv_kernel": 2,
            "use_bias": True,
            "use_conv_bias": False,
            "hidden_act": "gelu",
            "chunk_size": 8,
            "time_step_limit": [0.3, 1.5],
            "tie_word_embeddings": True,
        },
        "hub": True,
        **UNCACHED,
    },
    "jamba": {
        "config": Jamba,
        "changes": SMALL
        | {
            "num_experts": 1,
            "attn_layer_period": 3,
            "attn_layer_offset": 1,
            "mamba_d_state": 5,
            "hidden_act": "gelu",
        },
    },
    "jamba_hub": {
        "config": Jamba,
        "changes": SMALL
        | {
            "num_hidden_layers": 2,
            "num_experts": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 0,
            "mamba_d_state": 3,
            "mamba_dt_rank": 4,
            "mamba_conv_bias": False,
            "mamba_proj_bias": True,
            "mamba_d_conv": 3,
            "tie_word_embeddings": True,
        },
        "hub": True,
    },
    "bamba": {"config": Bamba, "changes": BAMBA | {"attn_layer_indices": [1]}},
    "bamba_hub": {
        "config": Bamba,
        "changes": BAMBA
        | {
            "attn_layer_indices": [0],
            "num_hidden_layers": 2,
            "num_key_value_heads": 3,
            "mamba_n_groups": 1,
            "mamba_proj_bias": True,
            "attention_bias": True,
            "mlp_bias": True,
            "hidden_act": "gelu",
            "rope_parameters": {"rope_type": "default", "rope_theta": 300.0},
        },
        "hub": True,
    },
    "nemotron_h": {
        "config": NemotronH,
        "changes": NEMOTRON | {"time_step_min": 0.2},
        **UNCACHED,
    },
    "nemotron_h_hub": {
        "config": NemotronH,
        "changes": NEMOTRON
        | {
            "layers_block_type": ["linear_attention", "linear_attention", "mlp", "full_attention"],
            "num_key_value_heads": 1,
            "use_bias": True,
            "mamba_proj_bias": True,
            "mlp_bias": True,
            "mlp_hidden_act": "silu",
        },
        "hub": True,
    },
    "falcon_h1": {"config": FalconH1, "changes": FALCON | {"mamba_rms_norm": True}},
    "falcon_h1_hub": {
        "config": FalconH1,
        "changes": FALCON
        | {
            "mamba_n_groups": 3,
            "mamba_proj_bias": True,
            "attention_bias": True,
            "mlp_bias": True,
            "projectors_bias": True,
            "tie_word_embeddings": True,
        },
        "hub": True,
    },
    "lfm2": {
        "config": Lfm2,
        "changes": LFM2
        | {"layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 8},
    },
    "lfm2_hub": {
        "config": Lfm2,
        "changes": LFM2
        | {
            "layer_types": ["conv", "conv", "full_attention"],
            "block_multiple_of": 5,
            "block_ffn_dim_multiplier": 1.3,
            "conv_L_cache": 4,
            "conv_bias": True,
            "tie_word_embeddings": False,
        },
        "hub": True,
    },
    "granite_hybrid": {"config": GraniteHybrid, "changes": GRANITE},
    "granite_hybrid_hub": {
        "config": GraniteHybrid,
        "changes": GRANITE
        | {
            "mamba_n_groups": 1,
            "mamba_proj_bias": True,
            "attention_bias": True,
            "position_embedding_type": "rope",
            "tie_word_embeddings": True,
        },
        "hub": True,
    },
}

# With experts: of a period of layers, of a letter's layers, and of all.
HYBRIDS |= {
    "jamba_moe": {
        "config": Jamba,
        "changes": SMALL
        | {
            "num_hidden_layers": 4,
            "intermediate_size": 20,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "attn_layer_period": 3,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 5,
        },
    },
    "jamba_moe_hub": {
        "config": Jamba,
        "changes": SMALL
        | {
            "num_hidden_layers": 2,
            "intermediate_size": 14,
            "num_experts": 4,
            "num_experts_per_tok": 3,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 1,
            "expert_layer_offset": 0,
            "mamba_d_state": 3,
            "hidden_act": "gelu",
        },
        "hub": True,
    },
    "nemotron_h_moe": {
        "config": NemotronH,
        "changes": NEMOTRON | EXPERTS
        | {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe", "mlp"]},
    },
    "nemotron_h_moe_hub": {
        "config": NemotronH,
        "changes": NEMOTRON | EXPERTS
        | {
            "layers_block_type": ["linear_attention", "full_attention", "moe"],
            "moe_latent_size": 10,
            "mlp_bias": True,
            "mlp_hidden_act": "silu",
            "norm_topk_prob": False,
            "n_group": 1,
            "topk_group": 1,
        },
        "hub": True,
    },
    "granite_hybrid_moe": {
        "config": GraniteHybrid,
        "changes": GRANITE | {"intermediate_size": 14, "num_local_experts": 5},
    },
    "granite_hybrid_moe_hub": {
        "config": GraniteHybrid,
        "changes": GRANITE
        | {
            "layer_types": ["full_attention", "linear_attention"],
            "num_hidden_layers": 2,
            "intermediate_size": 10,
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "position_embedding_type": "rope",
        },
        "hub": True,
    },
}  # fmt: skip

_LETTERS = {"linear_attention": "M", "full_attention": "*", "mlp": "-", "moe": "E"}


def _hub_kimi(out: dict[str, Any]) -> dict[str, Any]:
    """The keys of delta attention, in an object of their own; layers count from 1."""
    numbers = {"full_attention": [], "linear_attention": []}
    for number, kind in enumerate(out["layer_types"], 1):
        numbers[kind].append(number)
    linear = {
        "full_attn_layers": numbers["full_attention"],
        "kda_layers": numbers["linear_attention"],
        "num_heads": out.pop("linear_num_heads"),
        "head_dim": out.pop("linear_head_dim"),
        "short_conv_kernel_size": out.pop("linear_conv_kernel_dim"),
    }
    return {
        "linear_attn_config": linear,
        "first_k_dense_replace": out["mlp_layer_types"].index("sparse"),
        "mla_use_nope": True,
        "moe_layer_freq": 1,
        "moe_router_activation_func": "sigmoid",
        "rope_theta": 10000.0,
        "use_grouped_topk": True,
    }


def hub_hybrid(config: dict[str, Any]) -> dict[str, Any]:
    """A config of transformers 5 with its layers as files on the hub before it name them."""
    kind, out = config["model_type"], dict(config)
    if "time_step_limit" in out:
        low, high = out["time_step_limit"]
        out["time_step_limit"] = [low, high if isinstance(high, float) else float("inf")]
    if kind == "nemotron_h":
        kinds = out.pop("layers_block_type")
        out["hybrid_override_pattern"] = "".join(_LETTERS[kind] for kind in kinds)
        out["num_hidden_layers"] = len(kinds)
    if kind == "bamba":
        out["attn_rotary_emb"] = 3
        out["rope_parameters"] = dict(out["rope_parameters"])
        del out["rope_parameters"]["partial_rotary_factor"]
    if kind == "zamba2":
        kinds = out["layers_block_type"]
        out["layers_block_type"] = [k if k == "hybrid" else "mamba" for k in kinds]
        out |= {"time_step_limit": None, "use_shared_mlp_adapter": True}
    if kind == "kimi_linear":
        out |= _hub_kimi(out)
        del out["mlp_layer_types"]
    if kind == "lfm2":
        kinds = out.pop("layer_types")
        out["full_attn_idxs"] = [i for i, k in enumerate(kinds) if k == "full_attention"]
        out["block_ff_dim"] = out.pop("intermediate_size")
        out["tie_embedding"] = out.pop("tie_word_embeddings")
        out |= {"block_dim": out["hidden_size"], "num_heads": out["num_attention_heads"]}
        out |= {"block_norm_eps": out["norm_eps"], "use_pos_enc": True}
    if kind == "granitemoehybrid":
        names = {"linear_attention": "mamba", "full_attention": "attention"}
        # Kept from the pruning of newer keys by the older name of the same.
        out["layers_block_type"] = [names[k] for k in out.pop("layer_types")]
    if kind == "mamba":
        out |= {"d_inner": out["intermediate_size"], "d_model": out["hidden_size"]}
        out |= {"n_layer": out["num_hidden_layers"], "ssm_cfg": {}, "rms_norm": True}
    return out
