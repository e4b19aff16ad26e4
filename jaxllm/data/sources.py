"""Sources: text files, folders, JSON lines and Parquet as documents; token arrays as files."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from jaxllm.core import runtime
from jaxllm.core.config import require
from jaxllm.core.logging import log
from jaxllm.errors import ConfigError, UnsupportedError

__all__ = ["Source", "documents", "find_source", "source_hash"]

_TEXT = (".py", ".txt")
_ROWS = (".jsonl", ".jsonl.gz", ".parquet")
_ARRAYS = (".npy", ".bin")
# A file that was written within this time may change again without a new time stamp.
_SETTLED_SECONDS = 2.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Where the data lies.

    Attributes:
      root: what was named: a file or a folder.
      files: that are read, in order.
      kind: `text` (documents) or `tokens` (arrays of ids).
      field: of JSON lines and Parquet, that holds the text.
    """

    root: Path
    files: tuple[Path, ...]
    kind: Literal["text", "tokens"]
    field: str = "text"

    def named(self, file: Path) -> str:
        """How messages call a file."""
        return f"--data {file}"


def find_source(root: Path, field: str = "text") -> Source:
    """The files of a source.

    A folder gives its `.py`, `.txt`, `.jsonl`, `.jsonl.gz` and `.parquet` files in the order of
    their paths, without installed packages (`site-packages`); one that has none of these gives its
    `.npy` and `.bin` token arrays.

    Raises:
      ConfigError: nothing is there.
    """
    if not root.is_dir():
        require(root.is_file(), f"--data {root}: there is no such file or folder")
        kind = "tokens" if root.name.endswith(_ARRAYS) else "text"
        return Source(root=root, files=(root,), kind=kind, field=field)
    inside = sorted(_inside(root))
    texts = tuple(p for p in inside if p.name.endswith((*_TEXT, *_ROWS)) and p.is_file())
    arrays = tuple(p for p in inside if p.name.endswith(_ARRAYS) and p.is_file())
    require(
        bool(texts or arrays),
        f"--data {root}: the folder holds no text and no token arrays "
        f"({', '.join((*_TEXT, *_ROWS, *_ARRAYS))})",
    )
    kind = "text" if texts else "tokens"
    return Source(root=root, files=texts or arrays, kind=kind, field=field)


def _inside(root: Path) -> Iterator[Path]:
    """All files below a folder; installed packages are not walked, there may be very many."""
    for folder, inner, names in root.walk():
        if "site-packages" in inner:
            inner.remove("site-packages")
        yield from (folder / name for name in names)


def documents(source: Source) -> Iterator[str]:
    """The texts of a source, empty ones left out; a text file is one, a row of the others one.

    Files of a folder that are no UTF-8 text are left out with a warning.

    Raises:
      ConfigError: a file cannot be read, a row is broken or has no such field.
    """
    left_out = 0
    for file in source.files:
        if file.name.endswith((".jsonl", ".jsonl.gz")):
            texts = _json_lines(source, file)
        elif file.name.endswith(".parquet"):
            texts = _parquet(source, file)
        else:
            text = _text_file(source, file)
            left_out += text is None
            texts = iter([text or ""])
        yield from filter(None, texts)
    if left_out:
        log.warning("data: %d files of %s are no UTF-8 text: left out", left_out, source.root)


def _text_file(source: Source, file: Path) -> str | None:
    """The text of a file; None where a folder's file is no UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        if file != source.root:
            return None
        raise ConfigError(f"{source.named(file)}: cannot be read as UTF-8 text: {error}") from None
    except OSError as error:
        raise ConfigError(f"{source.named(file)}: cannot be read: {error.strerror}") from None


def _json_lines(source: Source, file: Path) -> Iterator[str]:
    unpack = gzip.open if file.name.endswith(".gz") else open
    number = 0
    try:
        with unpack(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _json_text(line, source.field, f"{source.named(file)}, line {number}")
    except (OSError, EOFError, zlib.error) as error:
        where = f"{source.named(file)}, after line {number}"
        raise ConfigError(f"{where}: cannot be read: {error}") from None


def _json_text(line: bytes, field: str, where: str) -> str:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: is no UTF-8: {error.reason} at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: is no JSON: {error}") from None
    require(isinstance(row, dict), f"{where}: holds a {type(row).__name__}, not an object")
    require(field in row, f"{where}: has no field {field!r}; it has {', '.join(row) or 'none'}")
    text = row[field]
    require(isinstance(text, str), f"{where}: {field!r} is a {type(text).__name__}, not a string")
    # JSON can spell half a surrogate pair, which no tokenizer can read.
    if b"\\u" in line and any("\ud800" <= c <= "\udfff" for c in text):
        raise ConfigError(f"{where}: {field!r} holds half a surrogate pair")
    return text


def _parquet(source: Source, file: Path) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UnsupportedError(
            f"{source.named(file)}: Parquet needs pyarrow, which is not installed; "
            "install the extra: pip install 'jaxllm[parquet]'"
        ) from None
    where = source.named(file)
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            found = f"it has {', '.join(names) or 'none'}"
            require(source.field in names, f"{where}: has no field {source.field!r}; {found}")
            for batch in table.iter_batches(batch_size=1024, columns=[source.field]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    kind = type(text).__name__
                    told = f"{where}, row {row}: {source.field!r} is a {kind}, not a string"
                    require(isinstance(text, str), told)
                    yield text
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: cannot be read as Parquet: {str(error)[:200]}") from None


def source_hash(source: Source) -> str:
    """SHA-256 over names and contents; remembered by path, size and time, so that a start is quick.

    Raises:
      ConfigError: a file cannot be read.
    """
    begun, stamps = time.time(), []
    for file in source.files:
        try:
            status = file.stat()
        except OSError as error:
            raise ConfigError(f"{source.named(file)}: cannot be read: {error.strerror}") from None
        stamps.append([str(file.absolute()), status.st_size, status.st_mtime_ns])
    key = hashlib.sha256(json.dumps([str(source.root.absolute()), stamps]).encode()).hexdigest()
    memo = runtime.data_dir() / f"source-{key[:32]}.sha256"
    if memo.exists() and len(found := memo.read_text()) == 64:
        return found
    whole = hashlib.sha256()
    for file in source.files:
        try:
            with open(file, "rb") as content:
                digest = hashlib.file_digest(content, "sha256").digest()
        except OSError as error:
            raise ConfigError(f"{source.named(file)}: cannot be read: {error.strerror}") from None
        # Of a single file's name only the ending matters: it says how the content is read.
        alone = "".join(file.suffixes[-2:])
        name = alone if file == source.root else str(file.relative_to(source.root))
        whole.update(hashlib.sha256(name.encode()).digest() + digest)
    if begun - max(stamp[2] for stamp in stamps) / 1e9 > _SETTLED_SECONDS:
        memo.write_text(whole.hexdigest())
    return whole.hexdigest()
