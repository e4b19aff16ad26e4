"""Ropes of the tiny models of make_goldens.py, and those of the tables of make_rope_goldens.py."""

from typing import Any

# Positions reach 40: past the original 16, so that all three bands of the scaling differ.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
# The base and the betas are such that the ramp lies within the 16 pairs of a head of 32.
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "beta_fast": 1.5,
    "beta_slow": 0.25,
    "original_max_position_embeddings": 16,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0 + 0.05 * i for i in range(8)],
    "long_factor": [1.0 + 0.5 * i for i in range(8)],
    "original_max_position_embeddings": 16,
}
WIDE = {"head_dim": 32, "intermediate_size": 40, "num_attention_heads": 2}

# name -> what differs from a plain tiny model; those that end in `_hub` are in the older dialect.
MODELS: dict[str, dict[str, Any]] = {
    "llama_yarn": WIDE | {"rope_parameters": YARN},
    "llama_yarn_hub": WIDE
    | {
        "rope_parameters": YARN | {"mscale": 1.2, "mscale_all_dim": 0.6, "truncate": False},
        "num_key_value_heads": 1,
    },
    "llama_dynamic": {"head_dim": 16, "rope_parameters": DYNAMIC, "max_position_embeddings": 16},
    # The first row's answer begins within the original 24 tokens and ends beyond.
    "llama_dynamic_hub": {
        "rope_parameters": DYNAMIC | {"factor": 2.0},
        "max_position_embeddings": 24,
    },
    "llama_longrope": {"head_dim": 16, "rope_parameters": LONGROPE | {"factor": 4.0}},
    # Logits of 28 tokens are short; the second row's answer passes the original 32.
    "llama_longrope_hub": {
        "head_dim": 16,
        "rope_parameters": LONGROPE | {"original_max_position_embeddings": 32},
    },
}

REAL_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 32768,
}
LONG48 = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.01 * i for i in range(48)],
    "long_factor": [1.0 + 1.3 * i for i in range(48)],
}
REAL_LLAMA3 = LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 8192}

# name -> config of a table: sizes as published, and the lengths at which it is taken.
TABLES: dict[str, dict[str, Any]] = {
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}},
    "dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0},
        "max_position_embeddings": 4096,
        "lengths": [1, 4096, 4097, 10_000, 131_072],
    },
    "dynamic_hub": {
        "rope_scaling": {"type": "dynamic", "factor": 3.5},
        "rope_theta": 5e5,
        "head_dim": 64,
        "max_position_embeddings": 2048,
        "lengths": [2048, 2049, 7000],
    },
    "yarn": {"rope_parameters": REAL_YARN, "max_position_embeddings": 131_072},
    "yarn_hub": {
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        "rope_theta": 1e6,
        "max_position_embeddings": 32768,
    },
    "yarn_untruncated": {  # as gpt-oss has it
        "rope_parameters": REAL_YARN
        | {"rope_theta": 150_000.0, "factor": 32.0, "truncate": False, "beta_fast": 32.0}
        | {"beta_slow": 1.0, "original_max_position_embeddings": 4096},
        "head_dim": 64,
        "max_position_embeddings": 131_072,
    },
    "yarn_mscales": {  # as DeepSeek has it
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 0.707,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
        },
        "head_dim": 64,
        "max_position_embeddings": 163_840,
    },
    "yarn_attention_factor": {
        "rope_parameters": REAL_YARN | {"attention_factor": 1.5, "beta_fast": 64, "beta_slow": 2.5},
        "max_position_embeddings": 131_072,
    },
    "yarn_ramp_past_the_pairs": {
        "rope_parameters": REAL_YARN
        | {"rope_theta": 100.0, "original_max_position_embeddings": 4096},
        "head_dim": 32,
        "max_position_embeddings": 16_384,
    },
    "yarn_ramp_past_the_dims": {
        "rope_parameters": REAL_YARN
        | {"rope_theta": 100.0, "original_max_position_embeddings": 256, "beta_slow": 0.001},
        "head_dim": 32,
        "max_position_embeddings": 1024,
    },
    "longrope": {
        "rope_parameters": LONG48 | {"original_max_position_embeddings": 4096, "factor": 32.0},
        "head_dim": 96,
        "max_position_embeddings": 131_072,
        "lengths": [1, 4096, 4097, 131_072],
    },
    "longrope_hub": {
        "rope_scaling": LONG48 | {"attention_factor": 1.3},
        "original_max_position_embeddings": 4096,
        "head_dim": 96,
        "max_position_embeddings": 131_072,
        "lengths": [4096, 4097],
    },
    "longrope_ratio": {
        "rope_scaling": LONG48,
        "original_max_position_embeddings": 8192,
        "head_dim": 96,
        "max_position_embeddings": 131_072,
        "lengths": [8192, 8193],
    },
    "llama3": {"rope_parameters": REAL_LLAMA3, "head_dim": 64, "max_position_embeddings": 131_072},
}
