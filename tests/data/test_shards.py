"""Shards: made once, whole or not at all, checked before they are used."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from jaxllm.data import kept, tokenise
from jaxllm.data.kept import keep
from jaxllm.data.loader import DataOptions, open_data
from jaxllm.data.shards import Shards, ShardWriter, shard_dtype
from jaxllm.errors import CapacityError, ConfigError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder of its own."""
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


def opened(tmp_path, **changes):
    file = tmp_path / "rows.jsonl"
    if not file.exists():
        rows = [{"text": f"line {i} " + "word " * (i % 7)} for i in range(50)]
        file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    base = {"length": 16, "validation_fraction": 0.2, "vocabulary": 300, "tokenizer": "bpe:280"}
    return open_data(DataOptions(path=str(file), rows="packed", **(base | changes)))


def test_the_second_start_tokenises_nothing(tmp_path, cache, monkeypatch):
    first = opened(tmp_path)
    for name in ("_plan", "_write", "documents", "encode_all"):
        monkeypatch.setattr(tokenise, name, None)
    monkeypatch.setattr("jaxllm.data.packing.pack", None)
    again = opened(tmp_path)
    assert again.tokenizer == first.tokenizer
    for step in range(5):
        one, other = (d.batch(step, rows=2, seed=0) for d in (first, again))
        assert np.array_equal(one.tokens, other.tokens)


@pytest.mark.parametrize(
    "changes", [{"tokenizer": "bytes"}, {"tokenizer": "bpe:281"}, {"validation_fraction": 0.3}]
)
def test_other_options_are_other_shards(tmp_path, cache, changes):
    assert opened(tmp_path).train.shards.folder != opened(tmp_path, **changes).train.shards.folder


def test_a_changed_source_is_another_one(tmp_path, cache):
    first = opened(tmp_path)
    file = tmp_path / "rows.jsonl"
    file.write_text(file.read_text().replace("line 3 ", "line E "))
    second = opened(tmp_path)
    assert second.train.shards.folder != first.train.shards.folder


def damage(file, how):
    content = file.read_bytes()
    if how == "a byte":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif how == "cut off":
        file.write_bytes(content[:-2])
    else:
        file.unlink()


@pytest.mark.parametrize("how", ["a byte", "cut off", "gone"])
@pytest.mark.parametrize(
    "name", ["tokens-00000.bin", "documents.bin", "tokenizer.json", "manifest.json", "starts.npy"]
)
def test_damaged_shards_are_made_again(tmp_path, cache, caplog, how, name):
    first = opened(tmp_path)
    wanted = [first.batch(s, rows=2, seed=0).tokens.copy() for s in range(4)]
    (file, *_) = sorted(cache.glob(f"*/{name}"))
    whole = file.read_bytes()
    damage(file, how)
    again = opened(tmp_path)
    assert "is damaged" in caplog.text and "made again" in caplog.text
    assert all(
        np.array_equal(again.batch(s, rows=2, seed=0).tokens, w) for s, w in enumerate(wanted)
    )
    (file, *_) = sorted(cache.glob(f"*/{name}"))
    assert file.read_bytes() == whole or name == "manifest.json"


def test_a_killed_process_leaves_nothing_that_is_taken(tmp_path):
    """Killed while it fills: the rest is removed by the next one, which makes it all."""
    folder = tmp_path / "made"
    code = (
        "import os, sys; from pathlib import Path; from jaxllm.data.kept import keep\n"
        "def fill(part):\n"
        "    (part / 'a.bin').write_bytes(b'half'); os.kill(os.getpid(), 9)\n"
        "keep(Path(sys.argv[1]), fill)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=ROOT)
    assert done.returncode == -9 and not folder.exists()
    assert len(list(tmp_path.glob(".made.*.part"))) == 1

    def fill(part):
        (part / "a.bin").write_bytes(b"whole")
        return {"n": 1}

    assert keep(folder, fill) == {"n": 1}
    assert (folder / "a.bin").read_bytes() == b"whole"
    assert not list(tmp_path.glob(".made.*.part"))


def test_several_at_once_make_it_once(tmp_path):
    made = []

    def fill(part):
        made.append(part)
        (part / "a.bin").write_bytes(os.urandom(1000))
        return {"n": len(made)}

    found = []
    threads = [
        threading.Thread(target=lambda: found.append(keep(tmp_path / "made", fill)))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and found == [{"n": 1}] * 6


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def fill(part):
        (part / "a.bin").write_bytes(b"x")
        raise OSError(28, "No space left on device")

    with pytest.raises(CapacityError, match="no space left"):
        keep(tmp_path / "made", fill)
    assert kept.kept(tmp_path / "made") is None
    assert [p.name for p in tmp_path.iterdir()] == [".made.lock"]


def test_a_source_that_changes_while_it_is_read(tmp_path, cache, monkeypatch):
    real = tokenise._write

    def write(source, plan, part):
        source.root.write_text(source.root.read_text() + '{"text": "late"}\n')
        return real(source, plan, part)

    monkeypatch.setattr(tokenise, "_write", write)
    with pytest.raises(ConfigError, match="changed while it was read"):
        opened(tmp_path)
    assert not list(cache.glob("*/manifest.json"))


@pytest.mark.parametrize("shard_tokens", [7, 64, 1000])
def test_streams_over_several_files(tmp_path, shard_tokens):
    ids = np.random.default_rng(0).integers(0, 70_000, 500)
    with ShardWriter(tmp_path, shard_dtype(70_000), shard_tokens) as writer:
        for begin in range(0, 500, 50):
            writer.begin_documents()
            writer.append(ids[begin : begin + 50])
    shards = Shards.open(tmp_path, writer.facts())
    assert len(shards.maps) == -(-500 // shard_tokens)
    places = np.random.default_rng(1).integers(0, 500, (6, 11))
    assert np.array_equal(shards.gather(places), ids[places])
    assert shards.gather(places).dtype == np.int32
    assert shards.begins.tolist() == list(range(0, 501, 50))


@pytest.mark.parametrize(("dtype", "bad"), [("uint16", 2**16), ("uint32", 2**31), ("uint16", -1)])
def test_ids_that_overflow(tmp_path, dtype, bad):
    with ShardWriter(tmp_path, dtype) as writer:
        writer.begin_documents()
        with pytest.raises(ConfigError, match="do not fit"):
            writer.append(np.array([1, bad]))
