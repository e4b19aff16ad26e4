"""Files of models that see: the text part alone is read, from `text_config` inside of the config.

The tensors of the vision tower and of the projector are left out by their names. Saved is the text
part, as the family of text models has it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxllm.spec.model import ModelSpec
from jaxllm.zoo import decoder
from jaxllm.zoo.table import ConfigReader, Family

__all__ = ["text_part"]

PREFIX = "language_model."
"""Of the text part's tensors."""

_IGNORED = (
    "boi_token_index",
    "eoi_token_index",
    "image_token_index",
    "mm_tokens_per_image",
    "vision_config",
)
"""Keys of pictures."""


def text_part(
    family: Family, kind: str, *, vision: str, defaults: Mapping[str, Any] | None = None
) -> Family:
    """The family whose files hold one of `family` beside a vision tower.

    Args:
      family: of the text part.
      kind: `model_type` of the whole.
      vision: name of the tower's module.
      defaults: what `text_config` means by an absent key, where it is not what `family` means.
    """

    def read(config: ConfigReader) -> ModelSpec:
        text = config.take("text_config", dict)
        config.ignore(*decoder.IGNORED_KEYS, *_IGNORED)
        named = text.get("model_type", family.model_types[0])
        if named not in family.model_types:
            config.problem(f"text_config.model_type is {named!r}, not {family.model_types[0]!r}")
        tied, own = config.take("tie_word_embeddings", bool, None), text.get("tie_word_embeddings")
        if None not in (tied, own) and tied != own:
            config.problem(f"tie_word_embeddings is {tied}, and {own} in text_config")
        words = {**(defaults or {}), **text}
        if own is None and tied is not None:
            words["tie_word_embeddings"] = tied
        return family.read(config.translated(words, "text_config"))

    return dataclasses.replace(
        family,
        model_types=(kind,),
        architectures=(),
        read=read,
        write=lambda _: None,
        ignored=(*family.ignored, f"{vision}.*", "multi_modal_projector.*"),
        prefix=PREFIX,
    )
