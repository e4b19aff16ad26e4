"""Configs of published models, their keys as on the hub: all are read, and the parameters counted.

The counts are the published ones; a wrong width, tie, bias or norm would miss them.
"""

import pytest

from jaxllm.spec.cost import num_params
from jaxllm.zoo.families import FAMILIES
from jaxllm.zoo.table import ConfigReader

ROPE = {"rope_scaling": None, "torch_dtype": "bfloat16", "use_cache": True}
GEMMA = ROPE | {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "cache_implementation": "hybrid",
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "num_hidden_layers": 26,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
}
PUBLISHED = {
    "Qwen3-0.6B": (
        596_049_920,
        "G*28",
        ROPE
        | {
            "attention_bias": False,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "max_position_embeddings": 40960,
            "max_window_layers": 28,
            "model_type": "qwen3",
            "num_attention_heads": 16,
            "num_hidden_layers": 28,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1_000_000,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "vocab_size": 151_936,
        },
    ),
    "gemma-2-2b": (
        2_614_341_888,
        "(L G)*13",
        GEMMA
        | {
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "max_position_embeddings": 8192,
            "model_type": "gemma2",
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "vocab_size": 256_000,
        },
    ),
    "gemma-3-1b": (
        999_885_952,
        "(L*5 G)*4 L*2",
        GEMMA
        | {
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "max_position_embeddings": 32768,
            "model_type": "gemma3_text",
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "rope_local_base_freq": 10000,
            "rope_theta": 1_000_000,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
            "vocab_size": 262_144,
        },
    ),
    "SmolLM3-3B": (
        3_075_098_624,
        "(G*3 N)*9",
        ROPE
        | {
            "attention_bias": False,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "layer_types": ["full_attention"] * 36,
            "max_position_embeddings": 65536,
            "max_window_layers": 28,
            "mlp_bias": False,
            "model_type": "smollm3",
            "no_rope_layer_interval": 4,
            "no_rope_layers": [1, 1, 1, 0] * 9,
            "num_attention_heads": 16,
            "num_hidden_layers": 36,
            "num_key_value_heads": 4,
            "pretraining_tp": 2,
            "rms_norm_eps": 1e-6,
            "rope_theta": 5_000_000.0,
            "sliding_window": None,
            "use_sliding_window": False,
            "vocab_size": 128_256,
        },
    ),
    "Phi-3-mini-4k": (
        3_821_079_552,
        "G*32",
        ROPE
        | {
            "attention_bias": False,
            "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
            "embd_pdrop": 0.0,
            "hidden_act": "silu",
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "max_position_embeddings": 4096,
            "model_type": "phi3",
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 32,
            "original_max_position_embeddings": 4096,
            "resid_pdrop": 0.0,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "sliding_window": 2047,
            "tie_word_embeddings": False,
            "vocab_size": 32064,
        },
    ),
    "c4ai-command-r7b": (
        8_028_033_024,
        "(L*3 G)*8",
        ROPE
        | {
            "attention_bias": False,
            "cache_implementation": "hybrid",
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "layer_norm_eps": 1e-5,
            "layer_switch": 4,
            "logit_scale": 0.25,
            "max_position_embeddings": 8192,
            "model_type": "cohere2",
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "order_of_interleaved_layers": "local_attn_first",
            "position_embedding_type": "rope_gptj",
            "rope_theta": 50000,
            "rotary_pct": 1.0,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
            "use_embedding_sharing": True,
            "use_gated_activation": True,
            "use_parallel_block": True,
            "use_parallel_embedding": True,
            "vocab_size": 256_000,
        },
    ),
    "Kimi-Linear-48B-A3B": (
        49_122_681_728,
        "L (K*2 E K)*6 K E",
        ROPE
        | {
            "first_k_dense_replace": 1,
            "head_dim": 72,
            "hidden_act": "silu",
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "kv_lora_rank": 512,
            "linear_attn_config": {
                "full_attn_layers": [4, 8, 12, 16, 20, 24, 27],
                "head_dim": 128,
                "kda_layers": [i for i in range(1, 27) if i % 4],
                "num_heads": 32,
                "short_conv_kernel_size": 4,
            },
            "mla_use_nope": True,
            "model_max_length": 1_048_576,
            "model_type": "kimi_linear",
            "moe_intermediate_size": 1024,
            "moe_layer_freq": 1,
            "moe_renormalize": True,
            "moe_router_activation_func": "sigmoid",
            "num_attention_heads": 32,
            "num_expert_group": 1,
            "num_experts": 256,
            "num_experts_per_token": 8,
            "num_hidden_layers": 27,
            "num_key_value_heads": 32,
            "num_nextn_predict_layers": 0,
            "num_shared_experts": 1,
            "q_lora_rank": None,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "routed_scaling_factor": 2.446,
            "tie_word_embeddings": False,
            "topk_group": 1,
            "use_grouped_topk": True,
            "v_head_dim": 128,
            "vocab_size": 163_840,
        },
    ),
    "Zamba2-1.2B": (
        1_215_064_704,
        "(M*5 H0)*6 M*2",
        {
            "adapter_rank": 128,
            "add_bias_linear": False,
            "attention_head_dim": 128,
            "attention_hidden_size": 4096,
            "chunk_size": 256,
            "hidden_act": "gelu",
            "hidden_size": 2048,
            "hybrid_layer_ids": [5, 11, 17, 23, 29, 35],
            "intermediate_size": 8192,
            "kv_channels": 64,
            "layers_block_type": (["mamba"] * 5 + ["hybrid"]) * 6 + ["mamba"] * 2,
            "mamba_d_conv": 4,
            "mamba_d_state": 128,
            "mamba_expand": 2,
            "mamba_headdim": 64,
            "mamba_ngroups": 1,
            "max_position_embeddings": 4096,
            "model_type": "zamba2",
            "n_mamba_heads": 64,
            "num_attention_heads": 32,
            "num_hidden_layers": 38,
            "num_key_value_heads": 32,
            "num_logits_to_keep": 1,
            "num_mem_blocks": 1,
            "num_query_groups": 32,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000,
            "time_step_floor": 1e-4,
            "time_step_limit": None,
            "time_step_max": 0.1,
            "time_step_min": 0.001,
            "use_conv_bias": True,
            "use_long_context": False,
            "use_mamba_kernels": True,
            "use_mem_eff_path": False,
            "use_mem_rope": True,
            "use_shared_attention_adapter": True,
            "use_shared_mlp_adapter": True,
            "vocab_size": 32000,
        },
    ),
    "gpt2": (
        124_439_808,
        "G*12",
        {
            "activation_function": "gelu_new",
            "attn_pdrop": 0.1,
            "embd_pdrop": 0.1,
            "layer_norm_epsilon": 1e-5,
            "model_type": "gpt2",
            "n_ctx": 1024,
            "n_embd": 768,
            "n_head": 12,
            "n_layer": 12,
            "n_positions": 1024,
            "resid_pdrop": 0.1,
            "summary_activation": None,
            "summary_first_dropout": 0.1,
            "summary_proj_to_labels": True,
            "summary_type": "cls_index",
            "summary_use_proj": True,
            "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
            "vocab_size": 50257,
        },
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read_and_said_again(name):
    count, layers, config = PUBLISHED[name]
    family = next(f for f in FAMILIES.values() if config["model_type"] in f.model_types)
    spec = family.read(ConfigReader(config, name))
    assert num_params(spec) == count
    assert spec.layers == layers
    assert family.read(ConfigReader(family.write(spec) or {}, name)) == spec


def test_the_text_part_of_a_model_that_sees_is_counted():
    """Of the 4,300,079,472 published for gemma-3-4b, tower and projector take the rest."""
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    config = {
        "boi_token_index": 255_999,
        "eoi_token_index": 256_000,
        "image_token_index": 262_144,
        "mm_tokens_per_image": 256,
        "model_type": "gemma3",
        "text_config": text,
        "torch_dtype": "bfloat16",
        "vision_config": {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27},
    }
    spec = FAMILIES["gemma3_vision"].read(ConfigReader(config, "gemma-3-4b"))
    width, ffn, patch, places = 1152, 4304, 14 * 14 * 3, 4096
    layer = 4 * (width**2 + width) + 2 * width * ffn + ffn + width + 4 * width
    tower = 27 * layer + patch * width + width + places * width + 2 * width
    assert num_params(spec) + tower + width * 2560 + width == 4_300_079_472
    assert spec.layers == "(L*5 G)*5 L*4"


SHORT = {
    "ERNIE-4.5-0.3B": (360_748_032, "ernie4_5", (103_424, 1024, 3072, 18), (16, 2, 128)),
    "Seed-OSS-36B": (36_151_104_512, "seed_oss", (155_136, 5120, 27_648, 64), (80, 8, 128)),
    "GLM-4-9B-0414": (9_400_279_040, "glm4", (151_552, 4096, 13_696, 40), (32, 2, 128)),
    "EXAONE-4.0-1.2B": (1_279_391_488, "exaone4", (102_400, 2048, 4096, 30), (32, 8, 64)),
    "dots.llm1": (142_774_381_696, "dots1", (152_064, 4096, 10_944, 62), (32, 32, 128)),
}


MORE = {
    "exaone4": {"sliding_window": None, "tie_word_embeddings": True},
    "dots1": {"moe_intermediate_size": 1408, "n_routed_experts": 128, "n_shared_experts": 2}
    | {"num_experts_per_tok": 6, "first_k_dense_replace": 1},
}


@pytest.mark.parametrize("name", SHORT)
def test_parameters_of_families_of_one_kind_of_layer(name):
    count, kind, (vocab, width, ffn, layers), (heads, kv_heads, head_dim) = SHORT[name]
    config = {
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "model_type": kind,
    }
    config |= MORE.get(kind, {})
    spec = FAMILIES[kind].read(ConfigReader(config, name))
    assert num_params(spec) == count
    assert spec.layers == (f"G*{layers}" if kind != "dots1" else f"G E*{layers - 1}")
