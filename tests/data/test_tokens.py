"""Tokenizers of training data: bytes, characters, BPE from scratch, a model's own."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.data import tokens
from jaxllm.data.loader import DataOptions, open_data
from jaxllm.data.tokens import (
    byte_tokenizer,
    character_tokenizer,
    check_tokenizer,
    encode_all,
    train_bpe,
)
from jaxllm.errors import ConfigError
from jaxllm.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
TEXT = "the cat sat on the mat, the dog did not; ümlauts\tand\n\nlines – 12 of 345. " * 60


def opened(path, tokenizer, **changes):
    base = {"length": 16, "validation_fraction": 0.1, "vocabulary": 400, "tokenizer": tokenizer}
    return open_data(DataOptions(path=str(path), **(base | changes)))


def stream(data):
    shards = data.train.shards
    return shards.gather(np.arange(shards.tokens)).tolist()


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_bytes_are_numbered_by_their_value(text):
    tokenizer = byte_tokenizer()
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text


def test_characters_are_in_the_order_of_their_code_points():
    assert character_tokenizer("cab\n cab").encode("\n abc") == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", ["characters", "bytes", "bpe:300"])
def test_the_stream_decodes_to_the_text(tmp_path, name):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    data = opened(file, name)
    assert data.tokenizer.decode(stream(data)) == TEXT
    if name != "bpe:300":  # whose text is split before it is encoded
        assert stream(data) == data.tokenizer.encode(TEXT)


def test_a_trained_vocabulary_never_saw_the_validation_part(tmp_path):
    """The split is where the tokenizer's training text ends: to the character."""
    file = tmp_path / "text.txt"
    secret = "zyxzyxzyxq " * 60
    cut = len(TEXT) - 100
    file.write_text(TEXT[:cut] + secret)
    fraction = len(secret) / (cut + len(secret)) + 1e-6
    data = opened(file, "bpe:400", validation_fraction=fraction)
    assert "zyx" not in "".join(data.tokenizer.backend.get_vocab())
    split = data.train.part[1]
    assert data.tokenizer.decode(stream(data)[:split]) == TEXT[:cut]
    assert data.tokenizer == train_bpe([TEXT[:cut]], 400)


def test_training_bpe_is_the_same_in_every_process(tmp_path):
    code = (
        "import sys, hashlib; from jaxllm.data.tokens import train_bpe;"
        "text = open(sys.argv[1]).read();"
        "print(hashlib.sha256(train_bpe([text, text[:99]], 380).to_json().encode()).hexdigest())"
    )
    file = ROOT / "jaxllm" / "model.py"
    run = lambda: subprocess.run(  # noqa: E731
        [sys.executable, "-c", code, str(file)], capture_output=True, text=True, cwd=ROOT
    )
    first, second = run(), run()
    assert first.returncode == 0, first.stderr
    assert len(first.stdout) == 65 and first.stdout == second.stdout


@settings(max_examples=30, deadline=None)
@given(st.text(alphabet="ab \n\tü1.'", max_size=400))
def test_pieces_change_no_token(text):
    tokenizer = TRAINED
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "_PIECE", 7)
        (found,) = encode_all(tokenizer, "bpe:300", [text])
    assert found.tolist() == tokenizer.encode(text, add_special=False)


TRAINED = train_bpe([TEXT], 300)


def test_text_that_spells_a_special_token_is_text():
    (ids,) = encode_all(TRAINED, "bpe:300", ["a<|endoftext|>b"])
    assert 0 not in ids and TRAINED.encode("<|endoftext|>") == [0]


def test_several_documents_end_with_the_end_token(tmp_path):
    file = tmp_path / "rows.jsonl"
    texts = ["one two", "three", "four " * 40]
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    data = opened(file, "bpe:300", length=4)
    shards = data.train.shards
    ids = np.array(stream(data))
    begins = shards.begins.tolist()
    pairs = itertools.pairwise(begins)
    parts = [data.tokenizer.decode(ids[b:e].tolist()) for b, e in pairs]
    assert parts == texts
    assert np.flatnonzero(ids == 0).tolist() == [b - 1 for b in begins[1:]]
    plain = opened(file, "characters", length=4)
    assert plain.tokenizer.decode(stream(plain)) == "\n".join(texts)


def test_a_models_own_tokenizer(tmp_path):
    """From its folder; documents begin with its BOS where it adds one."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"cat {i} " * 9}) + "\n" for i in range(4)))
    backend = Tokenizer.from_json(TRAINED.to_json()).backend
    backend.add_special_tokens(["<s>"])
    bos = backend.token_to_id("<s>")
    from tokenizers import processors

    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    own = Tokenizer(
        backend=backend,
        vocab_size=bos + 1,
        bos_id=bos,
        eos_ids=(0,),
        adds_bos=True,
        special_tokens={"eos_token": "<|endoftext|>", "bos_token": "<s>"},
    )
    own.save(tmp_path / "own")
    for name in (tmp_path / "own", tmp_path / "own" / "tokenizer.json"):
        data = opened(file, str(name), length=8)
        assert data.tokenizer == own
        ids, begins = np.array(stream(data)), data.train.shards.begins[:-1].astype(int)
        assert (ids[begins] == bos).all() and (ids == bos).sum() == 4
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ConfigError, match=r"holds no tokenizer\.json"):
        opened(file, str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match=r"tokenizer has \d+ tokens, the model's vocabulary 100"):
        opened(file, str(tmp_path / "own"), vocabulary=100)


@pytest.mark.parametrize("name", ["", " ", "bpe:", "bpe:256", "bpe:many", "bpe:-5", "bpe:²"])
def test_names_that_can_be_no_tokenizer(name):
    with pytest.raises(ConfigError, match="tokenizer"):
        check_tokenizer(name, 1000)


def test_a_vocabulary_that_is_too_large_for_the_model():
    check_tokenizer("bpe:1000", 1000)
    with pytest.raises(ConfigError, match="vocabulary, 1000"):
        check_tokenizer("bpe:1_001", 1000)
