"""Programs that the last start asked for are loaded before this one asks."""

import json
import threading

import jax
import numpy as np
import pytest

from jaxllm.aot import store as stores
from jaxllm.aot.ahead import loading_ahead
from jaxllm.aot.store import Store
from tests.aot.programs import inputs, program


@pytest.fixture
def reads(monkeypatch):
    """Names of the threads in which stored files are read."""
    found = []
    plain = stores.load_bytes

    def load_bytes(*args, **more):
        found.append(threading.current_thread().name)
        return plain(*args, **more)

    monkeypatch.setattr(stores, "load_bytes", load_bytes)
    monkeypatch.setattr(stores, "_ASKED", set())
    return found


def started(folder, about="a start", wait=True):
    """A start that asks for one program: what it gave, and whether it was stored."""
    store = Store(folder)
    with loading_ahead(store, about, lambda: jax.devices()[:1]) as keep:
        for thread in threading.enumerate() if wait else []:
            if thread.name == "jaxllm-ahead":
                thread.join()
        made = program().load(store)
        keep([made])
    stores._ASKED.clear()  # as in another process
    return np.asarray(made(*inputs()[0])["y"]), made.stored


def lists(folder):
    return sorted(folder.glob("start-*.json"))


def test_the_second_start_finds_it_loaded(tmp_path, reads):
    first, stored = started(tmp_path)
    assert not stored and not reads and len(lists(tmp_path)) == 1
    second, stored = started(tmp_path)
    assert stored and len(reads) == 1 and reads[0] != threading.current_thread().name
    np.testing.assert_array_equal(first, second)
    assert not stores._COMING and len(lists(tmp_path)) == 1


def test_another_start_has_a_list_of_its_own(tmp_path, reads):
    started(tmp_path)
    started(tmp_path, about="another")
    assert reads == [threading.current_thread().name] and len(lists(tmp_path)) == 2


def test_what_nobody_asks_for_is_dropped(tmp_path, reads):
    started(tmp_path)
    with loading_ahead(Store(tmp_path), "a start", lambda: jax.devices()[:1]):
        pass
    assert not stores._COMING
    assert started(tmp_path)[1]


def test_what_was_asked_for_is_not_loaded_again(tmp_path, reads):
    started(tmp_path)
    store = Store(tmp_path)
    made = program().load(store)
    assert not store.expect(made.name, made.fingerprint, jax.devices()[:1], print)
    assert len(reads) == 1


@pytest.mark.parametrize(
    "content", ["", "{", "{}", "[1]", '[["a"]]', '[["a", 1]]', json.dumps([["a", "b"]] * 600)]
)
def test_a_damaged_list_is_none(tmp_path, reads, content):
    started(tmp_path)
    (path,) = lists(tmp_path)
    path.write_text(content)
    assert started(tmp_path)[1] and reads == [threading.current_thread().name]
    assert len(json.loads(path.read_text())) == 1


def test_names_that_lead_elsewhere_are_not_read(tmp_path, reads):
    started(tmp_path)
    (path,) = lists(tmp_path)
    path.write_text(json.dumps([["../elsewhere", "0" * 64]]))
    assert started(tmp_path)[1] and reads == [threading.current_thread().name]


def test_a_device_that_fails_is_only_a_guess_less(tmp_path, reads):
    def broken():
        raise RuntimeError("no device")

    with loading_ahead(Store(tmp_path), "a start", broken):
        pass
    assert not reads


def test_without_a_store_there_is_nothing_to_do():
    with loading_ahead(None, "a start", list) as keep:
        keep([])
