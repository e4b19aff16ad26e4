"""Vocabularies from GGUF metadata: what is built, and what is refused."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.errors import UnsupportedError, WeightsError
from jaxllm.text.pretokens import PRE_KINDS
from jaxllm.text.tokenizer import Tokenizer
from tests.text.toys import (
    SPACE,
    byte_metadata,
    byte_tokenizer,
    score_metadata,
    score_tokenizer,
)

DAMAGE = [
    ({"model": None}, "tokenizer.ggml.model is missing"),
    ({"model": 3}, "tokenizer.ggml.model is int, not a string"),
    ({"tokens": None}, "tokenizer.ggml.tokens is missing"),
    ({"tokens": []}, "tokenizer.ggml.tokens is missing"),
    ({"tokens": "abc"}, "tokenizer.ggml.tokens is str, not a list"),
    ({"tokens": ["a", 1]}, r"tokenizer.ggml.tokens\[1\] is int, not a string"),
    ({"token_type": [1, 1]}, "tokenizer.ggml.token_type has 2 entries"),
    ({"token_type": [1.5]}, r"tokenizer.ggml.token_type\[0\] is float"),
    ({"token_type": [9] * 270}, "tokenizer.ggml.token_type holds 9"),
    ({"merges": None}, "tokenizer.ggml.merges is missing"),
    ({"merges": ["h e", "no"]}, r"tokenizer.ggml.merges\[1\] is 'no'"),
    ({"merges": ["h zz"]}, r"tokenizer.ggml.merges\[0\] is 'h zz'"),
    ({"merges": ["h h"]}, r"tokenizer.ggml.merges\[0\] is 'h h'"),
    ({"bos_token_id": 270}, "tokenizer.ggml.bos_token_id is 270, outside the 270 tokens"),
    ({"eos_token_id": -1}, "tokenizer.ggml.eos_token_id is -1"),
    ({"eos_token_id": "1"}, "tokenizer.ggml.eos_token_id is str, not an integer"),
    ({"eos_token_id": True}, "tokenizer.ggml.eos_token_id is bool"),
    ({"add_bos_token": 1}, "tokenizer.ggml.add_bos_token is int, not a boolean"),
    ({"add_bos_token": True, "bos_token_id": None}, "add_bos_token"),
    ({"pre": 1}, "tokenizer.ggml.pre is int"),
]
SCORE_DAMAGE = [
    ({"scores": None}, "tokenizer.ggml.scores has 0 entries"),
    ({"scores": [0.0]}, "tokenizer.ggml.scores has 1 entries"),
    ({"scores": ["0"] * 288}, r"tokenizer.ggml.scores\[0\] is str, not a number"),
    ({"scores": [float("nan")] * 288}, "not finite"),
    ({"unknown_token_id": 999}, "tokenizer.ggml.unknown_token_id is 999"),
]


@pytest.mark.parametrize(("changes", "message"), DAMAGE)
def test_damage_is_named(changes, message):
    with pytest.raises(WeightsError, match=message):
        Tokenizer.from_gguf(byte_metadata(**changes))


@pytest.mark.parametrize(("changes", "message"), SCORE_DAMAGE)
def test_damaged_scores_are_named(changes, message):
    with pytest.raises(WeightsError, match=message):
        Tokenizer.from_gguf(score_metadata(**changes))


def test_every_problem_is_told_at_once():
    with pytest.raises(WeightsError) as caught:
        Tokenizer.from_gguf(byte_metadata(bos_token_id=-1, eos_token_id=10**6, merges=None))
    assert all(f"ggml.{key}" in str(caught.value) for key in ("bos", "eos", "merges"))


def test_a_doubled_token_is_named():
    tokens = byte_metadata()["tokenizer.ggml.tokens"]
    with pytest.raises(WeightsError, match=r"has 'hello' twice, at 265 and 270"):
        Tokenizer.from_gguf(byte_metadata(tokens=[*tokens, "hello"], token_type=None))


def test_a_template_is_a_string():
    with pytest.raises(WeightsError, match=r"tokenizer.chat_template is int"):
        Tokenizer.from_gguf(byte_metadata() | {"tokenizer.chat_template": 1})


def test_unknown_kinds_name_the_known():
    with pytest.raises(UnsupportedError, match=r"'rwkv'; known are 'gpt2'.*'llama'"):
        Tokenizer.from_gguf(byte_metadata(model="rwkv"))
    with pytest.raises(UnsupportedError, match=r"'latin'.*default, gpt-2, .*smollm"):
        Tokenizer.from_gguf(byte_metadata(pre="latin"))


def test_arrays_serve_as_lists():
    changes = {
        "token_type": np.array(byte_metadata()["tokenizer.ggml.token_type"], np.int32),
        "eos_token_id": np.uint32(1),
    }
    assert byte_tokenizer(**changes) == byte_tokenizer()


def test_end_tokens():
    tokenizer = byte_tokenizer(eos_token_id=1, eot_token_id=3, eom_token_id=1)
    assert tokenizer.eos_ids == (1, 3)
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("</s>", "<s>")
    bare = byte_tokenizer(bos_token_id=None, eos_token_id=None)
    assert (bare.bos_id, bare.eos_ids, bare.bos_token) == (None, (), None)


TEXT = "I'LL it's a1234 xé\u0301 B世界!!\r\n\n  7 CamelCase\t\n"
PIECES = {
    "gpt-2": "I|'|LL| it|'s| a|1234| xé|\u0301| B世界|!!|\r\n\n | 7| CamelCase|\t\n",
    "smollm": "I|'|LL| it|'s| a|1|2|3|4| xé|\u0301| B世界|!!|\r\n\n  |7| CamelCase|\t\n",
    "llama-bpe": "I|'LL| it|'s| a|123|4| xé|\u0301| B世界|!!\r\n\n| | |7| CamelCase|\t\n",
    "qwen2": "I|'LL| it|'s| a|1|2|3|4| xé|\u0301| B世界|!!\r\n\n| | |7| CamelCase|\t\n",
    "qwen35": "I|'LL| it|'s| a|1|2|3|4| xé\u0301| B世界|!!\r\n\n| | |7| CamelCase|\t\n",
    "gpt-4o": "I'LL| it's| a|123|4| xé\u0301| B世界|!!\r\n\n| | |7| Camel|Case|\t\n",
    "tekken": "I|'LL| it|'s| a|1|2|3|4| xé\u0301| B世界|!!\r\n\n| | |7| Camel|Case|\t\n",
    "falcon": "I|'|LL| it|'|s| a|123|4| xé|\u0301| B世界|!!|\r\n\n | 7| CamelCase|\t\n",
    "default": "I|'|LL| it|'|s| a|123|4| xé|\u0301| B世界|!!|\r\n\n | |7| CamelCase|\t\n",
    "deepseek-v3": "I|'LL| it|'s| a|123|4| xé\u0301| B|世界|!!\r\n\n|  |7| CamelCase|\t\n",
    "deepseek-coder": "I|'|LL| it|'|s| a|1|2|3|4| xé|\u0301| B|世界|!!|\r|\n|\n|  |7| CamelCase"
    "|\t|\n",
}


@pytest.mark.parametrize("kind", PIECES)
def test_cuts(kind):
    from tokenizers import decoders

    letters = decoders.ByteLevel()
    pieces = [
        letters.decode([piece]) for piece, _ in PRE_KINDS[kind].build().pre_tokenize_str(TEXT)
    ]
    assert pieces == PIECES[kind].split("|")


@pytest.mark.parametrize("kind", PRE_KINDS)
def test_every_kind_loses_nothing(kind):
    tokenizer = byte_tokenizer(pre=kind)
    ids = tokenizer.encode("hello é 12 \r\n世", add_special=False)
    assert tokenizer.decode(ids) == "hello é 12 \r\n世"
    assert tokenizer.adds_bos == PRE_KINDS[kind].adds_bos


def test_kinds_have_their_manners():
    decomposed = "e\u0301"
    assert byte_tokenizer(pre="qwen2").decode(byte_tokenizer(pre="qwen2").encode(decomposed)) == "é"
    assert byte_tokenizer(pre="gpt-2").decode(byte_tokenizer(pre="gpt-2").encode(decomposed)) != "é"
    # A piece that is a token is taken whole, though no merge leads to it.
    tokens = [*byte_metadata()["tokenizer.ggml.tokens"], "cat"]
    given = {"tokens": tokens, "token_type": None, "add_bos_token": False}
    assert byte_tokenizer(pre="llama-bpe", **given).encode("cat") == [270]
    assert len(byte_tokenizer(pre="gpt-2", **given).encode("cat")) == 3


def by_score(text: str) -> list[str]:
    """Sentencepiece's rule, slowly: join the neighbours whose union scores best, leftmost first."""
    metadata = score_metadata()
    columns = (metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    scores = {t: s for t, s, kind in zip(*columns, strict=True) if kind == 1}
    parts = list(text.replace(" ", SPACE))
    while True:
        unions = [(scores.get(a + b), -i) for i, (a, b) in enumerate(pairwise(parts))]
        found = [union for union in unions if union[0] is not None]
        if not found:
            return parts
        at = -max(found)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@given(st.text(alphabet="abeghinorstw ", max_size=30))
@settings(max_examples=300, deadline=None)
def test_scores_decide_the_merges(text):
    tokenizer = score_tokenizer(add_bos_token=False, add_space_prefix=False)
    assert [tokenizer.backend.id_to_token(i) for i in tokenizer.encode(text)] == by_score(text)


def test_sentencepiece_manners():
    tokenizer = score_tokenizer()
    spelled = [tokenizer.backend.id_to_token(i) for i in tokenizer.encode("the é ☃")]
    assert spelled == ["<s>", f"{SPACE}the", SPACE, "é", SPACE, "<0xE2>", "<0x98>", "<0x83>"]
    assert tokenizer.adds_bos  # the default of these files
    for text in ("the é ☃", " the", "", "  in\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    bare = score_tokenizer(add_space_prefix=False, add_bos_token=False)
    assert bare.backend.id_to_token(bare.encode("the")[0]) != f"{SPACE}the"
    assert bare.decode(bare.encode(" the")) == " the"
    assert tokenizer.encode("<think>in")[1:] == [4, *tokenizer.encode("in")[1:]]
