"""Plain text as tokens: read once, split into training and validation parts, cut into rows.

The rows of a step are a function of (seed, step) alone: not of the number of hosts or devices, and
not of what came before. A run resumes anywhere without the state of a loader.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jaxllm.core.config import require
from jaxllm.data.batch import Batch
from jaxllm.errors import ConfigError
from jaxllm.text.tokenizer import Tokenizer

__all__ = ["TextData", "byte_tokenizer", "character_tokenizer", "open_text", "read_text"]


def read_text(path: Path) -> str:
    """The text of a file, or of all `.py` and `.txt` files of a folder in the order of their paths.

    In a folder, files that are no UTF-8 text and installed packages (`site-packages`) are left out.

    Raises:
      ConfigError: nothing is there, or the file is no UTF-8 text.
    """
    if not path.is_dir():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--data {path}: cannot be read as UTF-8 text: {error}") from None
    else:
        text = "\n".join(_texts(path))
    require(bool(text), f"--data {path}: holds no text")
    return text


def _texts(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        installed = "site-packages" in path.relative_to(folder).parts
        if path.suffix in (".py", ".txt") and path.is_file() and not installed:
            with contextlib.suppress(OSError, UnicodeDecodeError):
                yield path.read_text(encoding="utf-8")


def character_tokenizer(text: str) -> Tokenizer:
    """A tokenizer whose tokens are the characters of a text, in the order of their code points."""
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    characters = sorted(set(text))
    backend = Backend(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token=" "))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return Tokenizer(
        backend=backend,
        vocab_size=len(characters),
        bos_id=None,
        eos_ids=(),
        adds_bos=False,
    )


def byte_tokenizer() -> Tokenizer:
    """A tokenizer whose 256 tokens are the bytes of UTF-8, each numbered by its value."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    # The printable stand-ins of byte-level vocabularies: printable bytes are themselves, the others
    # take the code points from 256 on in order.
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    letters = {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}
    backend = Backend(models.BPE({letters[b]: b for b in range(256)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend=backend, vocab_size=256, bos_id=None, eos_ids=(), adds_bos=False)


@dataclasses.dataclass(frozen=True, eq=False)
class TextData:
    """A tokenised text in two parts.

    Attributes:
      tokenizer: what made the tokens.
      train: int32 tokens.
      validation: int32 tokens, the end of the text.
      length: T of a row.
    """

    tokenizer: Tokenizer
    train: np.ndarray
    validation: np.ndarray
    length: int

    def batch(self, step: int, *, rows: int, seed: int, part: slice = slice(None)) -> Batch:
        """Training rows of a step (or a part of them): windows drawn from (seed, step)."""
        random = np.random.Generator(np.random.Philox(key=[seed, step]))
        places = random.integers(0, len(self.train) - self.length, rows)
        return self._cut(self.train, places[part])

    def validation_batches(self, *, rows: int, count: int) -> list[Batch]:
        """At most `count` batches of consecutive windows of the validation part."""
        places = np.arange(0, len(self.validation) - self.length, self.length)
        whole = min(count, len(places) // rows)
        require(whole > 0, f"the validation part is too short for {rows} rows of {self.length}")
        return [self._cut(self.validation, places[i * rows : (i + 1) * rows]) for i in range(whole)]

    def _cut(self, tokens: np.ndarray, places: np.ndarray) -> Batch:
        rows = tokens[places[:, None] + np.arange(self.length + 1)]
        return Batch(
            np.ascontiguousarray(rows[:, :-1]),
            np.ascontiguousarray(rows[:, 1:]),
            np.ones((len(places), self.length), np.float32),
        )


def open_text(
    path: Path, *, length: int, validation_fraction: float, tokens: str = "characters"
) -> TextData:
    """Tokenise a text.

    Args:
      path: text file, or folder of `.py` and `.txt` files.
      length: T of a row.
      validation_fraction: share of the text at its end.
      tokens: `characters` (those that the text has) or `bytes` (256 of them, any text).

    Raises:
      ConfigError: no text, or too little for one row in either part.
    """
    text = read_text(path)
    if tokens == "bytes":
        tokenizer = byte_tokenizer()
        ids = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    else:
        tokenizer = character_tokenizer(text)
        ids = np.asarray(tokenizer.encode(text, add_special=False), np.int32)
    split = len(ids) - int(len(ids) * validation_fraction)
    train, validation = ids[:split], ids[split:]
    for name, part in (("training", train), ("validation", validation)):
        require(
            len(part) > length,
            f"--data {path}: the {name} part has {len(part)} tokens; a row takes {length + 1}",
        )
    return TextData(tokenizer, train, validation, length)
