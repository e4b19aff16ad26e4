"""Safetensors in and out: our writer against the `safetensors` package, our checks by faults."""

import errno
import gc
import json
import os
import struct
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from jaxllm.errors import CapacityError, ConfigError, ShapeError, UnsupportedError, WeightsError
from jaxllm.zoo import safetensors as ours
from jaxllm.zoo.reader import Reader, TensorInfo

index_name = "model.safetensors.index.json"


def draw(dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(7)
    nbytes = int(np.prod(shape)) * dtype.itemsize
    raw = rng.integers(0, 2 if dtype.kind == "b" else 256, nbytes, dtype=np.uint8)
    return raw.view(dtype).reshape(shape)


def sources(arrays: dict[str, np.ndarray]) -> list[ours.TensorSource]:
    return [(name, ours.array_info(a), lambda a=a: a) for name, a in arrays.items()]


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def raw_file(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def f32(begin: int, end: int, **changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [(end - begin) // 4], "data_offsets": [begin, end]} | changes


def every_dtype() -> dict[str, np.ndarray]:
    arrays = {name: draw(dtype, (3, 5)) for name, dtype in ours.numpy_dtypes.items()}
    return arrays | {"scalar": np.array(3, np.float32), "empty": np.zeros((0, 4), np.float16)}


def test_reads_what_the_package_wrote(tmp_path: Path):
    arrays = {"w": draw(np.dtype("f4"), (4, 6)), "i": draw(np.dtype("i8"), (3,))}
    arrays |= {"empty": np.zeros((2, 0), np.float32), "b": np.array([True, False])}
    safetensors.numpy.save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "pt"})
    reader = ours.open_safetensors(tmp_path / "x.safetensors")
    assert isinstance(reader, Reader)
    assert reader.metadata == {"format": "pt"}
    assert reader.files == (tmp_path / "x.safetensors",)
    assert set(reader.tensors) == set(arrays)
    assert reader.tensors["w"] == TensorInfo((4, 6), "F32", 96)
    for name, array in arrays.items():
        assert same(reader.read(name), array)
        assert not reader.read(name).flags.writeable


def test_package_reads_what_we_wrote(tmp_path: Path):
    arrays = every_dtype()
    (path,) = ours.write_safetensors(tmp_path / "new", sources(arrays), metadata={"a": "ü"})
    assert path == tmp_path / "new" / "model.safetensors"
    for name, entry in safetensors.deserialize(path.read_bytes()):
        assert entry["dtype"] == ours.array_info(arrays[name]).dtype
        assert tuple(entry["shape"]) == arrays[name].shape
        assert bytes(entry["data"]) == arrays[name].tobytes()
    with safetensors.safe_open(path, "np") as file:
        assert set(file.keys()) == set(arrays)
        assert file.metadata() == {"a": "ü"}
    reader = ours.open_safetensors(tmp_path / "new")
    for name, array in arrays.items():
        assert same(reader.read(name), array), name
        assert reader.read(name).flags.aligned


def test_no_tensors_and_strides(tmp_path: Path):
    ours.write_safetensors(tmp_path / "none", [])
    assert safetensors.numpy.load_file(tmp_path / "none" / "model.safetensors") == {}
    assert not ours.open_safetensors(tmp_path / "none").tensors
    w = draw(np.dtype("i4"), (6, 4))
    ours.write_safetensors(tmp_path, sources({"t": w.T, "big": w.astype(">i4")}))
    reader = ours.open_safetensors(tmp_path)
    assert same(reader.read("t"), np.ascontiguousarray(w.T))
    assert same(reader.read("big"), w)


def test_shards(tmp_path: Path):
    arrays = {f"w{i}": draw(np.dtype("f4"), (i + 1, 8)) for i in range(6)}
    entries = sources(arrays)
    files = ours.write_safetensors(tmp_path, entries, metadata={"k": "v"}, max_shard_bytes=200)
    names = [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    assert [path.name for path in files] == [*names, index_name]
    assert sorted(os.listdir(tmp_path)) == sorted([*names, index_name])
    index = json.loads((tmp_path / index_name).read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in arrays.values())
    for name, array in arrays.items():
        shard = safetensors.numpy.load_file(tmp_path / index["weight_map"][name])
        assert same(shard[name], array)
    reader = ours.open_safetensors(tmp_path)
    assert reader.metadata == {"k": "v"}
    assert len(reader.files) == 4
    assert list(reader.tensors) == list(arrays)
    assert all(same(reader.read(name), array) for name, array in arrays.items())


def test_an_unknown_name_gets_the_nearest(tmp_path: Path):
    ours.write_safetensors(tmp_path, sources({"layers.0.up": np.zeros(2, np.float32)}))
    with pytest.raises(WeightsError, match=r"no tensor 'layers\.0\.uo'; nearest: 'layers\.0\.up'"):
        ours.open_safetensors(tmp_path).read("layers.0.uo")


def test_a_changed_file_is_refused(tmp_path: Path):
    ours.write_safetensors(tmp_path, sources({"w": np.zeros(1000, np.float32)}))
    reader = ours.open_safetensors(tmp_path)
    held = reader.read("w")
    ours.write_safetensors(tmp_path, sources({"w": np.ones(10, np.float32)}))
    with pytest.raises(WeightsError, match="was changed after it was opened"):
        reader.read("w")
    assert held.sum() == 0  # the old file lives as long as its map


def test_streaming_holds_one_tensor(tmp_path: Path):
    size = 4_000_000
    infos = [(f"w{i}", TensorInfo((size // 4,), "F32", size)) for i in range(8)]
    entries = [(n, info, lambda: np.ones(size // 4, np.float32)) for n, info in infos]
    gc.collect()
    tracemalloc.start()
    ours.write_safetensors(tmp_path, entries, max_shard_bytes=2 * size)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    reader = ours.open_safetensors(tmp_path)
    assert all(reader.read(name).sum() == size // 4 for name, _ in infos)
    _, mapped_peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.3 * size
    assert mapped_peak - before < 0.2 * size


def broken_source() -> np.ndarray:
    raise RuntimeError("the source failed")


@pytest.mark.parametrize("shard_bytes", [10**9, 100])
def test_failure_leaves_nothing(tmp_path: Path, monkeypatch, shard_bytes: int):
    good = sources({"a": np.ones(20, np.float32), "b": np.ones(20, np.float32)})
    ones = TensorInfo((20,), "F32", 80)
    ours.write_safetensors(tmp_path / "old", good)
    before = (tmp_path / "old" / "model.safetensors").read_bytes()
    for directory in (tmp_path / "new", tmp_path / "old"):
        if directory.name == "old" and shard_bytes < 1000:
            continue
        kept = ["model.safetensors"] if directory.name == "old" else []
        with pytest.raises(RuntimeError, match="the source failed"):
            entries = [*good, ("c", ones, broken_source)]
            ours.write_safetensors(directory, entries, max_shard_bytes=shard_bytes)
        with pytest.raises(ShapeError, match="'c': got float64"):
            entries = [*good, ("c", ones, lambda: np.ones(20))]
            ours.write_safetensors(directory, entries, max_shard_bytes=shard_bytes)
        assert os.listdir(directory) == kept

        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        for broken in ("fsync", "replace"):
            with monkeypatch.context() as patch:
                patch.setattr(os, broken, lambda *_: full(0))
                with pytest.raises(CapacityError, match=f"{directory}.*No space left"):
                    ours.write_safetensors(directory, good, max_shard_bytes=shard_bytes)
            assert os.listdir(directory) == kept
    assert (tmp_path / "old" / "model.safetensors").read_bytes() == before


def test_a_second_layout_is_refused(tmp_path: Path):
    entries = sources({"a": np.ones(20, np.float32), "b": np.ones(20, np.float32)})
    ours.write_safetensors(tmp_path, entries)
    ours.write_safetensors(tmp_path, entries)  # one file replaces one file
    with pytest.raises(ConfigError, match="already holds a checkpoint"):
        ours.write_safetensors(tmp_path, entries, max_shard_bytes=100)
    ours.write_safetensors(tmp_path / "s", entries, max_shard_bytes=100)
    for shard_bytes in (100, 10**9):
        with pytest.raises(ConfigError, match="already holds a checkpoint"):
            ours.write_safetensors(tmp_path / "s", entries, max_shard_bytes=shard_bytes)


def test_bad_arguments_of_write(tmp_path: Path):
    one = sources({"a": np.ones(2, np.float32)})
    make = one[0][2]
    with pytest.raises(ConfigError, match="given twice"):
        ours.write_safetensors(tmp_path, one * 2)
    with pytest.raises(ConfigError, match="reserved"):
        ours.write_safetensors(tmp_path, [("__metadata__", one[0][1], make)])
    with pytest.raises(ConfigError, match="max_shard_bytes is 0"):
        ours.write_safetensors(tmp_path, one, max_shard_bytes=0)
    with pytest.raises(ConfigError, match="text to text"):
        ours.write_safetensors(tmp_path, one, metadata={"a": 1})
    with pytest.raises(UnsupportedError, match="has dtype 'F4'; supported: BOOL"):
        ours.write_safetensors(tmp_path, [("a", TensorInfo((2,), "F4", 1), make)])
    with pytest.raises(ShapeError, match="nbytes does not fit"):
        ours.write_safetensors(tmp_path, [("a", TensorInfo((2,), "F32", 9), make)])
    with pytest.raises(UnsupportedError, match="dtype int4 cannot be stored"):
        ours.array_info(np.zeros(2, ml_dtypes.int4))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        ours.write_safetensors(tmp_path / "file", one)
    assert os.listdir(tmp_path) == ["file"]


def test_four_bit_floats_are_known_but_not_read(tmp_path: Path):
    entry = {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}
    reader = ours.open_safetensors(raw_file(tmp_path / "x", {"w": entry}, b"ab"))
    assert reader.tensors["w"] == TensorInfo((4,), "F4", 2)
    with pytest.raises(UnsupportedError, match="'w' has dtype F4"):
        reader.read("w")


big = 2**62
faults: dict[str, tuple[object, bytes, str]] = {
    "not-json": (b'{"a": ', b"", "not JSON"),
    "not-utf8": (b'{"\xff": 1}', b"", "not JSON in UTF-8"),
    "no-object": (b"[1, 2]", b"", r"begins with b'\['"),
    "deep": (b'{"a": ' + b"[" * 100_000, b"", "not JSON"),
    "twice": (b'{"a": {}, "a": {}}', b"", "'a' stands twice"),
    "nan": (b'{"a": NaN}', b"", "NaN is no number"),
    "long-integer": (b'{"a": ' + b"9" * 5000 + b"}", b"", "not JSON"),
    "metadata": ({"__metadata__": {"a": 1}}, b"", "__metadata__ must map text to text"),
    "no-entry": ({"a": 3}, b"", "'a': needs dtype, shape and data_offsets"),
    "no-shape": ({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, b"1234", "'a': needs dtype"),
    "dtype": ({"a": f32(0, 4, dtype="F33")}, b"1234", "dtype 'F33'; known: BOOL"),
    "dtype-kind": ({"a": f32(0, 4, dtype=["F32"])}, b"1234", "has dtype"),
    "shape": ({"a": f32(0, 4, shape=[-1])}, b"1234", r"'a': has shape \[-1\]"),
    "shape-kind": ({"a": f32(0, 4, shape=[True])}, b"1234", r"shape \[True\]"),
    "shape-dims": ({"a": f32(0, 4, shape=[1] * 33)}, b"1234", "at most 32"),
    "shape-size": ({"a": f32(0, 4, shape=[2])}, b"1234", r"F32 of shape \[2\] does not fill the 4"),
    "shape-huge": ({"a": f32(0, 4, shape=[big, 4, 0])}, b"1234", "does not fill"),
    "shape-zero": ({"a": f32(0, 0, shape=[big, big, 0])}, b"", "does not fill"),
    "odd-bits": ({"a": f32(0, 1, dtype="F4", shape=[3])}, b"1", "F4 of shape"),
    "offsets": ({"a": f32(4, 0, shape=[0])}, b"1234", r"\[4, 0\]; allowed is \[begin, end\]"),
    "outside": ({"a": f32(0, 8)}, b"1234", "0 <= begin <= end <= 4"),
    "outside-huge": ({"a": f32(big, big + 4)}, b"1234", "data_offsets"),
    "three": ({"a": f32(0, 4, data_offsets=[0, 4, 4])}, b"1234", "data_offsets"),
    "overlap": ({"a": f32(0, 8), "b": f32(4, 12)}, b"1" * 12, "'b' begins at byte 4 and overlaps"),
    "hole": ({"a": f32(0, 4), "b": f32(8, 12)}, b"1" * 12, "leaves a hole after 'a'"),
    "trailing": ({"a": f32(0, 4)}, b"1" * 5, "cover 4 of the 5 bytes"),
    "long-name": ({"a" * 10**6: 3}, b"", "'aaa"),
}


@pytest.mark.parametrize("fault", faults)
def test_faults_of_the_header(tmp_path: Path, fault: str):
    header, data, message = faults[fault]
    path = raw_file(tmp_path / "x.safetensors", header, data)
    with pytest.raises(WeightsError, match=message) as raised:
        ours.open_safetensors(path)
    assert str(raised.value).startswith(str(path))
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize("length", [0, 1, 9, 2**31, 2**62, 2**63, 2**64 - 1])
def test_faults_of_the_length(tmp_path: Path, length: int):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}      ")
    with pytest.raises(WeightsError, match=f"x.safetensors: the header's length is {length}"):
        ours.open_safetensors(path)


def test_header_cap(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 100_000_001) + b"{")
    os.truncate(path, 300_000_000)  # sparse
    with pytest.raises(WeightsError, match="allowed are 2 to 100000000"):
        ours.open_safetensors(path)


def test_wrong_files(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    for missing in (path, tmp_path / "a\0b", tmp_path / ("n" * 300)):
        with pytest.raises(WeightsError, match="cannot be read"):
            ours.open_safetensors(missing)
    for size in (0, 7):
        path.write_bytes(b"1" * size)
        with pytest.raises(WeightsError, match=f"has {size} bytes"):
            ours.open_safetensors(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    with pytest.raises(WeightsError, match="Git LFS pointer"):
        ours.open_safetensors(path)
    with pytest.raises(WeightsError, match=r"holds neither .*found \['x\.safetensors'\]"):
        ours.open_safetensors(tmp_path)
    with pytest.raises(WeightsError, match="not a regular file"):
        ours.open_safetensors("/dev/null")


def index_fault(tmp_path: Path, index: object, message: str):
    text = index if isinstance(index, str) else json.dumps(index)
    (tmp_path / index_name).write_text(text)
    with pytest.raises(WeightsError, match=message) as raised:
        ours.open_safetensors(tmp_path)
    assert str(tmp_path) in str(raised.value)


def test_faults_of_the_index(tmp_path: Path):
    raw_file(tmp_path / "1.safetensors", {"a": f32(0, 4)}, b"1234")
    raw_file(tmp_path / "2.safetensors", {"b": f32(0, 4)}, b"1234")
    one, two = "1.safetensors", "2.safetensors"
    for outside in ("../1.safetensors", "/1.safetensors", "s/../../x", "", "..\\x", "a\0"):
        index_fault(tmp_path, {"weight_map": {"a": outside}}, "inside the directory")
    index_fault(tmp_path, "", "has 0 bytes")
    index_fault(tmp_path, "[]", "must be a JSON object")
    index_fault(tmp_path, '{"weight_map": {"a": "1", "a": "2"}}', "'a' stands twice")
    index_fault(tmp_path, {"weight_map": {}}, "weight_map must map")
    index_fault(tmp_path, {"weight_map": {"a": 1}}, "weight_map must map")
    index_fault(tmp_path, {"weight_map": {"a": one, "b": "3.safetensors"}}, "3.*cannot be read")
    wrong = {"weight_map": {"a": one, "b": two, "c": two}}
    index_fault(tmp_path, wrong, "'c' is in no shard, but the index says 2")
    index_fault(tmp_path, {"weight_map": {"a": two, "b": two}}, "the index says 2")
    raw_file(tmp_path / two, {"b": f32(0, 4), "d": f32(4, 8)}, b"1" * 8)
    index_fault(tmp_path, {"weight_map": {"a": one, "b": two}}, "'d' is in 2.*says no shard")
    raw_file(tmp_path / two, {"b": f32(0, 4), "a": f32(4, 8)}, b"1" * 8)
    index_fault(tmp_path, {"weight_map": {"a": one, "b": two}}, "stands in 1.* and in 2")


def test_links_into_a_blob_store(tmp_path: Path):
    """The hub's cache links its snapshots to blobs outside the directory: that is allowed."""
    ours.write_safetensors(tmp_path / "blobs", sources({"a": np.ones(2, np.float32)}))
    (tmp_path / "snapshot").mkdir()
    link = tmp_path / "snapshot" / "model.safetensors"
    link.symlink_to("../blobs/model.safetensors")
    assert ours.open_safetensors(tmp_path / "snapshot").read("a").sum() == 2
