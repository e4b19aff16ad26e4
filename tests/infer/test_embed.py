"""Vectors of texts: pooling by hand, few programs, order, bad input."""

import dataclasses
import json

import numpy as np
import pytest

import jaxllm
from jaxllm.errors import ConfigError, ShapeError, UnsupportedError, WeightsError
from jaxllm.infer import embed as module
from jaxllm.infer.programs import row_length
from jaxllm.spec.model import Pooling
from tests.infer.conftest import quickly
from tests.oracle.encoder_golden import outputs, rows
from tests.oracle.mutate import POLICY
from tests.text.toys import byte_tokenizer

GOLDEN = rows("bert")


def random_rows(*lengths):
    random = np.random.default_rng(0)
    return [random.integers(3, 67, n).tolist() for n in lengths]


@pytest.fixture(scope="module")
def model():
    return quickly(jaxllm.load(GOLDEN.source, policy=POLICY, store=False))


def by_hand(model, row, how):
    """The vector of one row, from its hidden states without any padding."""
    ids = np.asarray([row], np.int32)
    alone = dataclasses.replace(
        GOLDEN,
        ids=ids,
        types=np.zeros_like(ids),
        marks=np.zeros_like(ids, bool),
        lengths=np.asarray([len(row)], np.int32),
    )
    hidden = outputs(model.spec, model.params, alone)["hidden"][0].astype(np.float64)
    out = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[how.by]
    return out / np.linalg.norm(out) if how.normalize else out


@pytest.mark.parametrize("by", ["mean", "cls", "last"])
def test_vectors_are_pooled_hidden_states(by, model):
    how, some = Pooling(by=by, normalize=by != "mean"), random_rows(11, 3, 20)
    found = model.embed(some, pooling=how)
    assert (found.shape, found.dtype) == ((3, 24), np.float32)
    for row, vector in zip(some, found, strict=True):
        assert np.abs(vector - by_hand(model, row, how)).max() < 1e-5


def test_rows_of_all_lengths_keep_their_order_and_share_programs(model, monkeypatch):
    monkeypatch.setattr(module, "TOKENS_PER_CALL", 64)
    many = random_rows(*np.random.default_rng(1).permutation(np.arange(1, 49)))
    model.generator.loaded.clear()
    found = model.embed(many)
    names = [n for n in model.generator.loaded if "embed-" in n]
    assert sorted(n.partition("mean-")[2] for n in names) == ["b1-t48", "b2-t32", "b4-t16"]
    for i in (0, 7, 30, 47):
        assert np.abs(found[i] - by_hand(model, many[i], Pooling())).max() < 1e-5
    assert np.array_equal(model.embed(many[7]), found[[7]])


def test_lengths_come_from_a_small_table(model):
    sizes = {row_length(model.spec, n) for n in range(1, 49)}
    assert sizes == {16, 32, 48}


def test_nothing_gives_no_rows(model):
    assert model.embed([]).shape == (0, 24)


def test_an_encoder_without_pooling_takes_the_mean_and_says_so(model, caplog, monkeypatch):
    monkeypatch.setattr("jaxllm.core.logging._seen", set())
    assert model.spec.head.pooling is None
    with caplog.at_level("INFO", logger="jaxllm"):
        found = model.embed(random_rows(5))
    assert "embed: the model says no pooling" in caplog.text
    assert np.array_equal(found, model.embed(random_rows(5), pooling="mean"))


def test_a_decoder_must_be_told_how_and_then_embeds(toy):
    prompt = list(range(3, 12))
    with pytest.raises(ConfigError, match="pooling='mean'"):
        toy.embed([prompt])
    found = toy.embed([prompt, prompt[:4]], pooling="last")
    again = toy.embed([prompt[:4] + [9] * 5], pooling=Pooling(by="mean"))
    assert found.shape == (2, 32)
    assert np.isfinite(again).all()
    assert np.abs(found[0] - found[1]).max() > 0.1


def test_wrong_input_is_named(model, toy):
    cases = {
        "pooling 'max' is unknown": (ConfigError, [[3]], "max"),
        "no tokenizer": (ConfigError, ["text"], None),
        "0..66": (ShapeError, [[3, 67]], None),
        "list of token ids": (ShapeError, [[]], None),
        "49 tokens exceed the 48": (ShapeError, [[3] * 49], None),
        "9 tokens exceed the 8": (ShapeError, [[3] * 9], Pooling(max_tokens=8)),
    }
    for said, (kind, texts, pooling) in cases.items():
        with pytest.raises(kind, match=said):
            model.embed(texts, pooling=pooling)
    with pytest.raises(ConfigError, match="max_tokens is positive"):
        Pooling(max_tokens=0)


def test_texts_are_cut_with_their_special_tokens_kept():
    tokenizer = byte_tokenizer()
    whole = tokenizer.encode("abcdefgh")
    extra = len(whole) - 8
    assert tokenizer.encode_cut("abcdefgh", len(whole)) == whole
    cut = tokenizer.encode_cut("abcdefgh", 4 + extra)
    assert len(cut) == 4 + extra
    assert tokenizer.encode("abcdefgh") == whole
    with pytest.raises(ConfigError, match="lone surrogate"):
        tokenizer.encode_cut("\ud800", 4)


def write(folder, name, data):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(data))


def test_files_of_sentence_transformers_are_read_and_written(model, tmp_path):
    model.save(tmp_path)
    kinds = ("Transformer", "Pooling", "Normalize")
    modules = [
        {"path": "1_Pooling" * (k == "Pooling"), "type": f"sentence_transformers.models.{k}"}
        for k in kinds
    ]
    write(tmp_path, "modules.json", modules)
    write(tmp_path, "1_Pooling/config.json", {"pooling_mode_cls_token": True})
    write(tmp_path, "sentence_bert_config.json", {"max_seq_length": 9, "do_lower_case": False})
    wanted = Pooling(by="cls", normalize=True, max_tokens=9)
    for folder in (tmp_path, tmp_path / "again"):
        again = jaxllm.load(folder, policy=POLICY, store=False)
        assert again.spec.head.pooling == wanted
        again.save(tmp_path / "again")
    for name, data, kind, said in (
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, UnsupportedError, "max"),
        ("1_Pooling/config.json", {}, UnsupportedError, "nothing"),
        ("1_Pooling/config.json", {"word_embedding_dimension": 3}, WeightsError, "has 24"),
        ("sentence_bert_config.json", {"do_lower_case": True}, UnsupportedError, "lower"),
        ("sentence_bert_config.json", {"max_seq_length": "x"}, ConfigError, "max_seq_length"),
        ("modules.json", modules[:1], UnsupportedError, "Transformer"),
        ("modules.json", {}, WeightsError, "expected a list"),
    ):
        before = (tmp_path / name).read_text()
        write(tmp_path, name, data)
        with pytest.raises(kind, match=said) as caught:
            jaxllm.load(tmp_path, policy=POLICY, store=False)
        assert str(tmp_path / name) in str(caught.value)
        (tmp_path / name).write_text(before)
