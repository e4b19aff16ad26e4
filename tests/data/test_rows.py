"""Rows: a function of (seed, step); parts of hosts; packed documents; the stream ahead of time."""

import json
import threading

import numpy as np
import pytest

from jaxllm.data.loader import DataOptions, open_data
from jaxllm.data.tokenise import split_place
from jaxllm.errors import ConfigError

TEXT = "Ein Satz – mit Strich, ümlauts\tand\n\nlines. " * 40


def options(path, **changes):
    base = {"length": 16, "validation_fraction": 0.1, "vocabulary": 300}
    return DataOptions(path=str(path), **(base | changes))


def text_file(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


def json_lines(tmp_path, count=60):
    random = np.random.default_rng(0)
    file = tmp_path / "rows.jsonl"
    texts = [f"{i}:" + "abcdefgh"[i % 8] * int(random.integers(1, 40)) for i in range(count)]
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return file, texts


def opened(tmp_path, rows):
    if rows == "windows":
        return open_data(options(text_file(tmp_path)))
    return open_data(options(json_lines(tmp_path)[0], tokenizer="bpe:300", rows="packed"))


def same(one, other):
    fields = ("tokens", "targets", "weights", "segment_ids", "positions")
    pairs = [(getattr(one, f), getattr(other, f)) for f in fields]
    return all((a is None and b is None) or np.array_equal(a, b) for a, b in pairs)


def test_windows_are_what_they_always_were(tmp_path):
    """Places from Philox(seed, step), on the tokens before the last tenth."""
    data = open_data(options(text_file(tmp_path)))
    ids = np.array(data.tokenizer.encode(TEXT))
    train = ids[: len(ids) - int(len(ids) * 0.1)]
    places = np.random.Generator(np.random.Philox(key=[3, 7])).integers(0, len(train) - 16, 4)
    batch = data.batch(7, rows=4, seed=3)
    assert np.array_equal(batch.tokens, [train[p : p + 16] for p in places])
    assert np.array_equal(batch.targets, [train[p + 1 : p + 17] for p in places])
    assert batch.tokens.dtype == np.int32 and batch.weights.sum() == 64
    assert batch.segment_ids is None and batch.positions is None


def test_validation_windows_follow_each_other(tmp_path):
    data = open_data(options(text_file(tmp_path)))
    ids = np.array(data.tokenizer.encode(TEXT))
    rows = np.concatenate([b.tokens for b in data.validation_batches(rows=2, count=3)])
    assert np.array_equal(rows.reshape(-1), ids[len(ids) - int(len(ids) * 0.1) :][: rows.size])


@pytest.mark.parametrize("rows", ["windows", "packed"])
def test_rows_are_a_function_of_seed_and_step(tmp_path, rows):
    data, again = opened(tmp_path, rows), opened(tmp_path, rows)
    batch = data.batch(7, rows=4, seed=3)
    assert same(batch, again.batch(7, rows=4, seed=3))
    for other in (data.batch(8, rows=4, seed=3), data.batch(7, rows=4, seed=4)):
        assert not np.array_equal(batch.tokens, other.tokens)


@pytest.mark.parametrize("rows", ["windows", "packed"])
@pytest.mark.parametrize("hosts", [2, 3, 6])
def test_the_parts_of_hosts_are_the_whole(tmp_path, rows, hosts):
    data = opened(tmp_path, rows)
    whole = data.batch(5, rows=6, seed=1)
    size = 6 // hosts
    parts = [slice(i * size, (i + 1) * size) for i in range(hosts)]
    found = [data.batch(5, rows=6, seed=1, part=p) for p in parts]
    for field in ("tokens", "targets", "weights"):
        assert np.array_equal(
            np.concatenate([getattr(b, field) for b in found]), getattr(whole, field)
        )
    held = data.validation_batches(rows=2, count=1)[0]
    one = [data.validation_batches(rows=2, count=1, part=slice(i, i + 1))[0] for i in (0, 1)]
    assert np.array_equal(np.concatenate([b.targets for b in one]), held.targets)


@pytest.mark.parametrize("rows", ["windows", "packed"])
def test_the_stream_gives_the_batches_from_any_step(tmp_path, rows):
    data = opened(tmp_path, rows)
    stream = data.stream(4, rows=3, seed=9, part=slice(1, 3))
    for step in range(4, 24):
        assert same(next(stream), data.batch(step, rows=3, seed=9, part=slice(1, 3)))
    before = [t for t in threading.enumerate() if t.name.startswith("grain")]
    assert before
    stream.close()
    for thread in before:
        thread.join(timeout=30)
        assert not thread.is_alive()


def test_an_error_comes_out_of_the_stream(tmp_path, monkeypatch):
    data = opened(tmp_path, "windows")

    def broken(self, step, **others):
        raise OSError("the disk is gone")

    monkeypatch.setattr(type(data.train), "drawn", broken)
    with pytest.raises(OSError, match="the disk is gone"):
        next(data.stream(0, rows=2, seed=0))


def test_packed_rows_hold_whole_documents(tmp_path):
    """Every document once an epoch, in pieces of at most a row, each token predicted once."""
    file, texts = json_lines(tmp_path)
    data = open_data(options(file, tokenizer="bpe:300", rows="packed"))
    end = data.tokenizer.eos_ids[0]
    count = data.train.count
    for epoch in (0, 1):
        seen: list[tuple[int, ...]] = []
        for step in range(count * epoch, count * (epoch + 1)):
            batch = data.batch(step, rows=1, seed=3)
            tokens, segments = batch.tokens[0], batch.segment_ids[0]
            weights, positions = batch.weights[0], batch.positions[0]
            assert not weights[segments == 0].any() and not tokens[segments == 0].any()
            assert list(segments[segments > 0]) == sorted(segments[segments > 0])
            for number in range(1, segments.max() + 1):
                here = np.flatnonzero(segments == number)
                assert np.array_equal(positions[here], np.arange(len(here)))
                assert np.array_equal(weights[here] == 0, tokens[here] == end)
                following = batch.targets[0][here]
                assert np.array_equal(following[:-1], tokens[here][1:])
                seen.append((*tokens[here].tolist(), *following[-1:][weights[here][-1:] > 0]))
        held = data.validation
        missing = sum(held.consecutive(i, i + 1).weights.sum() for i in range(held.count))
        coded = [(*data.tokenizer.encode(t), end) for t in texts]
        assert sum(len(s) - 1 for s in seen) + missing == sum(len(c) - 1 for c in coded)
        whole = [c for c in coded[:50] if len(c) <= 16]
        assert len(whole) > 20 and all(seen.count(c) == 1 for c in whole)


def test_an_epoch_has_another_order(tmp_path):
    data = opened(tmp_path, "packed")
    count = data.train.count
    first, second = (data.batch(e, rows=count, seed=0).tokens for e in (0, 1))
    assert sorted(map(tuple, first.tolist())) == sorted(map(tuple, second.tolist()))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize(
    ("begins", "fraction", "wanted"),
    [
        ([0, 100], 0.1, 90),
        ([0, 10, 50, 88, 100], 0.1, 88),
        ([0, 10, 93, 100], 0.1, 93),
        ([0, 10, 100], 0.1, 90),
        ([0, 99, 100], 0.1, 90),
    ],
)
def test_the_split_lies_between_documents_where_it_can(begins, fraction, wanted):
    assert split_place(np.array(begins, np.uint64), fraction) == wanted


def test_too_little_data(tmp_path):
    file = text_file(tmp_path)
    with pytest.raises(ConfigError, match="validation part has 172 tokens; a row takes 201"):
        open_data(options(file, length=200))
    with pytest.raises(ConfigError, match="validation part is too short"):
        open_data(options(file)).validation_batches(rows=100, count=1)
    (tmp_path / "one.txt").write_text("x")
    with pytest.raises(ConfigError, match="part has"):
        open_data(options(tmp_path / "one.txt", rows="packed"))
