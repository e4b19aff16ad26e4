"""Tokenizer: encoding and decoding, storing, and SmolLM2 against the public reference."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.errors import ConfigError, WeightsError
from jaxllm.text.tokenizer import Tokenizer
from tests.text.toys import GOLDEN, byte_tokenizer, golden_metadata, score_tokenizer

plain = Tokenizer.from_gguf(golden_metadata())
toy = byte_tokenizer()
model_ids = [i for i, _, _ in GOLDEN["tokens"]]


@pytest.mark.parametrize("row", GOLDEN["texts"], ids=lambda row: repr(row["text"])[:30])
def test_ids_are_the_references(row):
    ids = plain.encode(row["text"])
    assert [model_ids[i] for i in ids] == row["ids"]


@pytest.mark.parametrize("row", GOLDEN["chats"], ids=range(len(GOLDEN["chats"])))
def test_chats_are_the_references(row):
    options = {"add_generation_prompt": row["add_generation_prompt"]}
    assert plain.render_chat(row["messages"], **options) == row["text"]
    assert [model_ids[i] for i in plain.apply_chat(row["messages"], **options)] == row["ids"]


def test_a_question_ends_with_the_opening_of_the_answer():
    text = plain.render_chat([{"role": "user", "content": "What is the capital of France?"}])
    assert text.endswith("<|im_start|>assistant\n")
    assert text.startswith("<|im_start|>system\n")  # SmolLM2 brings its own system message


@pytest.mark.slow
def test_the_whole_vocabulary():
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"  # the user's, not the suite's own
    models = Path(base).expanduser() / "jaxllm" / "models"
    path = next(models.rglob(name), None)
    if path is None:
        pytest.skip(f"{name} is not in {models}; jaxllm pull smollm2-135m-instruct")
    from jaxllm.zoo.gguf import open_gguf

    tokenizer = Tokenizer.from_gguf(open_gguf(path).metadata)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids) == (49152, 1, (2,))
    for row in GOLDEN["texts"]:
        assert tokenizer.encode(row["text"]) == row["ids"]
    for row in GOLDEN["chats"]:
        given = {"add_generation_prompt": row["add_generation_prompt"]}
        assert tokenizer.apply_chat(row["messages"], **given) == row["ids"]
    assert Tokenizer.from_json(tokenizer.to_json()) == tokenizer


@given(st.text())
@settings(max_examples=300, deadline=None)
def test_every_text_survives(text):
    assert toy.decode(toy.encode(text), skip_special=False) == text
    assert toy.decode(toy.encode(text, parse_special=False)) == text


def test_special_text_is_a_token_only_where_it_is_parsed():
    assert toy.encode("<|im_start|>") == [2]
    ids = toy.encode("<|im_start|>", parse_special=False)
    assert len(ids) == len("<|im_start|>")
    assert toy.encode("<think>", parse_special=False) == [4]  # user-defined: always a token
    assert toy.encode("<|im_start|>") == [2]  # the other way of reading leaves no trace


def test_bos_and_eos_only_where_the_tokenizer_adds_them():
    both = byte_tokenizer(add_bos_token=True, add_eos_token=True)
    assert toy.encode("hello") == both.encode("hello", add_special=False)
    assert both.encode("hello") == [0, *toy.encode("hello"), 1]
    assert (toy.adds_bos, both.adds_bos) == (False, True)
    assert both.encode("") == [0, 1]
    chat = both.apply_chat([{"role": "user", "content": "hello"}])
    assert chat[0] == 2
    assert 0 not in chat


def test_special_tokens_are_skipped_on_demand():
    ids = toy.encode("<|im_start|>hello<think>naïve é<|im_end|>")
    assert toy.decode(ids) == "hello<think>naïve é"
    assert toy.decode(ids, skip_special=False) == "<|im_start|>hello<think>naïve é<|im_end|>"
    assert toy.special_ids == {0, 1, 2, 3}


def test_ids_of_any_integer_kind():
    ids = toy.encode("hello")
    assert toy.decode(np.array(ids, np.int32)) == toy.decode(iter(ids)) == "hello"
    assert toy.decode([*ids, 10**6]) == "hello"  # a model's padding rows have no token
    with pytest.raises(ConfigError, match="integers from 0"):
        toy.decode([-1])


def test_half_a_character_is_no_text():
    with pytest.raises(ConfigError, match="surrogate"):
        toy.encode("\ud83d")


@pytest.mark.parametrize(
    "tokenizer",
    [toy, plain, byte_tokenizer(add_bos_token=True, pre="llama-bpe"), score_tokenizer()],
    ids=["bytes", "golden", "bos", "scores"],
)
def test_stored_tokenizers_come_back_equal(tokenizer, tmp_path):
    again = Tokenizer.from_json(tokenizer.to_json())
    tokenizer.save(tmp_path)
    saved = Tokenizer.from_directory(tmp_path)
    assert tokenizer == again == saved
    assert hash(tokenizer) == hash(again)
    text = "<s>hello  wörld 12 <|im_start|>"
    assert tokenizer.encode(text) == again.encode(text) == saved.encode(text)
    assert repr(saved) == repr(tokenizer)
    assert {path.name for path in tmp_path.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}


def test_other_tokenizers_are_not_equal():
    assert toy != plain
    assert toy != byte_tokenizer(pre="smollm")
    assert toy != byte_tokenizer(eos_token_id=2)
    assert toy != "tokenizer"


def test_damaged_documents_are_refused():
    document = json.loads(toy.to_json())
    for change in ({"format": "x"}, {"backend": "{}"}, {"eos_ids": 3}, {"surplus": 1}):
        with pytest.raises(WeightsError, match="stored tokenizer"):
            Tokenizer.from_json(json.dumps(document | change))
    for text in ("", "[]", "{", toy.to_json()[:-200]):
        with pytest.raises(WeightsError, match="stored tokenizer"):
            Tokenizer.from_json(text)


def test_without_a_template_there_is_no_chat():
    bare = score_tokenizer()
    with pytest.raises(ConfigError, match="raw prompt"):
        bare.render_chat([{"role": "user", "content": "hi"}])


def test_template_variables():
    shown = "{{ bos_token }}|{{ eos_token }}|{{ thinking }}|{{ tools | tojson }}"
    tokenizer = Tokenizer.from_json(
        json.dumps(json.loads(toy.to_json()) | {"chat_template": shown, "tool_template": "T"})
    )
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.render_chat(messages, options={"thinking": 1}) == "<s>|</s>|1|null"
    assert tokenizer.render_chat(messages, tools=[{"name": "f"}]) == "T"
    for name in ("messages", "bos_token", "add_generation_prompt"):
        with pytest.raises(ConfigError, match=f"options may not set {name}"):
            tokenizer.render_chat(messages, options={name: 1})


def test_import_is_light():
    heavy = ("jax", "flax", "numpy", "tokenizers", "jinja2")
    code = (
        "import sys, jaxllm.text.tokenizer, jaxllm.text.detokenize;"
        f"print(*[name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=".")
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr
