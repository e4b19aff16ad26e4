"""The tiny encoders of scripts/make_encoder_goldens.py."""

import dataclasses
from typing import Any

from transformers import BertConfig as Bert

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
}
