"""Damaged headers: a reader opens or raises the house's errors, quickly and in little memory."""

import contextlib
import itertools
import json
import re
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import gguf.quants
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxllm.errors import UnsupportedError, WeightsError
from jaxllm.zoo.gguf import GGUFReader, open_gguf
from jaxllm.zoo.reader import Reader
from jaxllm.zoo.safetensors import open_safetensors

most_seconds, most_bytes = 2.0, 200_000_000
edges = (0, 1, 2, 255, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
json_values = ("-1", "1.5", "1e99", "true", "null", '"x"', "[]", "{}", "9" * 4000)
json_values += tuple(map(str, edges))
_names = itertools.count()

quick = settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("u32", 7)
    writer.add_uint64("u64", 9)
    writer.add_float32("f32", 0.5)
    writer.add_bool("flag", True)
    writer.add_array("tokens", ["a", "bc", "ü"])
    writer.add_array("types", [1, 2, 3])
    writer.add_array("flags", [True, False])
    writer.add_uint32("general.alignment", 32)
    kinds = gguf.GGMLQuantizationType
    rng = np.random.default_rng(0)
    for kind, nbytes in ((kinds.F32, 24), (kinds.F16, 8), (kinds.Q4_0, 36), (kinds.Q6_K, 210)):
        packed = rng.integers(0, 256, (2, nbytes), dtype=np.uint8)
        writer.add_tensor(f"{kind.name}.w", packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.fixture(scope="module")
def small_safetensors(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("safetensors") / "x.safetensors"
    arrays = {"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float16)}
    arrays |= {"c": np.ones((), np.int64), "d": np.ones((0, 2), np.uint8)}
    safetensors.numpy.save_file(arrays, path, metadata={"format": "pt"})
    return path.read_bytes()


def read_all(reader: Reader) -> None:
    for name, info in reader.tensors.items():
        with contextlib.suppress(UnsupportedError):
            assert reader.read(name).shape == info.shape
        if isinstance(reader, GGUFReader):
            assert reader.raw(name)[1].nbytes == info.nbytes


def hold(open_file: Callable[[Path], Reader], path: Path) -> bool:
    """Open and read everything; True if it opened. Any other outcome fails the test."""
    message = ""
    tracemalloc.start()
    begin = time.process_time()  # of a busy machine the wall clock says little
    try:
        read_all(open_file(path))
    except (WeightsError, UnsupportedError) as error:
        message = str(error)
    seconds = time.process_time() - begin
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < most_seconds
    assert peak < most_bytes
    assert not message or message.startswith(str(path))
    assert len(message) < 600
    assert "\n" not in message
    return not message


def hold_bytes(open_file: Callable[[Path], Reader], directory: Path, data: bytes) -> bool:
    path = directory / f"{next(_names)}.bin"  # a fresh file: older maps may still be alive
    path.write_bytes(data)
    try:
        return hold(open_file, path)
    finally:
        path.unlink()


def mutate(data: bytes, end: int, draw: Callable) -> bytes:
    """One to three edits at places before `end`: a byte, an integer, a cut, a copy, a removal."""
    raw = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, min(end, len(raw)) - 1)))
        edit = draw(st.sampled_from(("byte", "integer", "cut", "copy", "remove")))
        if edit == "byte":
            raw[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif edit == "integer":
            width = draw(st.sampled_from((4, 8)))
            value = draw(st.sampled_from(edges)) % 2 ** (8 * width)
            raw[at : at + width] = value.to_bytes(width, "little")
        elif edit == "cut":
            del raw[at:]
        elif edit == "copy":
            raw[at:at] = raw[at : at + draw(st.integers(1, 40))]
        else:
            del raw[at : at + draw(st.integers(1, 40))]
    return bytes(raw)


def test_the_small_files_are_valid(tmp_path: Path, small_gguf, small_safetensors):
    assert hold_bytes(open_gguf, tmp_path, small_gguf)
    assert hold_bytes(open_safetensors, tmp_path, small_safetensors)


@quick
@given(data=st.data())
def test_mutated_gguf(tmp_path: Path, small_gguf: bytes, data: st.DataObject):
    end = small_gguf.rindex(b"Q6_K.w") + 60
    hold_bytes(open_gguf, tmp_path, mutate(small_gguf, end, data.draw))


def test_every_integer_of_gguf(tmp_path: Path, small_gguf: bytes):
    """Edge values at each byte of the header, two at a byte in turn."""
    end = small_gguf.rindex(b"Q6_K.w") + 40
    opened = 0
    turns = itertools.cycle(edges)  # 11 values: every value comes to every byte's neighbourhood
    for at, value in ((at, next(turns)) for at in range(end) for _ in range(2)):
        width = 4 if value < 2**32 and at % 2 else 8
        data = small_gguf[:at] + value.to_bytes(width, "little") + small_gguf[at + width :]
        opened += hold_bytes(open_gguf, tmp_path, data)
    assert 0 < opened < end


@quick
@given(data=st.data())
def test_mutated_safetensors(tmp_path: Path, small_safetensors: bytes, data: st.DataObject):
    (length,) = struct.unpack_from("<Q", small_safetensors)
    hold_bytes(open_safetensors, tmp_path, mutate(small_safetensors, 8 + length, data.draw))


@quick
@given(data=st.data())
def test_mutated_json_of_safetensors(tmp_path: Path, small_safetensors: bytes, data: st.DataObject):
    """Edits that keep the length field right, so that they reach the checks behind it."""
    (length,) = struct.unpack_from("<Q", small_safetensors)
    header, rest = small_safetensors[8 : 8 + length], small_safetensors[8 + length :]
    for _ in range(data.draw(st.integers(1, 2))):
        places = list(re.finditer(rb"\d+|\"[^\"]*\"|\[[^\[\]]*\]", header))
        place = data.draw(st.sampled_from(places)) if places else None
        if place is None or data.draw(st.integers(0, 3)) == 0:
            header = mutate(header, len(header), data.draw)
        else:
            value = data.draw(st.sampled_from(json_values)).encode()
            header = header[: place.start()] + value + header[place.end() :]
    hold_bytes(open_safetensors, tmp_path, struct.pack("<Q", len(header)) + header + rest)


@quick
@given(data=st.data())
def test_mutated_index_of_safetensors(
    tmp_path: Path, small_safetensors: bytes, data: st.DataObject
):
    (tmp_path / "1.safetensors").write_bytes(small_safetensors)
    index = {"metadata": {"total_size": 80}, "weight_map": dict.fromkeys("abcd", "1.safetensors")}
    text = json.dumps(index).encode()
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(mutate(text, len(text), data.draw))
    hold(open_safetensors, tmp_path)
