"""Data by name: what `jaxllm pull data:NAME` fetches, and where it lies."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import http.client
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from jaxllm.core import runtime
from jaxllm.core.config import nearest, require
from jaxllm.errors import CapacityError, WeightsError

__all__ = ["CATALOGUE", "DataFile", "local_path", "pull_data"]

PREFIX = "data:"
_TIMEOUT_SECONDS = 60


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataFile:
    """A file on the network and what must come back.

    Attributes:
      address: of the file.
      sha256: of its contents.
      size_bytes: of it.
      name: of the file in the cache.
    """

    address: str
    sha256: str
    size_bytes: int
    name: str


CATALOGUE: dict[str, DataFile] = {
    "tinyshakespeare": DataFile(
        address="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        size_bytes=1_115_394,
        name="tinyshakespeare.txt",
    ),
}


def _find(name: str) -> tuple[DataFile, Path]:
    """(what it is, where it lies or will lie) of `data:NAME`."""
    short = name.removeprefix(PREFIX)
    require(short in CATALOGUE, f"unknown data {name!r}; {nearest(short, CATALOGUE)}")
    file = CATALOGUE[short]
    return file, runtime.data_dir() / f"{file.sha256[:16]}-{file.name}"


def local_path(source: str) -> Path:
    """The file or folder that `--data` names; `data:NAME` is one that was pulled.

    Raises:
      ConfigError: the name is unknown, or it was not pulled yet.
    """
    if not source.startswith(PREFIX):
        return Path(source).expanduser()
    _, path = _find(source)
    require(
        path.is_file(), f"--data {source}: is not in the cache; fetch it with: jaxllm pull {source}"
    )
    return path


def pull_data(name: str, *, progress: Callable[[str], None] | None = None) -> Path:
    """Fetch `data:NAME` into the cache unless it is there whole, and return its file.

    Raises:
      ConfigError: the name is unknown.
      WeightsError: there is no network, or something else came; nothing is kept.
      CapacityError: no room.
    """
    file, path = _find(name)
    note = progress or (lambda line: None)
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == file.sha256:
        note(f"{name} is there: {path}")
        return path
    note(f"downloading {name} ({file.size_bytes / 1e6:.1f} MB)")
    content = _fetch(name, file)
    found = hashlib.sha256(content).hexdigest()
    if found != file.sha256:
        raise WeightsError(
            f"{name} is refused: what {file.address} gave has SHA-256 {found}, wanted "
            f"{file.sha256}; nothing was kept"
        )
    part = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".pull-", delete=False) as out:
            part = Path(out.name)
            out.write(content)
        part.replace(path)
    except OSError as error:
        if part is not None:
            with contextlib.suppress(OSError):
                part.unlink()
        raise CapacityError(f"{name} could not be kept in {path.parent}: {error}") from None
    note(f"the hash is right; kept in {path}")
    return path


def _fetch(name: str, file: DataFile) -> bytes:
    try:
        with urllib.request.urlopen(file.address, timeout=_TIMEOUT_SECONDS) as answer:
            # One byte more than it should have: a longer file is refused by its hash.
            return answer.read(file.size_bytes + 1)
    except urllib.error.HTTPError as error:
        error.close()
        raise WeightsError(
            f"{name} could not be fetched: {file.address} answered {error.code}"
        ) from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise WeightsError(
            f"{name} could not be fetched from {file.address} (no network?): {reason}; "
            f"give a file with --data instead"
        ) from None
