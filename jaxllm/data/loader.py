"""Opening data: source, tokenizer, shards, rows; and the stream of batches that a run reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from pathlib import Path
from typing import Literal

from jaxllm.core.config import require
from jaxllm.data.batch import Batch
from jaxllm.data.download import local_path
from jaxllm.data.packing import packed
from jaxllm.data.rows import Packed, Rows, Windows, import_grain
from jaxllm.data.shards import Shards
from jaxllm.data.sources import find_source
from jaxllm.data.tokenise import split_place, tokenised
from jaxllm.text.tokenizer import Tokenizer

__all__ = ["Data", "DataOptions", "open_data"]

# Batches that wait for the device. One thread makes them in order: cutting rows is cheap.
_AHEAD = 4
_STEPS = 2**40


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What a run reads and how.

    Attributes:
      path: file, folder or `data:NAME`.
      tokenizer: `characters`, `bytes`, `bpe:VOCAB`, `none` or a model's path or name.
      text_field: of JSON lines and Parquet.
      end_token: id that ends the documents of token arrays.
      rows: `windows` or `packed`.
      length: T of a row.
      validation_fraction: share of the stream at its end.
      vocabulary: of the model.
    """

    path: str
    tokenizer: str = "characters"
    text_field: str = "text"
    end_token: int | None = None
    rows: Literal["windows", "packed"] = "windows"
    length: int
    validation_fraction: float
    vocabulary: int


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Data:
    """Tokenised data in two parts.

    Attributes:
      tokenizer: what made the tokens; None for token arrays that name none.
      train: rows of the training part.
      validation: rows of the validation part.
    """

    tokenizer: Tokenizer | None
    train: Rows
    validation: Rows

    def batch(self, step: int, *, rows: int, seed: int, part: slice | None = None) -> Batch:
        """Training rows of a step, a function of (seed, step).

        Args:
          step: from 0.
          rows: of the whole step, over all processes.
          seed: of the run.
          part: which of the rows this process wants; all by default.
        """
        return self.train.drawn(step, rows=rows, seed=seed, part=part or slice(None))

    def stream(
        self, start: int, *, rows: int, seed: int, part: slice | None = None
    ) -> Generator[Batch, None, None]:
        """The batches of step `start` and after, made ahead in a thread; close it when done."""
        grain = import_grain()
        steps = grain.MapDataset.range(start, _STEPS)
        batches = steps.map(lambda step: self.batch(int(step), rows=rows, seed=seed, part=part))
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_AHEAD)
        iterator = iter(batches.to_iter_dataset(options))
        try:
            yield from iterator
        finally:
            iterator.close()

    def validation_batches(
        self, *, rows: int, count: int, part: slice | None = None
    ) -> list[Batch]:
        """At most `count` batches of consecutive rows of the validation part.

        Raises:
          ConfigError: there is not one batch.
        """
        whole = min(count, self.validation.count // rows)
        require(
            whole > 0,
            f"the validation part is too short: it has {self.validation.count} rows, a batch takes "
            f"{rows}; give more data, a larger validation_fraction or a smaller batch",
        )
        begin, stop, _ = (part or slice(None)).indices(rows)
        return [
            self.validation.consecutive(i * rows + begin, i * rows + stop) for i in range(whole)
        ]


def open_data(options: DataOptions) -> Data:
    """Find, tokenise (once) and split data.

    Raises:
      ConfigError: missing, broken or too little data, a tokenizer that does not fit the model.
      UnsupportedError: Parquet without pyarrow.
    """
    source = find_source(local_path(options.path), options.text_field)
    shards = tokenised(
        source,
        options.tokenizer,
        fraction=options.validation_fraction,
        vocabulary=options.vocabulary,
        end=options.end_token,
    )
    _check_vocabulary(options, shards)
    split = shards.split
    if split is None:
        split = split_place(shards.begins, options.validation_fraction)
    parts = {"training": (0, split), "validation": (split, shards.tokens)}
    rows = {name: _rows(options, shards, name, part) for name, part in parts.items()}
    return Data(tokenizer=shards.tokenizer, train=rows["training"], validation=rows["validation"])


def _check_vocabulary(options: DataOptions, shards: Shards) -> None:
    tokenizer, vocabulary = shards.tokenizer, options.vocabulary
    if tokenizer is not None:
        require(
            tokenizer.vocab_size <= vocabulary,
            f"the data's tokenizer has {tokenizer.vocab_size} tokens, the model's vocabulary "
            f"{vocabulary}; give the spec at least as many",
        )
    require(
        shards.largest < vocabulary,
        f"--data {options.path}: holds token {shards.largest}, the model's vocabulary has "
        f"{vocabulary}",
    )


def _rows(options: DataOptions, shards: Shards, name: str, part: tuple[int, int]) -> Rows:
    has, length = part[1] - part[0], options.length
    least = 2 if options.rows == "packed" else length + 1
    require(
        has >= least,
        f"--data {Path(options.path)}: the {name} part has {has} tokens; a row takes {least}",
    )
    if options.rows == "windows":
        return Windows(shards, part, length)
    packing = packed(shards, part, length)
    require(
        packing.count > 0,
        f"--data {options.path}: no document of the {name} part has two tokens",
    )
    return Packed(shards, packing, length)
