"""The tiny encoders of scripts/make_encoder_goldens.py."""

import dataclasses
from typing import Any

from transformers import BertConfig as Bert
from transformers import BigBirdConfig as BigBird
from transformers import LongformerConfig as Longformer
from transformers import ModernBertConfig as ModernBert

__all__ = ["ENCODERS", "Encoder"]


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A tiny encoder.

    Attributes:
      config: class of its config.
      model: name of its class.
      changes: its config.
      hub: rewrite config.json as files on the hub have it.
      types: token types that are used, 0 where the model takes none.
      marks: positions that are global, in the second row one less.
      length: of the first row, in tokens.
      shorter: tokens that the second row has less.
      train: run as in training, all dropouts 0.
    """

    config: Any
    model: str
    changes: dict[str, Any]
    hub: bool = False
    types: int = 2
    marks: tuple[int, ...] = ()
    length: int = 20
    shorter: int = 7
    train: bool = False


BASE = {
    "vocab_size": 67,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 48,
}
IDS = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
}
LOCAL, GLOBAL = "sliding_attention", "full_attention"
MODERN = BASE | IDS | {"num_hidden_layers": 5, "local_attention": 6}
LONG = BASE | {"max_position_embeddings": 50, "attention_window": 4, "pad_token_id": 1}
BIG = BASE | {
    "block_size": 2,
    "num_random_blocks": 1,
    "sep_token_id": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "max_position_embeddings": 64,
}

ENCODERS = {
    "bert": Encoder(Bert, "BertModel", BASE),
    "bert_hub": Encoder(
        Bert,
        "BertForPreTraining",
        BASE | {"hidden_act": "gelu_new", "type_vocab_size": 3, "layer_norm_eps": 1e-5},
        hub=True,
        types=3,
    ),
    "bert_untied": Encoder(
        Bert,
        "BertForMaskedLM",
        BASE | {"num_hidden_layers": 1, "tie_word_embeddings": False, "hidden_act": "relu"},
    ),
    "modernbert": Encoder(ModernBert, "ModernBertModel", MODERN, types=0),
    "modernbert_hub": Encoder(
        ModernBert,
        "ModernBertForMaskedLM",
        MODERN
        | {
            "local_attention": 8,
            "layer_types": [GLOBAL, LOCAL] * 2,
            "num_hidden_layers": 4,
            "rope_parameters": {
                LOCAL: {"rope_type": "default", "rope_theta": 30.0},
                GLOBAL: {"rope_type": "default", "rope_theta": 700.0},
            },
        },
        hub=True,
        types=0,
    ),
    "modernbert_bias": Encoder(
        ModernBert,
        "ModernBertForMaskedLM",
        MODERN
        | {
            "num_hidden_layers": 2,
            "layer_types": [LOCAL, GLOBAL],
            "attention_bias": True,
            "mlp_bias": True,
            "norm_bias": True,
            "classifier_bias": True,
            "classifier_activation": "relu",
            "hidden_activation": "silu",
            "tie_word_embeddings": False,
        },
        types=0,
    ),
    "longformer": Encoder(Longformer, "LongformerModel", LONG, marks=(0, 9)),
    "longformer_hub": Encoder(
        Longformer,
        "LongformerForMaskedLM",
        LONG | {"attention_window": [6, 4], "hidden_act": "gelu_new", "type_vocab_size": 1},
        hub=True,
        types=1,
        marks=(1,),
    ),
    "longformer_local": Encoder(
        Longformer, "LongformerModel", LONG | {"num_hidden_layers": 1, "pad_token_id": 0}
    ),
    "bigbird": Encoder(BigBird, "BigBirdModel", BIG, length=26, shorter=5, train=True),
    "bigbird_hub": Encoder(
        BigBird,
        "BigBirdForMaskedLM",
        BIG
        | {
            "block_size": 3,
            "num_random_blocks": 2,
            "num_attention_heads": 2,
            "rescale_embeddings": True,
            "use_bias": False,
            "num_hidden_layers": 3,
            "hidden_size": 16,
        },
        hub=True,
        length=37,
        shorter=4,
        train=True,
    ),
    "bigbird_short": Encoder(
        BigBird, "BigBirdForPreTraining", BIG | {"num_hidden_layers": 1}, length=14, train=True
    ),
    "bigbird_full": Encoder(
        BigBird,
        "BigBirdModel",
        BIG | {"num_hidden_layers": 1, "attention_type": "original_full", "hidden_act": "relu"},
    ),
}
