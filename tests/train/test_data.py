"""Runs on other data than a text file: packed documents, trained tokenizers, token arrays."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import jaxllm
from jaxllm.cli.main import main
from jaxllm.errors import ConfigError
from jaxllm.train.config import RunConfig
from jaxllm.train.loop import train
from tests.train.runs import small
from tests.train.test_run import losses, rows


def packed(folder: Path, **changes) -> RunConfig:
    """A run on JSON lines, packed, with a tokenizer trained on them."""

    random = np.random.default_rng(0)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]
    texts = [" ".join(random.choice(words, int(random.integers(2, 12)))) for _ in range(300)]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps({"body": t}) + "\n" for t in texts))
    base = {"tokenizer": "bpe:300", "rows": "packed", "text_field": "body", "data": str(file)}
    config = small(folder)
    spec = dataclasses.replace(config.spec, vocab=304)
    return dataclasses.replace(config, spec=spec, **(base | changes))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(config, result) of a packed run."""
    config = packed(tmp_path_factory.mktemp("packed"), steps=40)
    return config, train(config, quiet=True)


def test_packed_documents_with_a_trained_tokenizer_learn(whole):
    found = losses(whole[0].out)
    assert found[40] < found[1] - 1.0


def test_a_finished_run_brings_its_tokenizer(whole, capsys):
    config, _ = whole
    model = jaxllm.load(config.out, store=False)
    assert model.tokenizer is not None and 257 < model.tokenizer.vocab_size <= 300
    assert model.eos_ids == (0,)
    options = ["--raw-prompt", "the quick", "--max-tokens", "5", "--json"]
    assert main(["generate", config.out, *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["prompt_token_ids"] == model.tokenizer.encode("the quick")


@pytest.mark.slow
def test_the_losses_do_not_depend_on_the_mesh(whole, tmp_path):
    config = packed(tmp_path, steps=40, mesh="data=2,tensor=2")
    train(config, quiet=True)
    found, wanted = losses(config.out), losses(whole[0].out)
    assert max(abs(found[s] - wanted[s]) for s in wanted) < 1e-4


def test_token_arrays_without_a_tokenizer(tmp_path):
    file = tmp_path / "ids.bin"
    np.tile(np.arange(30, dtype=np.uint16), 60).tofile(file)
    config = small(tmp_path, data=str(file), tokenizer="none", end_token=29, rows="packed")
    train(config, quiet=True)
    assert rows(config.out)[-1]["loss"] < rows(config.out)[0]["loss"]
    assert jaxllm.load(config.out, store=False).tokenizer is None


def test_options_that_cannot_be(tmp_path):
    with pytest.raises(ConfigError, match=r"end_token is in \[0, 40\)"):
        small(tmp_path, end_token=40)
    with pytest.raises(ConfigError, match="bpe:VOCAB"):
        small(tmp_path, tokenizer="bpe:12")
    with pytest.raises(ConfigError, match="vocabulary, 40"):
        small(tmp_path, tokenizer="bpe:300")
    with pytest.raises(ConfigError, match="jaxllm pull data:tinyshakespeare"):
        train(small(tmp_path, data="data:tinyshakespeare"), quiet=True)
