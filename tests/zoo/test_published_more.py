"""More configs of published models, as on the hub: experts, recurrences, parallel blocks.

The counts are those of all values in the published safetensors (of gpt-oss-20b before its experts
were rounded to four bits; of DeepSeek-V3 without the layer that predicts a second token).
"""

import pytest

from jaxllm.spec.cost import num_active_params, num_params
from jaxllm.zoo.families import FAMILIES
from jaxllm.zoo.table import ConfigReader

# fmt: off
MOE_BASE = {"torch_dtype": "bfloat16", "use_cache": True, "hidden_act": "silu"}
PYTHIA = {
    "hidden_act": "gelu", "layer_norm_eps": 1e-5, "max_position_embeddings": 2048,
    "model_type": "gpt_neox", "rotary_emb_base": 10000, "rotary_pct": 0.25,
    "tie_word_embeddings": False, "use_parallel_residual": True, "vocab_size": 50304,
}
PUBLISHED = {
    "Mixtral-8x7B": (46_702_792_704, "E*32", MOE_BASE | {
        "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768,
        "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "output_router_logits": False, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
        "router_aux_loss_coef": 0.02, "sliding_window": None, "tie_word_embeddings": False,
        "vocab_size": 32000}),
    "Qwen3-30B-A3B": (30_532_122_624, "E*48", MOE_BASE | {
        "attention_bias": False, "decoder_sparse_step": 1, "head_dim": 128, "hidden_size": 2048,
        "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48,
        "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768,
        "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 1e6, "sliding_window": None,
        "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936}),
    "DeepSeek-V3": (671_026_419_200, "D*3 E*58", {
        "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432,
        "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128,
        "num_key_value_heads": 128, "n_shared_experts": 1, "n_routed_experts": 256,
        "routed_scaling_factor": 2.5, "kv_lora_rank": 512, "q_lora_rank": 1536,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128, "n_group": 8,
        "topk_group": 4, "num_experts_per_tok": 8, "first_k_dense_replace": 3,
        "norm_topk_prob": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
        "num_nextn_predict_layers": 1, "hidden_act": "silu", "max_position_embeddings": 163840,
        "rms_norm_eps": 1e-6, "rope_theta": 10000, "vocab_size": 129280,
        "tie_word_embeddings": False, "attention_bias": False, "moe_layer_freq": 1, "ep_size": 1,
        "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0,
                         "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096,
                         "type": "yarn"}}),
    "DeepSeek-V2-Lite": (15_706_484_224, "D E*26", {
        "model_type": "deepseek_v2", "hidden_size": 2048, "intermediate_size": 10944,
        "moe_intermediate_size": 1408, "num_hidden_layers": 27, "num_attention_heads": 16,
        "num_key_value_heads": 16, "n_shared_experts": 2, "n_routed_experts": 64,
        "routed_scaling_factor": 1.0, "kv_lora_rank": 512, "q_lora_rank": None,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128, "n_group": 1,
        "topk_group": 1, "num_experts_per_tok": 6, "first_k_dense_replace": 1,
        "norm_topk_prob": False, "scoring_func": "softmax", "topk_method": "greedy",
        "aux_loss_alpha": 0.001, "seq_aux": True, "hidden_act": "silu",
        "max_position_embeddings": 163840, "rms_norm_eps": 1e-6, "rope_theta": 10000,
        "vocab_size": 102400, "tie_word_embeddings": False, "attention_bias": False,
        "moe_layer_freq": 1,
        "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707,
                         "mscale_all_dim": 0.707, "original_max_position_embeddings": 4096,
                         "type": "yarn"}}),
    "OLMoE-1B-7B": (6_919_161_856, "E*16", MOE_BASE | {
        "attention_bias": False, "clip_qkv": None, "hidden_size": 2048, "intermediate_size": 1024,
        "max_position_embeddings": 4096, "model_type": "olmoe", "norm_topk_prob": False,
        "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8,
        "num_hidden_layers": 16, "num_key_value_heads": 16, "rms_norm_eps": 1e-5,
        "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False,
        "vocab_size": 50304}),
    "phi-2": (2_779_683_840, "P*32", {
        "model_type": "phi", "hidden_size": 2560, "intermediate_size": 10240,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "hidden_act": "gelu_new", "max_position_embeddings": 2048, "layer_norm_eps": 1e-5,
        "partial_rotary_factor": 0.4, "qk_layernorm": False, "rope_scaling": None,
        "rope_theta": 10000.0, "tie_word_embeddings": False, "vocab_size": 51200,
        "embd_pdrop": 0.0, "resid_pdrop": 0.1}),
    "pythia-160m": (162_322_944, "G*12", PYTHIA | {
        "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
        "num_hidden_layers": 12}),
    "pythia-1.4b": (1_414_647_808, "G*24", PYTHIA | {
        "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16,
        "num_hidden_layers": 24}),
    "gemma-2b": (2_506_172_416, "G*18", {
        "attention_bias": False, "head_dim": 256, "hidden_act": "gelu",
        "hidden_activation": None, "hidden_size": 2048, "intermediate_size": 16384,
        "max_position_embeddings": 8192, "model_type": "gemma", "num_attention_heads": 8,
        "num_hidden_layers": 18, "num_key_value_heads": 1, "rms_norm_eps": 1e-6,
        "rope_scaling": None, "rope_theta": 10000.0, "vocab_size": 256_000}),
    "gpt-oss-20b": (20_914_757_184, "(L G)*12", {
        "attention_bias": True, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880,
        "intermediate_size": 2880, "max_position_embeddings": 131072, "model_type": "gpt_oss",
        "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24,
        "num_key_value_heads": 8, "num_local_experts": 32, "rms_norm_eps": 1e-5,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "rope_theta": 150000, "sliding_window": 128, "swiglu_limit": 7.0,
        "tie_word_embeddings": False, "vocab_size": 201088,
        "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0,
          "original_max_position_embeddings": 4096, "rope_type": "yarn", "truncate": False}}),
    "mamba-130m": (129_135_360, "M*24", {
        "model_type": "mamba", "hidden_size": 768, "intermediate_size": 1536, "expand": 2,
        "num_hidden_layers": 24, "state_size": 16, "time_step_rank": 48, "conv_kernel": 4,
        "use_bias": False, "use_conv_bias": True, "hidden_act": "silu", "vocab_size": 50280,
        "layer_norm_epsilon": 1e-5}),
    "Jamba-v0.1": (51_570_323_328, "(M N M N A N M N)*4", {
        "model_type": "jamba", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "attn_layer_offset": 4, "attn_layer_period": 8, "expert_layer_offset": 1,
        "expert_layer_period": 2, "num_experts": 16, "num_experts_per_tok": 2,
        "mamba_conv_bias": True, "mamba_d_conv": 4, "mamba_d_state": 16, "mamba_dt_rank": 256,
        "mamba_expand": 2, "mamba_proj_bias": False, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "max_position_embeddings": 262144, "tie_word_embeddings": False, "vocab_size": 65536,
        "use_mamba_kernels": True, "calc_logits_for_entire_prompt": False,
        "output_router_logits": False, "router_aux_loss_coef": 0.001}),
    "Qwen1.5-MoE-A2.7B": (14_315_784_192, "E*24", MOE_BASE | {
        "decoder_sparse_step": 1, "hidden_size": 2048, "intermediate_size": 5632,
        "max_position_embeddings": 8192, "max_window_layers": 21, "model_type": "qwen2_moe",
        "moe_intermediate_size": 1408, "norm_topk_prob": False, "num_attention_heads": 16,
        "num_experts": 60, "num_experts_per_tok": 4, "num_hidden_layers": 24,
        "num_key_value_heads": 16, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "shared_expert_intermediate_size": 5632, "sliding_window": 32768,
        "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936}),
    "granite-3.0-1b-a400m": (1_334_628_352, "E*24", MOE_BASE | {
        "attention_bias": False, "attention_multiplier": 0.015625, "embedding_multiplier": 12.0,
        "hidden_size": 1024, "intermediate_size": 512, "logits_scaling": 6.0,
        "max_position_embeddings": 4096, "model_type": "granitemoe", "num_attention_heads": 16,
        "num_experts_per_tok": 8, "num_hidden_layers": 24, "num_key_value_heads": 8,
        "num_local_experts": 32, "residual_multiplier": 0.22, "rms_norm_eps": 1e-6,
        "rope_scaling": None, "rope_theta": 10000, "tie_word_embeddings": True,
        "vocab_size": 49155}),
}
# fmt: on


def read(name):
    config = PUBLISHED[name][-1]
    family = next(f for f in FAMILIES.values() if config["model_type"] in f.model_types)
    return family, family.read(ConfigReader(config, name))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read_and_said_again(name):
    count, layers, _ = PUBLISHED[name]
    family, spec = read(name)
    assert num_params(spec) == count
    assert spec.layers == layers
    assert family.read(ConfigReader(family.write(spec) or {}, name)) == spec


ACTIVE = {"Mixtral-8x7B": 12.9, "Jamba-v0.1": 12, "OLMoE-1B-7B": 1.3}
"""Billions of parameters that a token uses, as the models' own papers and pages say."""
WITHOUT_EMBEDDING = {"gpt-oss-20b": 3.6, "DeepSeek-V3": 37}
"""Likewise, of those that do not count the embedding."""


@pytest.mark.parametrize("name", ACTIVE | WITHOUT_EMBEDDING)
def test_published_numbers_of_active_parameters(name):
    _, spec = read(name)
    found = num_active_params(spec)
    if name in WITHOUT_EMBEDDING:
        found -= spec.vocab * spec.width
    wanted = (ACTIVE | WITHOUT_EMBEDDING)[name]
    assert round(found / 1e9, 1 if isinstance(wanted, float) else 0) == wanted
