"""The draft model that a command line gives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jaxllm.cli.options import Draft
from jaxllm.core.config import require

if TYPE_CHECKING:
    from jaxllm.model import Model

__all__ = ["check_draft_options", "draft_of"]


def check_draft_options(options: Draft) -> None:
    """Refuse options that say nothing, before anything is loaded.

    Raises:
      ConfigError: a format without a draft, or a number of tokens that is none.
    """
    require(
        options.draft is not None or options.draft_format is None,
        "--draft-format: give --draft too",
    )
    require(
        0 <= options.draft_tokens <= 31, f"--draft-tokens is 0 to 31, found {options.draft_tokens}"
    )


def draft_of(options: Draft, model: Model, source: str, **how: Any) -> Model | None:
    """The draft model that a command line gives; the source itself is loaded once.

    Args:
      options: of the command.
      model: that it guesses for.
      source: of the model.
      **how: to load another, see `load`.
    """
    check_draft_options(options)
    if options.draft is None:
        return None
    from jaxllm.model import load

    draft = model if options.draft == source else load(options.draft, **how)
    return draft if options.draft_format is None else draft.quantize(options.draft_format)
