"""Tokenizers of training data: named, made from the data, or trained on it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.core.config import require
from jaxllm.errors import ConfigError
from jaxllm.text.tokenizer import Tokenizer
from jaxllm.zoo.gguf import open_gguf
from jaxllm.zoo.pull import resolve

__all__ = [
    "bpe_size",
    "byte_tokenizer",
    "character_tokenizer",
    "check_tokenizer",
    "encode_all",
    "load_tokenizer",
    "tokenizer_hash",
    "train_bpe",
]

END = "<|endoftext|>"
# Texts are encoded together up to this many characters: enough to keep every core busy.
_TOGETHER = 2**22
# No token of our own byte-level BPE crosses the border before a single space.
_PIECE = 2**16
_BORDER = re.compile(r"(?<=\S) (?=\S)")


def bpe_size(name: str) -> int | None:
    """The vocabulary that `bpe:VOCAB` names; None for another name."""
    if not name.startswith("bpe:"):
        return None
    size = name.removeprefix("bpe:").replace("_", "")
    known = size.isascii() and size.isdigit() and int(size) >= 257
    require(
        known, f"tokenizer {name!r}: write bpe:VOCAB, VOCAB at least 257 (256 bytes and an end)"
    )
    return int(size)


def check_tokenizer(name: str, vocabulary: int) -> None:
    """Refuse what can be no tokenizer of a model with this vocabulary, by its name alone.

    Raises:
      ConfigError: an empty name, a bpe without a size or with too large a one.
    """
    require(bool(name.strip()), "tokenizer is empty; give characters, bytes, bpe:VOCAB or a path")
    require(
        (bpe_size(name) or 0) <= vocabulary,
        f"tokenizer {name!r} may have more tokens than the model's vocabulary, {vocabulary}; give "
        "the spec at least as many",
    )


def character_tokenizer(characters: Iterable[str]) -> Tokenizer:
    """A tokenizer whose tokens are characters, in the order of their code points."""
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    known = {c: i for i, c in enumerate(sorted(set(characters)))}
    backend = Backend(models.WordLevel(known, unk_token=" "))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return Tokenizer(
        backend=backend, vocab_size=len(known), bos_id=None, eos_ids=(), adds_bos=False
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


def train_bpe(texts: Iterable[str], size: int) -> Tokenizer:
    """Byte-level BPE of at most `size` tokens; token 0 ends a text. No chance is in it."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator((p for text in texts for p in _pieces(text)), trainer)
    return Tokenizer(
        backend=backend,
        vocab_size=backend.get_vocab_size(),
        bos_id=None,
        eos_ids=(0,),
        adds_bos=False,
        special_tokens={"eos_token": END},
    )


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a model: catalogue name, folder, tokenizer.json, `.gguf` or `org/name`.

    Raises:
      ConfigError: there is none; WeightsError: its files are damaged or not pulled yet.
    """
    path = Path(name).expanduser()
    if path.name == "tokenizer.json" and path.is_file():
        path = path.parent
    else:
        try:
            path = resolve(name)
        except ConfigError as error:
            raise ConfigError(
                f"tokenizer {name!r}: allowed are characters, bytes, bpe:VOCAB, none (for token "
                f"arrays), or a model's path or name; {error}"
            ) from None
    if path.is_dir():
        inner = path / "model"  # of a run directory
        found = Tokenizer.from_directory(path) or Tokenizer.from_directory(inner)
    else:
        found = Tokenizer.from_gguf(open_gguf(path).metadata)
    if found is None:
        raise ConfigError(f"tokenizer {name!r}: {path} holds no tokenizer.json")
    return found


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """SHA-256 over all that a tokenizer is."""
    return hashlib.sha256(tokenizer.to_json().encode()).hexdigest()


def _pieces(text: str) -> Iterator[str]:
    """A long text in pieces that end where no token of byte-level BPE crosses."""
    begin = 0
    while len(text) - begin > _PIECE:
        border = _BORDER.search(text, begin + _PIECE)
        if border is None:
            break
        yield text[begin : border.start()]
        begin = border.start()
    yield text[begin:]


def encode_all(tokenizer: Tokenizer, name: str, texts: Iterable[str]) -> Iterator[np.ndarray]:
    """The ids of each text, without special tokens; text that spells one is plain text.

    Args:
      tokenizer: that encodes.
      name: as the run names it; bytes, characters and our own BPE have shorter ways.
      texts: any number.

    Raises:
      ConfigError: a text has a character that the `characters` tokenizer has not.
    """
    if name == "bytes":
        for text in texts:
            yield np.frombuffer(text.encode(), np.uint8)
    elif name == "characters":
        vocabulary = tokenizer.backend.get_vocab()
        known = np.sort(np.array([ord(c) for c in vocabulary], np.uint32))
        for text in texts:
            codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
            ids = np.searchsorted(known, codes)
            fits = len(known) and np.array_equal(known[np.minimum(ids, len(known) - 1)], codes)
            require(bool(fits), "the data changed while it was read: start again")
            yield ids
    else:
        yield from _encode_together(tokenizer, texts, cut=bpe_size(name) is not None)


def _encode_together(
    tokenizer: Tokenizer, texts: Iterable[str], *, cut: bool
) -> Iterator[np.ndarray]:
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_str(tokenizer.backend.to_str())
    backend.encode_special_tokens = True

    def flush(waiting: list[list[str]]) -> Iterator[np.ndarray]:
        flat = [piece for pieces in waiting for piece in pieces]
        coded: Iterator[Any] = iter(backend.encode_batch_fast(flat, add_special_tokens=False))
        for pieces in waiting:
            yield np.concatenate([np.asarray(next(coded).ids, np.int64) for _ in pieces])

    waiting, size = [], 0
    for text in texts:
        waiting.append(list(_pieces(text)) if cut else [text])
        size += len(text)
        if size >= _TOGETHER:
            yield from flush(waiting)
            waiting, size = [], 0
    yield from flush(waiting)
