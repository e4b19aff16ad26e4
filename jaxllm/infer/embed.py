"""Vectors of texts: rows sorted by length into a few compiled shapes, then put back in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from jaxllm.core.config import nearest, require
from jaxllm.core.logging import note_once
from jaxllm.errors import ConfigError, ShapeError
from jaxllm.infer import programs
from jaxllm.infer.generate import Generator
from jaxllm.infer.programs import bucket, row_length
from jaxllm.spec.model import ModelSpec, Pooling
from jaxllm.text.tokenizer import Tokenizer

__all__ = ["Text", "embed", "pooling_of", "token_rows"]

Text = str | Sequence[int]
"""A text, or its token ids."""

TOKENS_PER_CALL = 4096
"""Tokens of one program call, padding included, where one row is not longer."""
KINDS = ("mean", "cls", "last")


def pooling_of(spec: ModelSpec, given: Pooling | str | None) -> Pooling:
    """How to pool: as given, else as the model says, else an encoder's mean.

    Raises:
      ConfigError: no such kind; or a decoder says nothing, and nothing is given.
    """
    if isinstance(given, str):
        require(given in KINDS, f"pooling {given!r} is unknown; {nearest(given, KINDS)}")
        return Pooling(by=given)  # pyright: ignore[reportArgumentType]
    if given is not None or spec.head.pooling is not None:
        return given or spec.head.pooling or Pooling()
    if spec.decodes:
        raise ConfigError(
            "this decoder does not say how its hidden states become a vector: give pooling='mean', "
            "'cls' or 'last'"
        )
    note_once("embed: the model says no pooling; the mean over a text's tokens is taken")
    return Pooling()


def token_rows(
    texts: Sequence[Text], tokenizer: Tokenizer | None, spec: ModelSpec, pooling: Pooling
) -> list[list[int]]:
    """Token ids of each text, special tokens included, cut to what the pooling allows.

    Raises:
      ConfigError: texts without a tokenizer; ShapeError: ids that are none, outside of the
        vocabulary, or more than the model holds.
    """
    most = min(pooling.max_tokens or spec.context, spec.context)
    rows = []
    for text in texts:
        if isinstance(text, str):
            require(tokenizer is not None, "this model has no tokenizer: give token ids")
            assert tokenizer is not None
            rows.append(tokenizer.encode_cut(text, most))
            continue
        ids = np.asarray(text)
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer) or not len(ids):
            raise ShapeError(f"a text is a string or a list of token ids, found {text!r:.80}")
        if not 0 <= ids.min() <= ids.max() < spec.vocab:
            raise ShapeError(
                f"token ids are in 0..{spec.vocab - 1}, found {ids.min()}..{ids.max()}"
            )
        if len(ids) > most:
            raise ShapeError(f"{len(ids)} tokens exceed the {most} of this model's texts")
        rows.append(ids.tolist())
    require(all(rows), "a text is empty, and the tokenizer adds nothing to it")
    return rows


def _batches(spec: ModelSpec, rows: list[list[int]]) -> Iterator[tuple[list[int], int]]:
    """(numbers of rows, padded length), rows of one length together, longest last."""
    held: list[int] = []
    size = 0
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        wanted = row_length(spec, len(rows[i]))
        if held and (wanted != size or len(held) == max(1, TOKENS_PER_CALL // size)):
            yield held, size
            held = []
        held.append(i)
        size = wanted
    if held:
        yield held, size


def embed(generator: Generator, rows: list[list[int]], pooling: Pooling) -> np.ndarray:
    """One vector a row.

    Args:
      generator: runs the model's programs.
      rows: token ids, none empty.
      pooling: from hidden states to a vector.

    Returns:
      float32 [B, D].
    """
    setup = generator.setup
    out = np.zeros((len(rows), setup.spec.width), np.float32)
    for numbers, length in _batches(setup.spec, rows):
        batch = bucket(len(numbers), 1)
        ids, lengths = np.zeros((batch, length), np.int32), np.ones((batch,), np.int32)
        for place, i in enumerate(numbers):
            ids[place, : len(rows[i])] = rows[i]
            lengths[place] = len(rows[i])
        program = programs.embed(setup, batch=batch, length=length, pooling=pooling)
        found = generator.executable(program)(generator.params, ids, lengths)
        out[numbers] = np.asarray(found)[: len(numbers)]
    return out
