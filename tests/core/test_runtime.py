"""Where the cache lies, and what happens when it cannot lie there."""

import stat
from pathlib import Path

import pytest

from jaxllm.core import runtime
from jaxllm.errors import CapacityError


@pytest.fixture
def home(tmp_path, monkeypatch):
    for name in ("JAXLLM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_more_special_variable_wins(home, monkeypatch):
    assert runtime.cache_dir() == home / ".cache/jaxllm"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "xdg"))
    assert runtime.cache_dir() == home / "xdg/jaxllm"
    monkeypatch.setenv("JAXLLM_CACHE", "~/own")
    assert runtime.cache_dir() == home / "own"
    monkeypatch.setenv("JAXLLM_CACHE", "")
    assert runtime.cache_dir() == home / "xdg/jaxllm"


def test_folders_are_private(home):
    for folder in (runtime.models_dir(), runtime.weights_dir(), runtime.programs_dir()):
        assert folder.is_dir()
        assert folder.parent == runtime.cache_dir()
        assert mode(folder) == mode(folder.parent) == 0o700


def test_a_programs_folder_open_to_others_is_closed(home):
    folder = runtime.programs_dir()
    folder.chmod(0o777)
    assert mode(runtime.programs_dir()) == 0o700


def test_programs_of_another_user_are_refused(home, monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: 12345)
    with pytest.raises(CapacityError, match="belongs to user"):
        runtime.programs_dir()


def test_a_cache_that_cannot_be_made_says_so(home, monkeypatch):
    (home / "file").write_text("")
    for bad in ("file", "file/below"):
        monkeypatch.setenv("JAXLLM_CACHE", str(home / bad))
        with pytest.raises(CapacityError, match="JAXLLM_CACHE"):
            runtime.cache_dir()


def test_a_cache_that_cannot_be_written_says_so(home, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(CapacityError, match="cannot be written"):
        runtime.cache_dir()


def test_flags_of_the_hub_and_of_xla(monkeypatch):
    for name in ("HF_ENDPOINT", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "XLA_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    assert (runtime.hf_endpoint(), runtime.hf_offline(), runtime.xla_flags()) == (None, False, "")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1/")
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "true")
    monkeypatch.setenv("XLA_FLAGS", " --b=1   --a=2 ")
    assert runtime.hf_endpoint() == "http://127.0.0.1:1"
    assert runtime.hf_offline()
    assert runtime.xla_flags() == "--b=1 --a=2"
