"""From a source to shards, once: the second start of a run finds them in the cache."""

from __future__ import annotations

import array
import collections
import dataclasses
import hashlib
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxllm.core import runtime
from jaxllm.core.config import require
from jaxllm.core.logging import log
from jaxllm.data.arrays import copy_arrays, largest_id
from jaxllm.data.kept import keep
from jaxllm.data.shards import MAX_ID, Shards, ShardWriter, shard_dtype
from jaxllm.data.sources import Source, documents, source_hash
from jaxllm.data.tokens import (
    bpe_size,
    byte_tokenizer,
    character_tokenizer,
    encode_all,
    load_tokenizer,
    tokenizer_hash,
    train_bpe,
)
from jaxllm.text.tokenizer import Tokenizer

__all__ = ["split_place", "tokenised"]

# Part of every key: a new number makes all shards anew.
_VERSION = 1


class _Piece(NamedTuple):
    """A text on its way: does it begin a document, does the validation part begin with it."""

    text: str
    begins: bool = True
    splits: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """What is known before the first token: the tokenizer, and for BPE where its training ends."""

    name: str
    tokenizer: Tokenizer
    split: tuple[int, int] | None = None


def split_place(begins: np.ndarray, fraction: float) -> int:
    """Where the validation part begins, counted in what `begins` counts.

    At the nearest border of two documents if that changes the part by half of it at most, else
    where the fraction says, inside of a document.

    Args:
      begins: [documents + 1] where each begins; the last is the end of all.
      fraction: share of the validation part.
    """
    total = int(begins[-1])
    wanted = total - int(total * fraction)
    inner = begins[1:-1]
    if len(inner):
        after = int(np.searchsorted(inner, wanted))
        near = [int(inner[i]) for i in (after - 1, after) if 0 <= i < len(inner)]
        best = min(near, key=lambda place: abs(place - wanted))
        if 2 * abs(best - wanted) <= total - wanted:
            return best
    return wanted


def tokenised(
    source: Source, name: str, *, fraction: float, vocabulary: int, end: int | None = None
) -> Shards:
    """The shards of a source: from the cache, or made now.

    Args:
      source: files.
      name: `characters`, `bytes`, `bpe:VOCAB`, `none` (token arrays) or a model's path or name.
      fraction: share of the validation part; a trained tokenizer never sees it.
      vocabulary: of the model.
      end: token that ends the documents of token arrays.

    Raises:
      ConfigError: no text, broken files, ids outside of the vocabulary, no such tokenizer.
      CapacityError: no room in the cache.
    """
    made = ("characters", "bytes", "none")
    loaded = None if name in made or bpe_size(name) else load_tokenizer(name)
    _check_kind(source, name, end)
    key = {
        "version": _VERSION,
        "source": source_hash(source),
        "kind": source.kind,
        "field": source.field,
        "tokenizer": name if loaded is None else tokenizer_hash(loaded),
        "end": end,
        "fraction": fraction if bpe_size(name) else None,
    }
    folder = runtime.data_dir() / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]

    def fill(part: Path) -> dict[str, Any]:
        begun, before = time.perf_counter(), _stamps(source)
        if source.kind == "tokens":
            bound = MAX_ID if loaded is None else loaded.vocab_size
            bound = 256 if name == "bytes" else min(bound, MAX_ID)
            largest = largest_id(source, min(bound, vocabulary))
            tokenizer = byte_tokenizer() if name == "bytes" else loaded
            facts = copy_arrays(source, part, largest=largest, end=end)
        else:
            plan = _plan(source, name, loaded, fraction)
            facts, tokenizer = _write(source, plan, part), plan.tokenizer
        if tokenizer is not None:
            (part / "tokenizer.json").write_text(tokenizer.to_json())
        require(_stamps(source) == before, f"--data {source.root}: changed while it was read")
        log.info(
            "data: %s tokens in %s documents, %.1f s; kept in %s",
            f"{facts['tokens']:,}",
            f"{facts['documents']:,}",
            time.perf_counter() - begun,
            folder,
        )
        return facts | {"key": key}

    return Shards.open(folder, keep(folder, fill))


def _check_kind(source: Source, name: str, end: int | None) -> None:
    where = f"--data {source.root}"
    if source.kind == "tokens":
        fits = name != "characters" and bpe_size(name) is None
        require(
            fits,
            f"{where}: token arrays cannot be tokenised by {name!r}; give tokenizer none, bytes, "
            "or the path or name of the model whose ids they are",
        )
    else:
        require(name != "none", f"{where}: is text; tokenizer 'none' is for token arrays")
        require(end is None, f"{where}: is text; end_token is for token arrays")


def _stamps(source: Source) -> list[tuple[int, int]]:
    return [(s.st_size, s.st_mtime_ns) for s in (file.stat() for file in source.files)]


def _plan(source: Source, name: str, loaded: Tokenizer | None, fraction: float) -> _Plan:
    """The tokenizer, made from the data where its name says so."""
    if loaded is not None:
        return _Plan(name=name, tokenizer=loaded)
    if name == "bytes":
        return _Plan(name=name, tokenizer=byte_tokenizer())
    if name == "characters":
        found: set[str] = set()
        count = 0
        for text in documents(source):
            found.update(text)
            count += 1
        if count > 1:
            found.add("\n")  # it stands between documents
        _require_text(source, count)
        return _Plan(name=name, tokenizer=character_tokenizer(found))
    lengths = array.array("Q", [0])
    lengths.extend(len(text) for text in documents(source))
    _require_text(source, len(lengths) - 1)
    begins = np.cumsum(np.frombuffer(lengths, np.uint64))
    place = split_place(begins, fraction)
    number = int(np.searchsorted(begins, place, side="right")) - 1
    split = (number, place - int(begins[number]))
    before = (p.text for p in _before_split(_cut(documents(source), split)))
    trained = train_bpe(before, bpe_size(name) or 0)
    log.info("data: trained a vocabulary of %d tokens (asked: %s)", trained.vocab_size, name)
    return _Plan(name=name, tokenizer=trained, split=split)


def _require_text(source: Source, count: int) -> None:
    require(count > 0, f"--data {source.root}: holds no text")


def _before_split(pieces: Iterable[_Piece]) -> Iterator[_Piece]:
    for piece in pieces:
        if piece.splits:
            return
        yield piece


def _cut(texts: Iterable[str], split: tuple[int, int] | None) -> Iterator[_Piece]:
    """Texts as pieces; the document with the split inside of it becomes two."""
    for number, text in enumerate(texts):
        if split is None or number != split[0]:
            yield _Piece(text)
        elif split[1] == 0:
            yield _Piece(text, splits=True)
        else:
            yield _Piece(text[: split[1]])
            yield _Piece(text[split[1] :], begins=False, splits=True)


def _write(source: Source, plan: _Plan, folder: Path) -> dict[str, Any]:
    """Encode all documents into shards.

    Several documents end with the tokenizer's end token each; where it has none, a line break
    stands between them.
    """
    tokenizer = plan.tokenizer
    end = [*tokenizer.eos_ids[:1]]
    begin = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    waiting: collections.deque[_Piece] = collections.deque()

    def texts() -> Iterator[str]:
        for piece in _cut(documents(source), plan.split):
            waiting.append(piece._replace(text=""))
            yield piece.text

    with ShardWriter(folder, shard_dtype(tokenizer.vocab_size)) as writer:
        for ids in encode_all(tokenizer, plan.name, texts()):
            piece = waiting.popleft()
            if piece.begins and writer.documents:
                between = end or tokenizer.encode("\n", add_special=False)
                writer.append(np.array(between, np.int64))
            if piece.splits:
                writer.split = writer.total
            if piece.begins:
                writer.begin_documents()
                writer.append(np.array(begin, np.int64))
            writer.append(ids)
        if writer.documents > 1:
            writer.append(np.array(end, np.int64))
        _require_text(source, writer.documents)
    return writer.facts()
