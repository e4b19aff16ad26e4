"""Text in and out: templates, streaming, stop strings, models without a tokenizer."""

import dataclasses

import numpy as np
import pytest

from jaxllm.errors import ConfigError
from tests.infer.conftest import prompt

NEW = 40


def test_streamed_pieces_are_the_text(talker):
    whole = talker.generate("hello world", max_tokens=NEW)
    pieces = talker.stream("hello world", max_tokens=NEW)
    texts = []
    while True:
        try:
            texts.append(next(pieces))
        except StopIteration as end:
            result = end.value
            break
    assert "".join(texts) == result.text == whole.text
    assert result.token_ids == whole.token_ids
    assert len(texts) >= NEW / 8  # at most eight tokens of delay
    assert all(texts)
    assert whole.text == talker.tokenizer.decode(whole.token_ids)


def test_the_first_token_is_streamed_before_the_next_is_made(talker):
    """Chunks: one token, then as many as a call makes."""
    chunks = talker.generator.stream([[1, 2, 3]], jaxllm_greedy(), 14)
    sizes = [chunk.shape for chunk in chunks]
    assert sizes == [(1, 1), (1, 4), (1, 4), (1, 4), (1, 1)]
    assert talker.generator.tokens_per_call <= 8


def jaxllm_greedy():
    import jaxllm

    return jaxllm.Sampling()


def test_prompts_of_every_kind(talker):
    """A string is a user's message; messages go through the template; raw text and ids do not."""
    tokenizer = talker.tokenizer
    message = [{"role": "user", "content": "hello"}]
    wanted = tokenizer.apply_chat(message)
    assert talker.prompt_ids("hello") == talker.prompt_ids(message) == wanted
    raw = talker.prompt_ids("hello", raw=True)
    assert raw == tokenizer.encode("hello") != wanted
    assert talker.prompt_ids(raw) == talker.prompt_ids(np.array(raw)) == raw
    assert talker.generate("hello", max_tokens=2).prompt_token_ids == wanted
    assert talker.generate("hello", max_tokens=2, raw=True).prompt_token_ids == raw
    both = talker.generate_batch(["hello", raw], max_tokens=2)
    assert [r.prompt_token_ids for r in both] == [wanted, raw]


@pytest.fixture(scope="module")
def plain(talker):
    """An answer with nothing to stop it."""
    return dataclasses.replace(talker, eos_ids=()).generate("stop", max_tokens=NEW)


@pytest.mark.parametrize(("start", "size"), [(0, 1), (3, 2), (7, 5), (12, 3)])
def test_stop_strings_end_the_answer_and_are_not_part_of_it(talker, plain, start, size):
    model = dataclasses.replace(talker, eos_ids=())
    stop = plain.text[start : start + size]
    assert len(stop) == size
    for stops in (stop, [stop], ["\x00never", stop]):
        result = model.generate("stop", max_tokens=NEW, stop=stops)
        assert result.text == plain.text[: plain.text.index(stop)]
        assert result.finish_reason == "stop"
        count = len(result.token_ids)
        assert result.token_ids == plain.token_ids[:count]
        assert stop in talker.tokenizer.decode(result.token_ids)
        assert stop not in talker.tokenizer.decode(result.token_ids[:-1])
        assert "".join(model.stream("stop", max_tokens=NEW, stop=stops)) == result.text


def test_a_stop_string_that_never_comes_holds_nothing_back(talker, plain):
    model = dataclasses.replace(talker, eos_ids=())
    almost = plain.text[-2:] + "\x00"
    result = model.generate("stop", max_tokens=NEW, stop=almost)
    assert (result.text, result.finish_reason) == (plain.text, "length")


def test_the_first_of_several_stops_wins(talker, plain):
    model = dataclasses.replace(talker, eos_ids=())
    early, late = plain.text[4:7], plain.text[10:13]
    result = model.generate("stop", max_tokens=NEW, stop=[late, early])
    assert result.text == plain.text[: min(plain.text.index(s) for s in (early, late))]


def test_the_end_token_has_no_text(talker, plain):
    end = plain.token_ids[6]
    result = dataclasses.replace(talker, eos_ids=(end,)).generate("stop", max_tokens=NEW)
    cut = plain.token_ids.index(end)
    assert result.token_ids == plain.token_ids[: cut + 1]
    assert result.text == talker.tokenizer.decode(plain.token_ids[:cut])


@pytest.mark.parametrize("empty", ["", [], [{"role": "user"}]])
def test_empty_or_broken_prompts_are_errors(talker, empty):
    with pytest.raises(ConfigError):
        talker.generate(empty)


def test_without_a_tokenizer_only_ids_work(toy):
    assert toy.tokenizer is None
    assert toy.generate(prompt(3), max_tokens=2).text == ""
    for text in ("hello", [{"role": "user", "content": "hello"}]):
        with pytest.raises(ConfigError, match="no tokenizer"):
            toy.generate(text)
    with pytest.raises(ConfigError, match="stop strings need a tokenizer"):
        toy.generate(prompt(3), stop="x")
