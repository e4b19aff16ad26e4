"""Tiny models of dense families that stand in one row each, and of EXAONE 4."""

from tiny_models import SMALL, Tiny
from transformers import ArceeConfig as Arcee
from transformers import Ernie4_5Config as Ernie
from transformers import Exaone4Config as Exaone
from transformers import Glm4Config as Glm4
from transformers import HeliumConfig as Helium
from transformers import NemotronConfig as Nemotron
from transformers import SeedOssConfig as SeedOss

__all__ = ["ROWS"]

EXAONE = SMALL | {
    "num_hidden_layers": 4,
    "layer_types": [f"{kind}_attention" for kind in ("sliding", "sliding", "full", "sliding")],
    "head_dim": 10,
    "sliding_window": 6,
}

ROWS = {
    "seed_oss": Tiny(SeedOss, SMALL | {"head_dim": 10}),
    "seed_oss_hub": Tiny(
        SeedOss,
        SMALL
        | {"head_dim": 8, "attention_bias": False, "attention_out_bias": True, "mlp_bias": True},
        hub=True,
    ),
    "ernie4_5": Tiny(Ernie, SMALL | {"head_dim": 10, "use_bias": True}),
    "ernie4_5_hub": Tiny(Ernie, SMALL | {"head_dim": 8, "tie_word_embeddings": False}, hub=True),
    "arcee": Tiny(Arcee, SMALL),
    "arcee_hub": Tiny(
        Arcee,
        SMALL
        | {
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "hidden_act": "gelu",
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
        hub=True,
    ),
    "helium": Tiny(Helium, SMALL | {"head_dim": 6}),
    "glm4": Tiny(Glm4, SMALL | {"head_dim": 12}),
    "glm4_hub": Tiny(
        Glm4,
        SMALL
        | {
            "head_dim": 10,
            "attention_bias": False,
            "num_key_value_heads": 1,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 300.0,
                "partial_rotary_factor": 0.4,
            },
        },
        hub=True,
    ),
    "nemotron": Tiny(Nemotron, SMALL | {"rms_norm_eps": ..., "head_dim": 8}),
    "nemotron_hub": Tiny(
        Nemotron,
        SMALL
        | {
            "rms_norm_eps": ...,
            "norm_eps": 1e-3,
            "attention_bias": True,
            "mlp_bias": True,
            "head_dim": 12,
            "hidden_act": "silu",
        },
        hub=True,
    ),
    "exaone4": Tiny(Exaone, EXAONE),
    "exaone4_hub": Tiny(
        Exaone,
        EXAONE
        | {
            "num_hidden_layers": 2,
            "layer_types": ["full_attention"] * 2,
            "sliding_window": None,
            "tie_word_embeddings": True,
        },
        hub=True,
    ),
}
