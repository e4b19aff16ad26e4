"""The walk over GGUF headers: handmade files, every fault, and numbers far beyond the file."""

import os
import re
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxllm.errors import UnsupportedError, WeightsError
from jaxllm.zoo.gguf import open_gguf


def pack(kind: str, *values: Any) -> bytes:
    return struct.pack("<" + kind, *values)


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return pack("Q", len(raw)) + raw


def head(tensors: int, pairs: int, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + pack("IQQ", version, tensors, pairs) + rest


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + pack("I", kind) + value


def array(kind: int, count: int, values: bytes = b"") -> bytes:
    return pack("IQ", kind, count) + values


def info(name: str, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + pack(f"I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def padded(header: bytes, data: bytes, alignment: int = 32) -> bytes:
    return header + b"\0" * (-len(header) % alignment) + data


def nested(depth: int) -> bytes:
    return array(9, 1) * (depth - 1) + array(0, 2, b"\1\2")


def test_handmade_files(tmp_path: Path):
    path = tmp_path / "x.gguf"
    a, b = np.arange(6, dtype="<f4"), np.arange(1, dtype="<f4")
    pairs = pair("nest", 9, nested(4)) + pair("general.alignment", 4, pack("I", 64))
    infos = info("a", (3, 2), 0, 0) + info("b", (), 0, 64) + info("e", (4, 0), 0, 64)
    data = a.tobytes().ljust(64, b"\0") + b.tobytes()
    for version in (2, 3):
        path.write_bytes(padded(head(3, 2, pairs + infos, version), data, 64))
        reader = open_gguf(path)
        assert reader.metadata["nest"] == [[[[1, 2]]]]
        np.testing.assert_array_equal(reader.read("a"), a.reshape(2, 3))
        assert reader.read("b").shape == ()
        assert reader.read("e").shape == (0, 4)
        assert reader.raw("a")[1].shape == (2, 12)
        assert reader.raw("b")[1].shape == (4,)
    path.write_bytes(head(0, 0))
    assert not open_gguf(path).tensors


huge = (2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)
one_kv = pair("k", 0, b"\1")
four = b"\0" * 32
faults: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "has 0 bytes; a GGUF header takes at least 24"),
    "short": (b"GGUF" + b"\0" * 19, "has 23 bytes"),
    "magic": (b"GGML" + b"\0" * 40, "begins with b'GGML'"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
    "kv-count": (head(0, 2, one_kv), "truncated or damaged"),
    "key-utf8": (head(0, 1, pair(b"\xff", 0, b"\1")), "a key: the string at byte 24 is not UTF-8"),
    "key-twice": (head(0, 2, one_kv * 2), "the key 'k' stands twice"),
    "value-kind": (head(0, 1, pair("k", 13, b"\1")), "'k' has value type 13; known are 0 to 12"),
    "bool": (head(0, 1, pair("k", 7, b"\2")), "'k' has a boolean that is neither 0 nor 1"),
    "bools": (head(0, 1, pair("k", 9, array(7, 3, b"\0\1\2"))), "neither 0 nor 1"),
    "text-utf8": (
        head(0, 1, pair("k", 8, text(b"\xc3"))),
        "'k': the string at byte 37 is not UTF-8",
    ),
    "array-kind": (head(0, 1, pair("k", 9, array(99, 1, b"\1"))), "array of value type 99"),
    "nesting": (head(0, 1, pair("k", 9, nested(5))), "5 deep"),
    "deep": (head(0, 1, pair("k", 9, nested(10**5))), "4 deep"),
    "dims": (head(1, 0, info("t", (1,) * 5, 0, 0)), "'t' has 5 dimensions; allowed are at most 4"),
    "type": (head(1, 0, info("t", (1,), 4, 0)), "'t' has type number 4; known: 0, 1"),
    "block": (head(1, 0, info("t", (48,), 8, 0)), "rows of Q8_0 must be a multiple of 32"),
    "block-0d": (head(1, 0, info("t", (), 8, 0)), "must be a multiple of 32"),
    "too-large": (head(1, 0, info("t", (2**40, 2**40), 0, 0)), "larger than any array"),
    "zero-huge": (head(1, 0, info("t", (2**62, 0), 0, 0)), "larger than any array"),
    "outside": (padded(head(1, 0, info("t", (9,), 0, 0)), four), "'t' takes 36 bytes at offset 0"),
    "offset": (padded(head(1, 0, info("t", (1,), 0, 8)), four), "'t' has offset 8; allowed: mult"),
    "offset-far": (padded(head(1, 0, info("t", (1,), 0, 2**63)), four), "only 32 bytes follow"),
    "twice": (padded(head(2, 0, info("t", (1,), 0, 0) * 2), four), "'t' stands twice"),
    "overlap": (
        padded(head(2, 0, info("t", (8,), 0, 0) + info("u", (1,), 0, 0)), four),
        "tensors 'u' and 't' overlap",
    ),
}
for _value in (0, 3, 48, 2**32 - 1):
    faults[f"alignment-{_value}"] = (
        head(0, 1, pair("general.alignment", 4, pack("I", _value))),
        f"alignment is {_value} of value type 4; allowed is a power of two",
    )
faults["alignment-kind"] = (head(0, 1, pair("general.alignment", 8, text("32"))), "value type 8")
for _n in huge:
    faults[f"tensors-{_n}"] = (head(_n, 0), f"a header of {_n} tensors")
    faults[f"pairs-{_n}"] = (head(0, _n, one_kv), f"{_n} key/values needs")
    faults[f"key-{_n}"] = (head(0, 1, pack("Q", _n) + b"k" * 9), "a key: a string needs")
    faults[f"text-{_n}"] = (head(0, 1, pair("k", 8, pack("Q", _n) + b"k")), "'k': a string needs")
    for _kind in range(13):
        faults[f"array-{_kind}-{_n}"] = (
            head(0, 1, pair("k", 9, array(_kind, _n, b"\0" * 99))),
            f"'k': an array of {_n} values needs",
        )
    faults[f"texts-{_n}"] = (
        head(0, 1, pair("k", 9, array(8, 2, text("a") + pack("Q", _n)))),
        "'k': a string needs",
    )
    faults[f"dims-{_n}"] = (head(1, 0, text("t") + pack("I", min(_n, 2**32 - 1)) + four), "dimensi")


@pytest.mark.parametrize("fault", faults)
def test_faults(tmp_path: Path, fault: str):
    data, message = faults[fault]
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    begin = time.perf_counter()
    with pytest.raises(WeightsError, match=re.escape(message)) as e:
        open_gguf(path)
    seconds = time.perf_counter() - begin
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert str(e.value).startswith(str(path))
    assert len(str(e.value)) < 500
    assert seconds < 20  # no hang
    assert peak < 5_000_000


def test_a_huge_file_does_not_excuse_a_huge_count(tmp_path: Path):
    """Against a sparse file of 8 GB the bytes that remain bound nothing; the header's cap does."""
    path = tmp_path / "x.gguf"
    for data in (head(2**27, 0), head(0, 1, pair("k", 9, array(0, 2**32)))):
        path.write_bytes(data)
        os.truncate(path, 8 * 2**30)
        with pytest.raises(WeightsError, match="the header can take only 9999"):
            open_gguf(path)


@pytest.mark.parametrize("version", [0, 1, 4, 3 << 24])
def test_other_versions(tmp_path: Path, version: int):
    (tmp_path / "x.gguf").write_bytes(head(0, 0, version=version))
    with pytest.raises(UnsupportedError, match="supported: versions 2 and 3, little-endian"):
        open_gguf(tmp_path / "x.gguf")
