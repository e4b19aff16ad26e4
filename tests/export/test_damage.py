"""A bundle that is damaged, foreign or hostile: one clear error, and nothing of it has run."""

import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jax import export

from jaxllm.errors import WeightsError
from jaxllm.export.bundle import export_bundle
from jaxllm.export.model import load_bundle
from jaxllm.export.runtime import Bundle, BundleError
from tests.export.conftest import small

PROGRAM = "programs/cpu/decode-greedy-256.jaxexport"


@pytest.fixture
def copy(talking: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle to damage; running or even reading a program of it fails the test."""

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a program was read")

    monkeypatch.setattr(export, "deserialize", never)
    return Path(shutil.copytree(talking[1], tmp_path / "copy"))


def refused(path: Path) -> str:
    with pytest.raises(BundleError) as found:
        Bundle(path)
    with pytest.raises(WeightsError):
        load_bundle(path)
    assert len(str(found.value)) < 500
    return str(found.value)


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest as somebody would who knows of its hash."""
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    text = json.dumps(manifest)
    (path / "manifest.json").write_text(text)
    (path / "manifest.sha256").write_text(hashlib.sha256(text.encode()).hexdigest())


CHANGED = [PROGRAM, "*.safetensors", "*.jinja", "tokenizer.json", "spec.json"]


@pytest.mark.parametrize("name", CHANGED)
def test_one_flipped_byte(copy: Path, name: str) -> None:
    file = next(iter(copy.rglob(name)))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    message = refused(copy)
    assert f"{file.relative_to(copy).as_posix()} was changed after the export" in message


@pytest.mark.parametrize("name", [PROGRAM, "tokenizer.json", "spec.json", "manifest.sha256"])
def test_a_missing_or_empty_file(copy: Path, name: str) -> None:
    (copy / name).write_bytes(b"")
    assert "changed after the export" in refused(copy)
    (copy / name).unlink()
    assert f"{name} is missing" in refused(copy)


def test_manifests(copy: Path) -> None:
    text = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(text.replace('"context": 64', '"context": 63'))
    assert "manifest.json was changed" in refused(copy)
    (copy / "manifest.json").write_text(text.replace('"format": 1', '"format": 2'))
    assert "has format 2" in refused(copy)
    for bad in ("{", "[]", "3", "[1]", "\x00"):
        (copy / "manifest.json").write_text(bad)
        assert "damaged" in refused(copy) or "has format None" in refused(copy)
    (copy / "manifest.json").unlink()
    assert "manifest.json is missing" in refused(copy)
    assert "neither a directory" in refused(copy / "absent")


def test_another_platform_or_mesh(copy: Path) -> None:
    def only(**changes: Any) -> Callable[[dict[str, Any]], Any]:
        return lambda manifest: [way.update(changes) for way in manifest["variants"]]

    rewrite(copy, only(platform="cuda", name="cuda x 1"))
    assert "is for ['cuda x 1']; here is cpu x 8" in refused(copy)
    rewrite(copy, only(platform="cpu", devices=4, name="cpu x 4 (mesh data=2,tensor=2)"))
    assert "mesh data=2,tensor=2" in refused(copy)
    rewrite(copy, only(devices=1, chip="9.0", name="cpu x 1, compute capability 9.0"))
    assert "compute capability 9.0" in refused(copy)


@pytest.mark.parametrize("version", [1, 99])
def test_outside_of_the_window_of_jax(copy: Path, version: int) -> None:
    rewrite(copy, lambda m: m["variants"][0].update(convention=version) or m.update(jax="0.4.1"))
    message = refused(copy)
    assert "made by jax 0.4.1, out of the window" in message and "export it anew" in message


def test_a_program_that_jax_refuses(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def expired(_: Any) -> None:
        raise ValueError("Exported being deserialized seems to be older than the 6-month window")

    monkeypatch.setattr(export, "deserialize", expired)
    assert "older than the 6-month window" in refused(copy)


def packed(folder: Path, file: Path, extra: list[tarfile.TarInfo] | None = None) -> Path:
    with tarfile.open(file, "w") as tar:
        for item in sorted(folder.rglob("*")):
            tar.add(item, item.relative_to(folder), recursive=False)
        for info in extra or []:
            tar.addfile(info, io.BytesIO(b"x" * info.size))
    return file


def entry(name: str, **changes: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for key, value in changes.items():
        setattr(info, key, value)
    return info


@pytest.mark.parametrize(
    "bad",
    [
        entry("../outside", size=1),
        entry("programs/../../outside", size=1),
        entry("/tmp/outside", size=1),
        entry("spec.json", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        entry("spec.json", type=tarfile.LNKTYPE, linkname="manifest.json"),
        entry("pipe", type=tarfile.FIFOTYPE),
    ],
    ids=lambda info: f"{info.name}-{info.type.decode()}",
)
def test_hostile_tars(copy: Path, tmp_path: Path, bad: tarfile.TarInfo) -> None:
    before = set(tmp_path.rglob("*"))
    message = refused(packed(copy, tmp_path / "bad.tar", [bad]))
    assert "refused" in message and bad.name in message
    assert set(tmp_path.rglob("*")) - before == {tmp_path / "bad.tar"}  # nothing was unpacked


def test_cut_off_tars(copy: Path, tmp_path: Path) -> None:
    whole = packed(copy, tmp_path / "whole.tar").read_bytes()
    short = tmp_path / "short.tar"
    for size in (0, 100, len(whole) // 3, len(whole) // 2, len(whole) - 20_000):
        short.write_bytes(whole[:size])
        assert any(word in refused(short) for word in ("whole .tar", "is missing", "changed"))


def test_a_tar_runs_where_it_lies(talking: tuple[str, Path], tmp_path: Path) -> None:
    file = export_bundle(talking[0], tmp_path / "made.tar", small())
    ours, folder = Bundle(file), Bundle(talking[1])
    assert list(tmp_path.iterdir()) == [file]
    assert set(ours.manifest["files"]) == set(folder.manifest["files"])
    assert bytes(ours.read("tokenizer.json")) == bytes(folder.read("tokenizer.json"))
    assert all((a == b).all() for a, b in zip(ours.weights, folder.weights, strict=True))
    assert Bundle(packed(talking[1], tmp_path / "by-hand.tar")).way == folder.way


def test_weights_are_hashed_again_only_once_they_changed(
    talking: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path / "cache"))
    copy = Path(shutil.copytree(talking[1], tmp_path / "copy"))
    hashed: list[str] = []
    real = Bundle._check

    def check(self: Bundle, name: str, wanted: str) -> None:
        hashed.append(name)
        real(self, name, wanted)

    def loaded(**options: Any) -> tuple[bool, bool]:
        """Whether weights, and whether programs, were hashed."""
        hashed.clear()
        load_bundle(copy, **options)
        kinds = {Path(name).suffix for name in hashed}
        return ".safetensors" in kinds, ".jaxexport" in kinds

    monkeypatch.setattr(Bundle, "_check", check)
    assert loaded() == (True, True)
    assert loaded() == (True, True)  # too fresh to be remembered
    monkeypatch.setattr("jaxllm.export.stored._SETTLED_S", -1.0)
    assert [loaded(), loaded()] == [(True, True), (False, True)]
    assert loaded(store=False) == (True, True)
    (notes,) = (tmp_path / "cache" / "programs").glob("checked-*.json")
    for bad in (b"", b"[3]", b"3"):
        notes.write_bytes(bad)
        assert [loaded(), loaded()] == [(True, True), (False, True)]
    file = next(copy.rglob("*.safetensors"))
    status, data = file.stat(), bytearray(file.read_bytes())
    data[-1] ^= 1
    with open(file, "r+b") as stream:  # the same inode, and times set back
        stream.write(data)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(WeightsError, match=r"safetensors was changed after the export"):
        load_bundle(copy)
