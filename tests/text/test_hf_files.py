"""Hugging Face directories: the forms in which tokens, ids and templates are written."""

import json

import pytest

from jaxllm.errors import WeightsError
from jaxllm.text.tokenizer import Tokenizer
from tests.text.toys import CHATML, byte_tokenizer

toy = byte_tokenizer()


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "tokenizer.json").write_text(toy.backend.to_str())
    return tmp_path


def write(directory, name: str, value) -> None:
    path = directory / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def test_nothing_there(tmp_path):
    assert Tokenizer.from_directory(tmp_path) is None
    assert Tokenizer.from_directory(tmp_path / "nowhere") is None


def test_tokenizer_json_alone(directory):
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer.encode("hello") == toy.encode("hello")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids) == (270, None, ())


@pytest.mark.parametrize("form", [str, lambda text: {"content": text, "special": True}])
def test_special_tokens_in_both_forms(directory, form):
    config = {"bos_token": form("<s>"), "eos_token": form("</s>"), "chat_template": CHATML}
    write(directory, "tokenizer_config.json", config | {"pad_token": None})
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer == toy
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


def test_ids_come_from_the_models_configs(directory):
    write(directory, "config.json", {"bos_token_id": 0, "eos_token_id": 5})
    assert Tokenizer.from_directory(directory).eos_ids == (5,)
    write(directory, "generation_config.json", {"eos_token_id": [3, 1]})
    tokenizer = Tokenizer.from_directory(directory)
    assert (tokenizer.bos_id, tokenizer.bos_token, tokenizer.eos_ids) == (0, "<s>", (3, 1))
    write(directory, "tokenizer_config.json", {"eos_token": "</s>"})
    assert Tokenizer.from_directory(directory).eos_ids == (1, 3)


def test_the_config_decides_about_bos(directory):
    with_bos = byte_tokenizer(add_bos_token=True)
    write(directory, "tokenizer.json", with_bos.backend.to_str())
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    write(directory, "tokenizer_config.json", config)
    assert Tokenizer.from_directory(directory).adds_bos
    write(directory, "tokenizer_config.json", config | {"add_bos_token": False})
    tokenizer = Tokenizer.from_directory(directory)
    assert not tokenizer.adds_bos
    assert tokenizer.encode("hello") == toy.encode("hello")
    write(directory, "tokenizer_config.json", config | {"add_eos_token": True})
    assert Tokenizer.from_directory(directory).encode("hello") == [*toy.encode("hello"), 1]


def test_truncation_and_padding_are_left_to_training(directory):
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_str(toy.backend.to_str())
    backend.enable_truncation(2)
    backend.enable_padding(length=100)
    write(directory, "tokenizer.json", backend.to_str())
    assert Tokenizer.from_directory(directory).encode("w w w") == toy.encode("w w w")


def test_listed_tokens_are_added(directory):
    listed = {"0": {"content": "<s>"}, "270": {"content": "<new>", "special": True}}
    write(directory, "tokenizer_config.json", {"added_tokens_decoder": listed})
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer.vocab_size == 271
    assert tokenizer.encode("<new>") == [270]
    assert tokenizer.decode([270]) == ""
    listed["280"] = "<gap>"
    write(directory, "tokenizer_config.json", {"added_tokens_decoder": listed})
    with pytest.raises(WeightsError, match=r"'<gap>' the id 280, but in .* it has 271"):
        Tokenizer.from_directory(directory)


def test_a_named_token_becomes_special(directory):
    write(directory, "tokenizer_config.json", {"eos_token": "hello", "pad_token": "<absent>"})
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer.eos_ids == (265,)
    assert tokenizer.decode([265]) == ""
    assert tokenizer.vocab_size == 270  # a name without a token adds none


def test_where_templates_stand(directory):
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    write(directory, "tokenizer_config.json", {"chat_template": named})
    tokenizer = Tokenizer.from_directory(directory)
    assert (tokenizer.chat_template, tokenizer.tool_template) == ("D", "T")
    tokenizer.save(directory / "copy")
    assert Tokenizer.from_directory(directory / "copy") == tokenizer
    write(directory, "chat_template.jinja", "J")
    write(directory, "additional_chat_templates/tool_use.jinja", "K")
    other = Tokenizer.from_directory(directory)
    assert (other.chat_template, other.tool_template) == ("J", "K")
    tokenizer.save(directory)  # its own templates count afterwards
    assert Tokenizer.from_directory(directory) == tokenizer


DAMAGE = [
    ("tokenizer.json", "{}", "is not a tokenizer file"),
    ("tokenizer.json", '{"model": ', "is not a tokenizer file"),
    ("tokenizer_config.json", "{", "is not JSON"),
    ("tokenizer_config.json", [], "holds a list, not an object"),
    ("tokenizer_config.json", {"chat_template": 3}, "chat_template in .* is int"),
    ("tokenizer_config.json", {"added_tokens_decoder": ["a"]}, "must map token ids"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"x": "a"}}, "must map token ids"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"1": 5}}, "no content for id 1"),
    ("generation_config.json", {"eos_token_id": "2"}, "eos_token_id in the config files"),
    ("config.json", {"eos_token_id": [1, -2]}, "eos_token_id in the config files"),
    ("config.json", {"eos_token_id": True}, "eos_token_id in the config files"),
]


@pytest.mark.parametrize(("name", "value", "message"), DAMAGE)
def test_damaged_files_are_named(directory, name, value, message):
    write(directory, name, value)
    with pytest.raises(WeightsError, match=message):
        Tokenizer.from_directory(directory)
