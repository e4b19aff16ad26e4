"""GGUF: the reader against the `gguf` package's writer, dequantising against the formats."""

import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import gguf.quants
import ml_dtypes
import numpy as np
import pytest

from jaxllm.core.qarray import dequantize_rows
from jaxllm.errors import UnsupportedError, WeightsError
from jaxllm.zoo.gguf import block_sizes, open_gguf, readable_types
from jaxllm.zoo.reader import Reader, TensorInfo

kinds = gguf.GGMLQuantizationType


def write(path: Path, tensors: dict[str, tuple[np.ndarray, str]], fill: Callable = lambda _: None):
    writer = gguf.GGUFWriter(path, "llama")
    fill(writer)
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=kinds[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_blocks(kind: str, rows: int, blocks: int) -> np.ndarray:
    """Random bytes whose float16 and bfloat16 fields are finite and of moderate size."""
    rng = np.random.default_rng(3)
    nbytes = block_sizes[kind][1]
    packed = rng.integers(0, 256, (rows * blocks, nbytes), dtype=np.uint8)
    places = {"Q6_K": [208], "Q4_1": [0, 2], "Q5_1": [0, 2], "Q4_K": [0, 2], "Q5_K": [0, 2]}
    for place in places.get(kind, [0]):
        scale = rng.normal(0, 0.1, (rows * blocks, 1))
        dtype = ml_dtypes.bfloat16 if kind == "BF16" else np.float16
        packed[:, place : place + 2] = scale.astype(dtype).view(np.uint8)
    return packed.reshape(rows, blocks * nbytes)


def half(block: bytes, at: int) -> float:
    return struct.unpack_from("<e", block, at)[0]


def nibbles(block: bytes) -> list[int]:
    """First the low halves of all bytes, then the high halves."""
    return [byte & 15 for byte in block] + [byte >> 4 for byte in block]


def five_bits(high: bytes, low: bytes) -> list[int]:
    word = int.from_bytes(high, "little")
    return [q | (word >> j & 1) << 4 for j, q in enumerate(nibbles(low))]


def k_scales(packed: bytes) -> list[tuple[int, int]]:
    """Eight 6-bit scales and minima in 12 bytes."""
    pairs = [(packed[j] & 63, packed[j + 4] & 63) for j in range(4)]
    for j in range(4):
        top, low = packed[j], packed[j + 8]
        pairs.append((low & 15 | top >> 6 << 4, low >> 4 | packed[j + 4] >> 6 << 4))
    return pairs


def q4_k(block: bytes) -> Iterator[float]:
    for i, (scale, least) in enumerate(k_scales(block[4:16])):
        chunk = block[16 + i // 2 * 32 :][:32]
        codes = nibbles(chunk)[32 * (i % 2) :][:32]
        yield from (half(block, 0) * scale * q - half(block, 2) * least for q in codes)


def q5_k(block: bytes) -> Iterator[float]:
    high = block[16:48]
    for i, (scale, least) in enumerate(k_scales(block[4:16])):
        codes = nibbles(block[48 + i // 2 * 32 :][:32])[32 * (i % 2) :][:32]
        codes = [q + 16 * (high[j] >> i & 1) for j, q in enumerate(codes)]
        yield from (half(block, 0) * scale * q - half(block, 2) * least for q in codes)


def q6_k(block: bytes) -> Iterator[float]:
    low, high, scales = block[:128], block[128:192], struct.unpack("<16b", block[192:208])
    for i in range(256):
        part, quarter, j = i // 128, i % 128 // 32, i % 32
        byte = low[part * 64 + quarter % 2 * 32 + j]
        q = (byte >> 4 if quarter >= 2 else byte & 15) | (
            high[part * 32 + j] >> 2 * quarter & 3
        ) << 4
        yield half(block, 208) * scales[i // 16] * (q - 32)


formats: dict[str, Callable[[bytes], Any]] = {
    "F32": lambda b: struct.unpack("<f", b),
    "F16": lambda b: struct.unpack("<e", b),
    "BF16": lambda b: struct.unpack("<f", b"\0\0" + b),
    "Q8_0": lambda b: [half(b, 0) * q for q in struct.unpack("<32b", b[2:])],
    "Q4_0": lambda b: [half(b, 0) * (q - 8) for q in nibbles(b[2:])],
    "Q4_1": lambda b: [half(b, 0) * q + half(b, 2) for q in nibbles(b[4:])],
    "Q5_0": lambda b: [half(b, 0) * (q - 16) for q in five_bits(b[2:6], b[6:])],
    "Q5_1": lambda b: [half(b, 0) * q + half(b, 2) for q in five_bits(b[4:8], b[8:])],
    "Q4_K": q4_k,
    "Q5_K": q5_k,
    "Q6_K": q6_k,
}


def test_block_sizes_are_the_packages():
    theirs = {kind.name: tuple(sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert dict(block_sizes) == theirs
    assert set(readable_types) == set(formats)


@pytest.mark.parametrize("kind", formats)
def test_values_against_the_format(tmp_path: Path, kind: str):
    packed = random_blocks(kind, 3, 5) if kind != "F32" else np.arange(60, dtype=np.uint8)
    if kind == "F32":
        packed = np.linspace(-2, 2, 15, dtype=np.float32).view(np.uint8).reshape(3, 20)
    reader = open_gguf(write(tmp_path / "x.gguf", {"w": (packed, kind)}))
    elements, nbytes = block_sizes[kind]
    assert reader.tensors == {"w": TensorInfo((3, 5 * elements), kind, packed.nbytes)}
    values = reader.read("w")
    blocks = packed.reshape(-1, nbytes)
    expected = np.array([list(formats[kind](block.tobytes())) for block in blocks])
    own = {"F16": np.float16, "BF16": ml_dtypes.bfloat16}
    assert values.dtype == own.get(kind, np.float32)
    assert values.shape == (3, 5 * elements)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(
        values.astype(np.float64), expected.reshape(values.shape), rtol=1e-6, atol=1e-6 * scale
    )
    name, raw = reader.raw("w")
    assert name == kind
    assert raw.dtype == np.uint8
    np.testing.assert_array_equal(raw, packed)
    assert not raw.flags.writeable


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_roundtrip_through_the_package(tmp_path: Path, kind: str):
    values = np.random.default_rng(0).normal(0, 1, (6, 2, 96)).astype(np.float32)
    packed = gguf.quants.quantize(values, kinds[kind])
    got = open_gguf(write(tmp_path / "x.gguf", {"w": (packed, kind)})).read("w")
    assert got.shape == values.shape
    span = np.ptp(values.reshape(-1, 32), axis=-1).max()
    levels = {"F16": 2**11, "BF16": 2**8, "Q8_0": 127, "Q5_0": 31, "Q5_1": 31}.get(kind, 15)
    bound = 1.1 * span / levels
    assert np.abs(got.astype(np.float32) - values).max() < bound


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_packed_leaves_are_the_same_numbers(tmp_path: Path, kind: str):
    """What the package makes of the blocks, in 4.5, 5 and 8.5 bits a value."""
    packed = random_blocks(kind, 6, 4)
    reader = open_gguf(write(tmp_path / "x.gguf", {"w": (packed, kind)}))
    leaf = reader.leaf("w")
    assert leaf is not None
    expected = gguf.quants.dequantize(packed, kinds[kind])
    found = np.asarray(dequantize_rows(leaf))
    finite = np.isfinite(expected)
    # Q4_1 has a product and a sum, which a compiler may round once.
    near = 1e-6 * np.abs(expected[finite]).max() if kind == "Q4_1" else 0
    np.testing.assert_allclose(found[finite], expected[finite], rtol=0, atol=near)
    assert finite.mean() > 0.9
    assert leaf.nbytes * 8 / expected.size == {"Q4_0": 4.5, "Q4_1": 5.0, "Q8_0": 8.5}[kind]


def test_other_types_have_no_packed_leaf(tmp_path: Path):
    packed = random_blocks("Q6_K", 2, 1)
    assert open_gguf(write(tmp_path / "x.gguf", {"w": (packed, "Q6_K")})).leaf("w") is None


def test_many_chunks_equal_one(tmp_path: Path):
    packed = random_blocks("Q4_1", 700, 20)  # 448000 values: three chunks and a rest
    got = open_gguf(write(tmp_path / "x.gguf", {"w": (packed, "Q4_1")})).read("w")
    np.testing.assert_array_equal(got, gguf.quants.dequantize(packed, kinds.Q4_1))


def test_metadata(tmp_path: Path):
    pairs: dict[str, Any] = {"u8": 200, "i8": -3, "u16": 60000, "i16": -5, "u32": 2**31, "i32": -7}
    pairs |= {"u64": 2**63, "i64": -(2**40), "f64": 0.1, "text": "grüße\n", "no": False}
    pairs |= {"ints": [1, -2, 3], "texts": ["a", "", "ü"], "bools": [True, False]}

    def fill(w: gguf.GGUFWriter):
        for name, add in {"u8": w.add_uint8, "i8": w.add_int8, "u16": w.add_uint16}.items():
            add(name, pairs[name])
        for name, add in {"i16": w.add_int16, "u32": w.add_uint32, "i32": w.add_int32}.items():
            add(name, pairs[name])
        for name, add in {"u64": w.add_uint64, "i64": w.add_int64, "f64": w.add_float64}.items():
            add(name, pairs[name])
        w.add_string("text", pairs["text"])
        w.add_bool("no", pairs["no"])
        for name in ("ints", "texts", "bools"):
            w.add_array(name, pairs[name])

    path = write(tmp_path / "x.gguf", {"a": (np.ones((2, 3), np.float32), "F32")}, fill)
    reader = open_gguf(path)
    assert isinstance(reader, Reader)
    assert reader.metadata == {"general.architecture": "llama"} | pairs
    assert [type(v) for v in reader.metadata["bools"]] == [bool, bool]
    assert reader.files == (path,)
    with pytest.raises(WeightsError, match="no tensor 'b'"):
        reader.read("b")


def test_every_truncation_is_refused(tmp_path: Path):
    tensors = {
        "a": (np.ones((2, 3), np.float32), "F32"),
        "b": (random_blocks("Q8_0", 2, 1), "Q8_0"),
    }
    path = write(tmp_path / "x.gguf", tensors, lambda w: w.add_array("t", ["a", "bc"]))
    whole = path.read_bytes()
    end = len(whole) - -2 * 34 % 32  # the padding after the last tensor may go
    for length in range(end):
        path.write_bytes(whole[:length])
        with pytest.raises(WeightsError, match=re.escape(str(path))):
            open_gguf(path)


def test_other_types_open_but_are_not_read(tmp_path: Path):
    packed = np.zeros((2, 84), np.uint8)
    reader = open_gguf(write(tmp_path / "x.gguf", {"w": (packed, "Q2_K")}))
    assert reader.tensors["w"] == TensorInfo((2, 256), "Q2_K", 168)
    with pytest.raises(
        UnsupportedError, match=r"'w' has type Q2_K.*supported: F32, F16, BF16, Q8_0"
    ):
        reader.read("w")
    assert reader.raw("w")[1].shape == (2, 84)


def test_a_real_sized_vocabulary_opens(tmp_path: Path):
    def fill(w: gguf.GGUFWriter):
        w.add_array("tokens", [f"token{i}" for i in range(49_152)])
        w.add_array("merges", [f"left{i} right" for i in range(48_900)])
        w.add_array("types", list(range(49_152)))

    path = write(tmp_path / "x.gguf", {"w": (random_blocks("Q4_1", 8, 64), "Q4_1")}, fill)
    reader = open_gguf(path)
    assert reader.metadata["tokens"][-1] == "token49151"
    assert reader.metadata["merges"][-1] == "left48899 right"
    assert len(reader.metadata["types"]) == 49_152


def test_the_heavy_package_is_imported_for_quantized_tensors_only(tmp_path: Path):
    path = write(tmp_path / "x.gguf", {"w": (np.ones((2, 3), np.float32), "F32")})
    code = (
        "import sys; from jaxllm.zoo.gguf import open_gguf; "
        f"open_gguf({str(path)!r}).read('w'); "
        "print([m for m in ('gguf', 'jax') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
