"""From a prompt to ids, and from new ids to an answer's text: what a model and a bundle share."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator as Pieces
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np

from jaxllm.core.config import nearest, require
from jaxllm.errors import ConfigError, ShapeError
from jaxllm.infer.sampling import Sampling
from jaxllm.infer.timings import Timings
from jaxllm.text.answer import Answer
from jaxllm.text.tokenizer import Tokenizer

__all__ = ["Generation", "Prompt", "prompt_ids", "reply", "sampling_of", "whole"]

Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int] | np.ndarray
"""A string, a list of messages, or a list of token ids."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """What a request gave.

    Attributes:
      text: the answer, without special tokens and without what a stop string cut off.
      token_ids: all tokens generated, the end token included.
      prompt_token_ids: what the model was given.
      finish_reason: `stop` (end token or stop string) or `length`.
      timings: where the time went.
    """

    text: str
    token_ids: list[int]
    prompt_token_ids: list[int]
    finish_reason: str
    timings: Timings

    @property
    def usage(self) -> dict[str, int]:
        """Token counts, as OpenAI's API names them."""
        prompt, new = len(self.prompt_token_ids), len(self.token_ids)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def prompt_ids(
    prompt: Prompt, tokenizer: Tokenizer | None, vocab: int, *, raw: bool = False
) -> list[int]:
    """Token ids of a prompt; see `Model.prompt_ids`.

    Args:
      prompt: text, messages or ids.
      tokenizer: or None, which takes ids alone.
      vocab: ids are below it.
      raw: a string is plain text in any case.

    Raises:
      ConfigError: text without a tokenizer, messages without a template, nothing at all.
      ShapeError: ids outside of the vocabulary.
    """
    if not isinstance(prompt, str) and all(isinstance(i, (int, np.integer)) for i in prompt):
        ids = [int(i) for i in cast("Sequence[int]", prompt)]
        if ids and not 0 <= min(ids) <= max(ids) < vocab:
            raise ShapeError(f"token ids are in 0..{vocab - 1}, found {min(ids)}..{max(ids)}")
    elif tokenizer is None:
        raise ConfigError("this model has no tokenizer: give token ids")
    elif isinstance(prompt, str):
        require(bool(prompt), "the prompt is empty; give at least one character")
        if raw or tokenizer.chat_template is None:
            ids = tokenizer.encode(prompt)
        else:
            ids = tokenizer.apply_chat([{"role": "user", "content": prompt}])
    else:
        ids = tokenizer.apply_chat(cast("Sequence[Mapping[str, Any]]", prompt))
    require(bool(ids), "the prompt is empty; give at least one token")
    return ids


def reply(
    ids: list[int], chunks: Iterable[Sequence[int]], answer: Answer, timings: Timings
) -> Pieces[str, None, Generation]:
    """Yield the text of new tokens as it is certain; the return value is the `Generation`.

    Args:
      ids: of the prompt.
      chunks: lists of new ids; no more are taken than the answer has.
      answer: fresh; says where it ends.
      timings: filled in by whoever makes the chunks.
    """
    for chunk in chunks:
        piece = answer.push(chunk)
        if piece:
            yield piece
        if answer.finished:
            break
    tail = answer.flush()
    if tail:
        yield tail
    return Generation(
        text=answer.text,
        token_ids=answer.token_ids,
        prompt_token_ids=ids,
        finish_reason="stop" if answer.finished else "length",
        timings=timings,
    )


def whole(pieces: Pieces[str, None, Generation]) -> Generation:
    """Run a `reply` to its end."""
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return end.value


def sampling_of(options: dict[str, Any], *others: str) -> Sampling:
    """Sampling options, checked; `others` are the names that the caller takes besides.

    Raises:
      ConfigError: an unknown option, or one out of its range.
    """
    known = {f.name for f in dataclasses.fields(Sampling)}
    for name in options:
        hint = nearest(name, known | set(others))
        require(name in known, f"unknown option {name!r}; {hint}")
    return Sampling(**options)
