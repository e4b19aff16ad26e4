"""The store: damage of any kind is one warning and a rebuild; nothing half-written stays."""

import errno
import hashlib
import json
import os
import pickle
import shutil
import stat
import sys
import types

import numpy as np
import pytest
from jax.errors import JaxRuntimeError
from jax.experimental import serialize_executable

from jaxllm.aot import store as stores
from jaxllm.aot.store import Store, atomic_write
from jaxllm.errors import CapacityError
from tests.aot.programs import inputs, program


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with one stored program."""
    folder = tmp_path_factory.mktemp("programs")
    program().load(Store(folder))
    return folder


def content(folder):
    (path,) = folder.iterdir()
    return path, path.read_bytes()


def rewritten(data, change):
    """The file with a payload and a header that agree again after a change."""
    magic, head, payload = data.split(b"\n", 2)
    head = json.loads(head)
    head, payload = change(head, payload)
    head["sha256"] = hashlib.sha256(payload).hexdigest()
    return b"\n".join([magic, json.dumps(head).encode(), payload])


def flipped(data, place):
    place = int(place * len(data))
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


DAMAGE = {
    "empty": lambda d: b"",
    "cut in the magic": lambda d: d[:5],
    "cut in the header": lambda d: d[:40],
    "cut in the payload": lambda d: d[: len(d) // 2],
    "last byte gone": lambda d: d[:-1],
    "more at the end": lambda d: d + b"x",
    "a flipped bit early": lambda d: flipped(d, 0.3),
    "a flipped bit late": lambda d: flipped(d, 0.999),
    "another version": lambda d: d.replace(b"jaxllm-program-1", b"jaxllm-program-0", 1),
    "no such file": lambda d: b"GGUF" + bytes(100),
    "a header of another shape": lambda d: b"jaxllm-program-1\n[]\n" + d.split(b"\n", 2)[2],
    "another program": lambda d: rewritten(d, lambda h, p: (h | {"fingerprint": "0" * 64}, p)),
    "another report": lambda d: rewritten(d, lambda h, p: (h | {"report": {"flop": 1}}, p)),
    "no report": lambda d: rewritten(d, lambda h, p: ({"fingerprint": h["fingerprint"]}, p)),
    "no pickle": lambda d: rewritten(d, lambda h, p: (h, b"nothing")),
    "another pickle": lambda d: rewritten(d, lambda h, p: (h, pickle.dumps((1, 2, 3)))),
    "an executable cut short": lambda d: rewritten(
        d, lambda h, p: (h, pickle.dumps((pickle.loads(p)[0][:-500], *pickle.loads(p)[1:])))
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_warning_and_a_rebuild(made, tmp_path, warned, damage):
    folder = tmp_path / "programs"
    shutil.copytree(made, folder)
    path, data = content(folder)
    path.write_bytes(DAMAGE[damage](data))
    args, wanted = inputs()
    rebuilt = program().load(Store(folder))
    assert not rebuilt.stored
    assert np.allclose(rebuilt(*args)["y"], wanted, atol=1e-6)
    assert len(warned) == 1
    assert str(path) in warned[0]
    assert len(warned[0].splitlines()) <= 5
    assert program().load(Store(folder)).stored
    assert len(warned) == 1
    assert [p.name for p in folder.iterdir()] == [path.name]


def test_a_sound_store_says_nothing(made, warned):
    assert program().load(Store(made)).stored
    assert not warned


def test_another_fingerprint_is_another_file(made, tmp_path, warned):
    folder = tmp_path / "programs"
    shutil.copytree(made, folder)
    changed = program(depends={"spec": 2})
    assert not changed.load(Store(folder)).stored
    assert len(list(folder.iterdir())) == 2
    assert changed.load(Store(folder)).stored
    assert program().load(Store(folder)).stored
    assert not warned


def test_a_foreign_program_under_this_name_is_ignored(made, tmp_path, warned):
    """A file renamed to another program's name runs nothing of its own."""
    folder = tmp_path / "programs"
    shutil.copytree(made, folder)
    other = program(depends={"spec": 3})
    path, _ = content(folder)
    path.rename(Store(folder).path(other.name, other.fingerprint()))
    assert not other.load(Store(folder)).stored
    assert len(warned) == 1


def test_files_and_folder_are_private(made, tmp_path, monkeypatch):
    path, _ = content(made)
    assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path / "cache"))
    folder = Store.default().folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o755)
    assert stat.S_IMODE(Store.default().folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("where", ["os.replace", "os.fsync"])
@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(errno.ENOSPC, "no space"), CapacityError),
        (OSError(errno.EDQUOT, "quota"), CapacityError),
        (OSError(errno.EACCES, "denied"), PermissionError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch, where, error, raised):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(*_):
        raise error

    monkeypatch.setattr(where, fail)
    with pytest.raises(raised) as caught:
        atomic_write(path, [b"new", b"er"])
    monkeypatch.undo()
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"old")]
    if raised is CapacityError:
        assert "JAXLLM_CACHE" in str(caught.value)
    atomic_write(path, [b"new", b"er"])
    assert path.read_bytes() == b"newer"


def test_a_full_disk_is_one_clear_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(CapacityError, match="no space left"):
        program().load(Store(tmp_path))
    assert not list(tmp_path.iterdir())


def test_the_checksum_is_read_before_the_pickle(made, tmp_path, monkeypatch, warned):
    """A file whose hash is wrong is never unpickled: unpickling runs code."""
    folder = tmp_path / "programs"
    shutil.copytree(made, folder)
    path, data = content(folder)
    path.write_bytes(flipped(data, 0.5))

    def forbidden(*_):
        raise AssertionError("unpickled")

    monkeypatch.setattr(stores.pickle, "loads", forbidden)
    key = program().fingerprint()
    assert Store(folder).load("toy", key, program().devices()) is None
    assert "damaged" in warned[0]


@pytest.mark.parametrize("kind", [AttributeError, JaxRuntimeError])
def test_what_cannot_be_serialized_is_not_stored_and_said(kind, tmp_path, monkeypatch, warned):
    from jax.experimental import serialize_executable

    def refuse(_):
        raise kind("Can't pickle local object")

    monkeypatch.setattr(serialize_executable, "serialize", refuse)
    store = Store(tmp_path)
    made = program().load(store)
    assert not made.stored
    assert not list(tmp_path.iterdir())
    assert len(warned) == 1
    assert "cannot be stored" in warned[0]


@pytest.mark.parametrize("kernels", [False, True])
def test_handlers_of_kernels_come_before_a_gpus_program_that_may_need_them(
    kernels, made, tmp_path, monkeypatch
):
    """And only then: importing them takes a part of a second of every start."""
    handlers = stores._HANDLERS
    monkeypatch.delitem(sys.modules, handlers, raising=False)
    if kernels:
        monkeypatch.setitem(sys.modules, handlers, object())
    program().load(Store(tmp_path))
    _, data = content(tmp_path)
    head = json.loads(data.split(b"\n", 2)[1])
    assert head["kernels"] is kernels
    order = []
    monkeypatch.setattr(
        serialize_executable, "deserialize_and_load", lambda *_, **__: order.append("loaded")
    )
    monkeypatch.setattr(stores.importlib, "import_module", order.append)
    gpu = types.SimpleNamespace(platform="gpu", client=None)
    assert stores.load_bytes(data, head["fingerprint"], [gpu], where="here") is not None
    assert order == [handlers] * kernels + ["loaded"]
    old = rewritten(data, lambda h, p: ({k: h[k] for k in h if k != "kernels"}, p))
    order.clear()
    stores.load_bytes(old, head["fingerprint"], [gpu], where="here")
    assert order == [handlers, "loaded"]  # a file of before says nothing
