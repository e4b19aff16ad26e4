"""Weights in run layout on disk: bit-equal back, whole or not at all, damage is a rebuild."""

import errno
import json
import os

import ml_dtypes
import numpy as np
import pytest

from jaxllm.aot.arrays import load_arrays, save_arrays
from jaxllm.core.tree import flatten
from jaxllm.errors import CapacityError

DTYPES = ["float32", "float16", "bfloat16", "int8", "uint8", "int32", "int4", "bool"]


def arrays():
    random = np.random.default_rng(0)
    for name in DTYPES:
        dtype = np.dtype(getattr(ml_dtypes, name, name))
        yield f"layers.0:3.{name}", random.integers(0, 2, (3, 5, 7)).astype(dtype)
    yield "layers.0:3.view", np.arange(24, dtype=np.float32).reshape(4, 6).T
    yield "scalar", np.float32(3.5).reshape(())
    yield "empty", np.zeros((0, 4), np.float32)
    yield "embed.table", random.standard_normal((11, 3)).astype(np.float32)


@pytest.fixture
def folder(tmp_path):
    save_arrays(tmp_path / "weights", arrays(), {"tokenizer": "text", "n": [1]})
    return tmp_path / "weights"


def test_round_trip_is_bit_equal(folder):
    tree, extra = load_arrays(folder)
    assert extra == {"tokenizer": "text", "n": [1]}
    found, wanted = dict(flatten(tree)), dict(arrays())
    assert list(found) == list(wanted)
    for path, array in wanted.items():
        assert (found[path].dtype, found[path].shape) == (array.dtype, array.shape)
        assert found[path].tobytes() == array.tobytes(), path


def test_arrays_are_mapped_aligned_and_read_only(folder):
    tree, _ = load_arrays(folder)
    for path, array in flatten(tree):
        assert not array.flags.writeable
        assert array.flags.c_contiguous
        if array.size:
            assert array.__array_interface__["data"][0] % 4096 == 0, path
    with pytest.raises(ValueError, match="read-only"):
        tree["embed"]["table"][0] = 0


def edit(change):
    def damage(folder):
        head = json.loads((folder / "index.json").read_text())
        change(head)
        (folder / "index.json").write_text(json.dumps(head))

    return damage


def write(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def cut(name, size):
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - size)


ROW = "embed.table"
DAMAGE = {
    "index cut": cut("index.json", 10),
    "index empty": write("index.json", b""),
    "index of another kind": write("index.json", b"[1, 2]"),
    "index no text": write("index.json", b"\xff\xfe"),
    "index deep": write("index.json", b"[" * 100_000),
    "data cut": cut("data.bin", 1),
    "data empty": write("data.bin", b""),
    "data gone": lambda folder: (folder / "data.bin").unlink(),
    "index gone": lambda folder: (folder / "index.json").unlink(),
    "another format": edit(lambda h: h.update(format=0)),
    "arrays a list": edit(lambda h: h.update(arrays=[1])),
    "extra missing": edit(lambda h: h.pop("extra")),
    "unknown dtype": edit(lambda h: h["arrays"][ROW].__setitem__(0, "float7")),
    "dtype no dtype": edit(lambda h: h["arrays"][ROW].__setitem__(0, "finfo")),
    "shape too big": edit(lambda h: h["arrays"][ROW].__setitem__(1, [10**6, 3])),
    "shape negative": edit(lambda h: h["arrays"][ROW].__setitem__(1, [-11, 3])),
    "shape text": edit(lambda h: h["arrays"][ROW].__setitem__(1, "abc")),
    "offset past the end": edit(lambda h: h["arrays"][ROW].__setitem__(2, 10**9)),
    "offset negative": edit(lambda h: h["arrays"][ROW].__setitem__(2, -64)),
    "offset a float": edit(lambda h: h["arrays"][ROW].__setitem__(2, 0.5)),
    "row too short": edit(lambda h: h["arrays"].__setitem__(ROW, ["float32"])),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_nothing_and_one_warning(folder, warned, damage):
    DAMAGE[damage](folder)
    assert load_arrays(folder) is None
    assert len(warned) == 1
    assert str(folder) in warned[0]
    assert len(warned[0]) < 500


def test_no_folder_is_nothing_and_no_warning(tmp_path, warned):
    assert load_arrays(tmp_path / "none") is None
    assert not warned


def test_saving_again_replaces(folder):
    save_arrays(folder, [("a", np.ones(2, np.float32))], {})
    tree, extra = load_arrays(folder)
    assert (list(tree), extra) == (["a"], {})
    assert [p.name for p in folder.parent.iterdir()] == ["weights"]


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(errno.ENOSPC, "no space"), CapacityError),
        (OSError(errno.EIO, "broken"), OSError),
        (ValueError("a bad tensor"), ValueError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_failed_write_leaves_nothing(tmp_path, error, raised):
    def some():
        yield "a", np.ones(2000, np.float32)
        raise error

    with pytest.raises(raised):
        save_arrays(tmp_path / "weights", some(), {})
    assert not list(tmp_path.iterdir())


def test_arrays_are_taken_one_at_a_time(tmp_path):
    """Each array is on the disk before the next one is asked for."""
    sizes = []

    def some():
        for i in range(3):
            (part,) = tmp_path.iterdir()
            sizes.append((part / "data.bin").stat().st_size)
            yield str(i), np.full(100_000, i, np.float32)

    save_arrays(tmp_path / "weights", some(), {})
    assert sizes[0] == 0
    assert 390_000 < sizes[1] < sizes[2]
