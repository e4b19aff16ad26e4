"""Sources: which files are read, in which order, and what is said about broken ones."""

import gzip
import json
import os
import sys
import time

import numpy as np
import pytest

from jaxllm.data import sources
from jaxllm.data.loader import DataOptions, open_data
from jaxllm.data.sources import documents, find_source, source_hash
from jaxllm.errors import ConfigError, UnsupportedError, WeightsError

ROWS = [{"text": "first"}, {"text": ""}, {"text": "second ü", "more": 1}]


def read(path, field="text"):
    return list(documents(find_source(path, field)))


def write_rows(path, rows=ROWS):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def write_parquet(path, columns):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def opened(path, **changes):
    base = {"length": 4, "validation_fraction": 0.3, "vocabulary": 300, "tokenizer": "bytes"}
    return open_data(DataOptions(path=str(path), **(base | changes)))


def test_a_folder_in_the_order_of_its_paths(tmp_path, caplog):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.py").write_text("first")
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "d.bin").write_text("not text by its name")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "inner").mkdir()
    write_rows(tmp_path / "inner" / "e.jsonl", [{"text": "third"}])
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_text("somebody else's")
    assert read(tmp_path) == ["first", "second", "third"]
    assert "1 files of" in caplog.text
    data = opened(tmp_path)
    ids = np.concatenate([data.train.shards.gather(np.arange(data.train.shards.tokens))])
    assert bytes(ids.tolist()) == b"first\nsecond\nthird"


def test_json_lines_plain_and_zipped(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl")
    file.write_text(file.read_text().replace("\n", "\n\n"))
    assert read(file) == ["first", "second ü"]
    zipped = tmp_path / "rows.jsonl.gz"
    zipped.write_bytes(gzip.compress(file.read_bytes()))
    assert read(zipped) == ["first", "second ü"]
    write_rows(file, [{"body": "other"}])
    assert read(file, "body") == ["other"]


def test_parquet(tmp_path):
    file = write_parquet(tmp_path / "rows.parquet", {"text": ["eins", "", "zwei"], "n": [1, 2, 3]})
    assert read(file) == ["eins", "zwei"]


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    file = write_parquet(tmp_path / "rows.parquet", {"text": ["eins"]})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UnsupportedError, match=r"jaxllm\[parquet\]"):
        read(file)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (b'{"text": "fine"}\n{"text": "cut off\n', "line 2: is no JSON"),
        (
            b'{"text": "fine"}\n\n{"body": 1, "n": 2}\n',
            "line 3: has no field 'text'; it has body, n",
        ),
        (b'{"text": 5}\n', "line 1: 'text' is a int, not a string"),
        (b"[1]\n", "line 1: holds a list"),
        (b'{"text": "\xff"}\n', "line 1: is no UTF-8"),
        (b'{"text": "\\ud800 half"}\n', "line 1: 'text' holds half a surrogate"),
        (b"[" * 100_000 + b"\n", "line 1: is no JSON"),
    ],
)
def test_broken_json_lines(tmp_path, line, named):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(line)
    with pytest.raises(ConfigError, match=named) as error:
        read(file)
    assert str(file) in str(error.value)


def test_a_zip_that_is_cut_off(tmp_path):
    file = tmp_path / "rows.jsonl.gz"
    whole = gzip.compress(os.urandom(50).hex().encode() * 9)
    for content in (whole[: len(whole) // 2], b"no zip at all"):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=r"rows\.jsonl\.gz"):
            read(file)


def test_broken_parquet(tmp_path):
    file = tmp_path / "rows.parquet"
    file.write_bytes(b"PAR1 but not really")
    with pytest.raises(ConfigError, match="cannot be read as Parquet"):
        read(file)
    write_parquet(file, {"body": ["x"], "n": [1]})
    with pytest.raises(ConfigError, match="no field 'text'; it has body, n"):
        read(file)
    write_parquet(file, {"text": ["x", None]})
    with pytest.raises(ConfigError, match="row 2: 'text' is a NoneType"):
        read(file)


def test_missing_and_empty(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.txt: there is no such file"):
        find_source(tmp_path / "absent.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no text and no token arrays"):
        find_source(tmp_path / "empty")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"bad\.txt: cannot be read as UTF-8"):
        read(tmp_path / "bad.txt")
    (tmp_path / "none.txt").write_text("")
    for tokenizer in ("bytes", "characters", "bpe:300"):
        with pytest.raises(ConfigError, match=r"none\.txt: holds no text"):
            opened(tmp_path / "none.txt", tokenizer=tokenizer)


def test_the_hash_follows_contents_and_is_remembered(tmp_path, monkeypatch):
    file = tmp_path / "text.txt"
    file.write_text("one")
    old = time.time() - 100
    os.utime(file, (old, old))
    first = source_hash(find_source(file))
    real = sources.hashlib.file_digest
    monkeypatch.setattr(sources.hashlib, "file_digest", None)  # not read again
    assert source_hash(find_source(file)) == first
    monkeypatch.setattr(sources.hashlib, "file_digest", real)
    file.write_text("two")  # just written: the same size and a time that may repeat
    second = source_hash(find_source(file))
    file.write_text("six")
    assert len({first, second, source_hash(find_source(file))}) == 3
    copy = tmp_path / "other.txt"
    copy.write_text("one")
    assert source_hash(find_source(copy)) == first


@pytest.mark.parametrize("suffix", [".npy", ".bin"])
def test_token_arrays(tmp_path, suffix):
    ids = np.array([5, 6, 0, 7, 8, 9, 0, 0, 4, 3], np.uint16)
    file = tmp_path / f"ids{suffix}"
    np.save(file, ids) if suffix == ".npy" else ids.tofile(file)
    data = opened(file, tokenizer="none", end_token=0, vocabulary=10, length=1)
    shards = data.train.shards
    assert shards.gather(np.arange(10)).tolist() == ids.tolist()
    assert shards.begins.tolist() == [0, 3, 7, 8, 10]
    assert data.tokenizer is None
    assert opened(file, length=1).tokenizer.vocab_size == 256


def test_a_folder_of_token_arrays(tmp_path, monkeypatch):
    """Chunks and files end anywhere; a file's end ends its document."""
    monkeypatch.setattr("jaxllm.data.arrays._CHUNK", 3)
    np.save(tmp_path / "a.npy", np.array([1, 1, 0, 2, 2, 2, 2, 0], np.int64))
    np.array([3, 3], np.uint16).tofile(tmp_path / "b.bin")
    shards = opened(tmp_path, tokenizer="none", end_token=0, length=1).train.shards
    assert shards.begins.tolist() == [0, 3, 8, 10]
    whole = opened(tmp_path, tokenizer="none", length=1).train.shards
    assert whole.begins.tolist() == [0, 8, 10]


@pytest.mark.parametrize(
    ("ids", "named"),
    [
        (np.array([1, 2, 300, 4] * 4), "token 2 is 300; ids are from 0 to 299"),
        (np.array([1, -2, 3, 4] * 4), "token 1 is -2"),
        (np.array([1, 2**40] * 8), f"token 1 is {2**40}"),
        (np.array([1, 2**63] * 8, np.uint64), f"token 1 is {2**63}"),
        (np.ones(9, np.float32), "dtype float32"),
        (np.ones((3, 3), np.int32), r"shape \(3, 3\)"),
        (np.empty(0, np.int32), "holds no tokens"),
        (np.array([{}] * 5), r"cannot be read as \.npy"),
    ],
)
def test_broken_token_arrays(tmp_path, ids, named):
    file = tmp_path / "ids.npy"
    np.save(file, ids, allow_pickle=True)
    with pytest.raises(ConfigError, match=named):
        opened(file, tokenizer="none")


def test_token_arrays_that_do_not_fit(tmp_path):
    file = tmp_path / "ids.bin"
    file.write_bytes(b"123")
    with pytest.raises(ConfigError, match=r"has 3 bytes; a \.bin is uint16"):
        opened(file, tokenizer="none")
    np.arange(200, dtype=np.uint16).tofile(file)
    opened(file, tokenizer="none")
    with pytest.raises(ConfigError, match="holds token 199, the model's vocabulary has 100"):
        opened(file, tokenizer="none", vocabulary=100)
    for name in ("characters", "bpe:300"):
        with pytest.raises(ConfigError, match="cannot be tokenised"):
            opened(file, tokenizer=name)
    text = tmp_path / "text.txt"
    text.write_text("words " * 20)
    with pytest.raises(ConfigError, match="'none' is for token arrays"):
        opened(text, tokenizer="none")
    with pytest.raises(ConfigError, match="end_token is for token arrays"):
        opened(text, end_token=3)
    with pytest.raises(WeightsError, match="no such file or folder"):
        opened(text, tokenizer="/no/such/model")
