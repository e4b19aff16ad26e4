"""Text as tokens: vocabularies, parts, rows by (seed, step)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.data.text import byte_tokenizer, character_tokenizer, open_text, read_text
from jaxllm.errors import ConfigError

TEXT = "Ein Satz – mit Strich, ümlauts\tand\n\nlines. " * 40


def opened(tmp_path, tokens="characters"):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return open_text(file, length=16, validation_fraction=0.1, tokens=tokens)


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_bytes_are_numbered_by_their_value(text):
    tokenizer = byte_tokenizer()
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text


@pytest.mark.parametrize("tokens", ["characters", "bytes"])
def test_parts_decode_to_the_text(tmp_path, tokens):
    data = opened(tmp_path, tokens)
    whole = np.concatenate([data.train, data.validation])
    assert data.tokenizer.decode(whole.tolist()) == TEXT
    assert data.tokenizer.encode(TEXT) == whole.tolist()
    assert len(data.validation) == len(whole) // 10


def test_characters_are_in_the_order_of_their_code_points():
    tokenizer = character_tokenizer("cab\n cab")
    assert tokenizer.encode("\n abc") == [0, 1, 2, 3, 4]


def test_rows_are_a_function_of_seed_and_step(tmp_path):
    data = opened(tmp_path)
    batch = data.batch(7, rows=4, seed=3)
    again = opened(tmp_path).batch(7, rows=4, seed=3)
    assert np.array_equal(batch.tokens, again.tokens)
    assert np.array_equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    for other in (data.batch(8, rows=4, seed=3), data.batch(7, rows=4, seed=4)):
        assert not np.array_equal(batch.tokens, other.tokens)
    text = data.tokenizer.decode(data.train.tolist())
    assert all(data.tokenizer.decode(row.tolist()) in text for row in batch.tokens)


def test_validation_rows_follow_each_other(tmp_path):
    data = opened(tmp_path)
    batches = data.validation_batches(rows=2, count=3)
    rows = np.concatenate([b.tokens for b in batches])
    assert np.array_equal(rows.reshape(-1), data.validation[: rows.size])


def test_folders_and_bad_files(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.py").write_text("first")
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "d.bin").write_text("not text by its name")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_text("somebody else's")
    assert read_text(tmp_path) == "first\nsecond"
    with pytest.raises(ConfigError, match=r"c\.txt"):
        read_text(tmp_path / "c.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no text"):
        read_text(tmp_path / "empty")
    with pytest.raises(ConfigError, match=r"absent\.txt"):
        read_text(tmp_path / "absent.txt")
    with pytest.raises(ConfigError, match="a row takes 513"):
        open_text(tmp_path, length=512, validation_fraction=0.5)
