"""Models called `org/name`: fetched from the Hugging Face hub into its own shared cache.

Only safetensors weights are taken: a pickled checkpoint runs code when it is read.
"""

import contextlib
import errno
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxllm.core import runtime
from jaxllm.errors import CapacityError, WeightsError

__all__ = ["cached", "is_repository", "pull"]

_WORD = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?"
_REPOSITORY = re.compile(f"{_WORD}/{_WORD}")
_COMPANIONS = re.compile(r".*\.(json|jinja)|tokenizer\.model|merges\.txt|vocab\.txt")

Note = Callable[[str], None]


def is_repository(name: str) -> bool:
    """Whether a name has the form `org/name`."""
    return _REPOSITORY.fullmatch(name) is not None


def cached(repository: str) -> Path | None:
    """The folder of a repository that was fetched whole, or None. Asks no network."""
    store = _hub_cache() / f"models--{repository.replace('/', '--')}"
    try:
        revision = (store / "refs" / "main").read_text().strip()
    except OSError:
        return None
    folder = store / "snapshots" / revision
    return folder if revision and _is_complete(folder) else None


def pull(repository: str, *, progress: Note | None = None) -> Path:
    """Fetch config, tokenizer and safetensors of a repository.

    A broken connection is taken up where it broke; a later call takes up with the missing files.
    `HF_ENDPOINT`, `HF_HOME`, `HF_TOKEN` and `HF_HUB_OFFLINE` mean what they mean to the hub's own
    client. Without a network a copy that is there whole is returned, and said to be.

    Raises:
        WeightsError: no network, no such repository, no safetensors in it, or a wrong hash.
        CapacityError: no room.
    """
    note = progress or (lambda line: None)
    try:
        listing = _listing(repository)
    except WeightsError as error:
        if (folder := cached(repository)) is None:
            raise
        note(f"{error}; using the copy in {folder}")
        return folder
    names = _wanted(repository, [file.rfilename for file in listing.siblings])
    files = {file.rfilename: file for file in listing.siblings if file.rfilename in names}
    folder = cached(repository)
    if folder is not None and folder.name == listing.sha:
        note(f"{repository} is there: {folder}")
        return folder
    total = sum(file.size or 0 for file in files.values())
    _check_room(repository, total)
    note(f"downloading {repository}: {len(names)} files, {total / 1e6:,.0f} MB")
    folder = _download(repository, names, show=progress is not None)
    note("checking hashes")
    for name, file in files.items():
        if file.lfs is not None:
            _refuse_other(folder / name, file.lfs.sha256)
    note(f"kept in {folder}")
    return folder


def _hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _listing(repository: str) -> Any:
    if runtime.hf_offline():
        raise WeightsError(f"{repository} cannot be fetched: HF_HUB_OFFLINE is set")
    from huggingface_hub import HfApi

    api = HfApi(endpoint=runtime.hf_endpoint(), library_name="jaxllm")
    with _explained(repository):
        return api.model_info(repository, files_metadata=True, timeout=30)


def _download(repository: str, names: Sequence[str], *, show: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    hide = not show and not are_progress_bars_disabled()
    if hide:
        disable_progress_bars()
    try:
        with _explained(repository):
            folder = snapshot_download(
                repository,
                endpoint=runtime.hf_endpoint(),
                # Names, not patterns: a bracket in one would be read as a character class.
                allow_patterns=[name.replace("[", "[[]") for name in names],
                library_name="jaxllm",
            )
    finally:
        if hide:
            enable_progress_bars()
    return Path(folder)


@contextlib.contextmanager
def _explained(repository: str) -> Iterator[None]:
    """Turns whatever the hub's client raises into one line of ours."""
    from huggingface_hub import errors

    where = runtime.hf_endpoint() or "the Hugging Face hub"
    try:
        yield
    except errors.GatedRepoError as error:
        raise WeightsError(
            f"{repository} is gated on {where}: accept its terms there and set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise WeightsError(
            f"{repository} was not found on {where} (if it is private, set HF_TOKEN)"
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        hint = "; set HF_TOKEN if it needs one" if status in (401, 403) else ""
        raise WeightsError(
            f"{repository} could not be fetched: {where} answered {status}{hint}"
        ) from error
    # The client has changed its HTTP library before, so its network errors have no fixed class.
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise CapacityError(f"no room for {repository} in {_hub_cache()}") from error
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise WeightsError(
            f"{repository} could not be fetched from {where} (no network?): {lines[0]}"
        ) from error


def _wanted(repository: str, names: Sequence[str]) -> list[str]:
    """The files to fetch out of those at the repository's top."""
    top = [name for name in names if "/" not in name]
    weights = [name for name in top if name.endswith(".safetensors")]
    # Some repositories carry the same weights a second time in their author's own layout.
    weights = [name for name in weights if name.startswith("model")] or weights
    if not weights:
        others = [name for name in top if name.endswith((".bin", ".pt", ".pth", ".gguf", ".h5"))]
        raise WeightsError(
            f"{repository} has no safetensors files (it has: {', '.join(others[:4]) or 'none'}); "
            "pickled weights are not loaded, since reading them runs code"
        )
    return sorted({*weights, *(name for name in top if _COMPANIONS.fullmatch(name))})


def _is_complete(folder: Path) -> bool:
    try:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        shards = set(index["weight_map"].values())
    except FileNotFoundError:
        return any(folder.glob("*.safetensors"))
    except (OSError, ValueError, KeyError, AttributeError):
        return False
    return all((folder / str(shard)).is_file() for shard in shards)


def _check_room(repository: str, needed_bytes: int) -> None:
    folder = _hub_cache()
    while not folder.exists():
        folder = folder.parent
    if (free := shutil.disk_usage(folder).free) < needed_bytes:
        raise CapacityError(
            f"no room for {repository} in {folder}: {needed_bytes / 1e6:,.0f} MB are needed, "
            f"{free / 1e6:,.0f} MB are free; set HF_HOME to a folder on another disk"
        )


def _refuse_other(path: Path, wanted: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wanted:
        blob = path.resolve()
        path.unlink()
        blob.unlink(missing_ok=True)
        raise WeightsError(
            f"{path.name} is refused: its SHA-256 is {found}, wanted {wanted}; it was removed"
        )
