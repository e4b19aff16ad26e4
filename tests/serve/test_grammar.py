"""Answers that keep a grammar, from the bits of a mask to OpenAI's client."""

import dataclasses
import json
import re
import time

import jax.numpy as jnp
import numpy as np
import openai
import pydantic
import pytest

from jaxllm.errors import ConfigError, UnsupportedError
from jaxllm.serve import grammar
from jaxllm.serve.engine import Engine
from jaxllm.serve.grammar import Grammars
from jaxllm.serve.steps import _allowed
from tests.serve.conftest import CONFIG, CONTEXT, ask, prompt
from tests.serve.test_engine import alone, settled
from tests.serve.test_http import KEY, MESSAGES, serving
from tests.text.toys import byte_tokenizer, score_tokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "kind": {"enum": ["cat", "dog"]},
        "old": {"type": "boolean"},
    },
    "required": ["name", "kind", "old"],
    "additionalProperties": False,
}
TIGHT = {**SCHEMA, "properties": {**SCHEMA["properties"], "name": {"const": "Tom"}}}
BLANKS = [i for i in range(272) if not byte_tokenizer().decode([i]).strip()]
DENSE = dict.fromkeys(BLANKS, -100.0)
"""Random weights like to draw blanks, and the context is short."""
FAR = {"temperature": 1.5, "seed": 3}


def fits(text):
    found = json.loads(text)
    assert set(found) == {"name", "kind", "old"}
    assert found["kind"] in ("cat", "dog")
    assert isinstance(found["old"], bool)
    assert len(found["name"]) <= 5
    return found


def test_bits_are_tokens_in_their_order():
    random = np.random.default_rng(0)
    may = random.random((3, 75)) < 0.5
    packed = np.packbits(np.pad(may, ((0, 0), (0, 21))), axis=1, bitorder="little").view(np.int32)
    logits = random.normal(size=(3, 75)).astype(np.float32)
    found = _allowed(jnp.asarray(logits), jnp.asarray(packed), jnp.array([True, False, True]))
    wanted = np.where(may, logits, -np.inf)
    wanted[1] = logits[1]
    np.testing.assert_array_equal(found, wanted)


def test_the_likeliest_token_that_may_come(toy, engine):
    """Against the model's own logits: a greedy answer of a's and b's."""
    a, b = toy.tokenizer.encode("ab", add_special=False)
    request = ask(prompt(7), 20, grammar=grammar.regex("[ab]{9}"))
    (choice,) = engine.generate(request)
    assert re.fullmatch("[ab]{9}", choice.text)
    assert choice.finish_reason == "stop"
    whole = [*request.prompt_ids, *choice.token_ids]
    logits = toy.logits([whole])[0, len(request.prompt_ids) - 1 : -1]
    assert choice.token_ids == [a if row[a] >= row[b] else b for row in logits]
    settled(engine)


def test_among_others_nobody_else_is_changed(toy, engine):
    free = [ask(prompt(n, seed=n), 15, **(FAR if n % 2 else {})) for n in (3, 8, 20, 33)]
    bound = [
        ask(prompt(5 + i), 60, grammar=grammar.json_schema(TIGHT), n=2, logit_bias=DENSE, **FAR)
        for i in range(3)
    ]
    streams = [engine.submit(r) for pair in zip(free, bound, strict=False) for r in pair]
    streams.append(engine.submit(free[3]))
    found = [stream.result() for stream in streams]
    for choices in found[1:6:2]:
        assert all(fits(c.text)["name"] == "Tom" and c.finish_reason == "stop" for c in choices)
    assert [found[i][0].token_ids for i in (0, 2, 4, 6)] == [alone(toy, r) for r in free]
    settled(engine)


@pytest.mark.slow
def test_it_goes_on_after_a_preemption(toy):
    config = dataclasses.replace(CONFIG, cache_tokens=CONTEXT)
    pattern = "[a-f]{50}"
    requests = [ask(prompt(20, seed=i), 60, grammar=grammar.regex(pattern)) for i in range(4)]
    with Engine(toy, config) as engine:
        found = [s.result()[0] for s in [engine.submit(r) for r in requests]]
        assert engine.stats().preemptions > 0
        for request, choice in zip(requests, found, strict=True):
            assert re.fullmatch(pattern, choice.text)
            assert engine.generate(request)[0].token_ids == choice.token_ids


@pytest.mark.parametrize("make", [byte_tokenizer, score_tokenizer])
def test_both_kinds_of_vocabulary(make):
    tokenizer = make()
    grammars = Grammars(tokenizer, tokenizer.vocab_size + 40, ())
    guide = grammars.guide(grammar.choice(["hello é", 'say "so"']))
    masks = np.zeros((1, grammar.words(tokenizer.vocab_size + 40)), np.int32)
    grammar.fill(masks, [(guide, 0, ())])
    bits = np.flatnonzero(np.unpackbits(masks.view(np.uint8), bitorder="little"))
    texts = {tokenizer.decode([i]).strip() for i in bits if i < tokenizer.vocab_size}
    assert {"h", "s"} <= texts | {x[:1] for x in texts}
    assert bits.max() < tokenizer.vocab_size
    assert not guide.finished


NESTED = {"a": 1}
for _ in range(40):
    NESTED = {"properties": {"x": NESTED}}


@pytest.mark.parametrize(("make", "message"), [
    (lambda: grammar.json_schema([1]), "is an object"),
    (lambda: grammar.json_schema(False), "is an object"),
    (lambda: grammar.json_schema(NESTED), "nested more than 32"),
    (lambda: grammar.json_schema({"enum": list(range(5000))}), "5001 values"),
    (lambda: grammar.json_schema({"const": "x" * 70_000}), "65536 characters"),
    (lambda: grammar.regex("a" * 3000), "2048 characters"),
    (lambda: grammar.choice([]), "1 to 256"),
    (lambda: grammar.choice(["a"] * 300), "1 to 256"),
    (lambda: grammar.regex(""), "1 to 2048"),
])  # fmt: skip
def test_a_grammar_out_of_bounds(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("wrong", [
    grammar.regex("a("), grammar.regex("(?<=a)b"), grammar.json_schema({"type": "thing"}),
    grammar.regex("((a{1,900}){1,900}){1,900}"), grammar.lark("start: ("),
    grammar.json_schema({"$ref": "https://example.org/schema.json"}),
    grammar.json_schema({"type": "string", "pattern": "(.*[ab].{40}){40}"}),
])  # fmt: skip
def test_what_cannot_be_compiled_is_refused_quickly(engine, wrong):
    begun = time.perf_counter()
    try:
        (choice,) = engine.generate(ask(prompt(4), 4, grammar=wrong))
    except (ConfigError, UnsupportedError) as error:
        assert "grammar cannot be followed" in str(error)  # noqa: PT017
    else:  # within the bounds of work after all
        assert len(choice.token_ids) <= 4
    assert time.perf_counter() - begun < 20
    settled(engine)


@pytest.fixture(scope="module")
def client(engine):
    with serving(engine) as server:
        url = f"http://127.0.0.1:{server.port}/v1"
        with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
            yield client


class Pet(pydantic.BaseModel):
    """What the official client parses into."""

    model_config = pydantic.ConfigDict(extra="forbid")
    old: bool
    legs: list[bool] = pydantic.Field(min_length=2, max_length=2)


def test_the_client_parses_its_own_types(client):
    reply = client.chat.completions.parse(
        model="toy",
        messages=MESSAGES,
        max_tokens=60,
        temperature=1.0,
        seed=5,
        response_format=Pet,
        logit_bias={str(i): -100 for i in BLANKS},
    )
    pet = reply.choices[0].message.parsed
    assert isinstance(pet, Pet)
    assert len(pet.legs) == 2
    assert reply.choices[0].finish_reason == "stop"


FORMAT = {"type": "json_schema", "json_schema": {"name": "pet", "schema": TIGHT, "strict": True}}


def test_json_by_the_client_whole_and_as_a_stream(client):
    options = {"model": "toy", "messages": MESSAGES, "max_tokens": 60, "seed": 8}
    options |= {"logit_bias": {str(i): -100 for i in BLANKS}}
    whole = client.chat.completions.create(**options, response_format=FORMAT)
    text = whole.choices[0].message.content
    fits(text)
    parts = client.chat.completions.create(**options, response_format=FORMAT, stream=True)
    assert "".join(p.choices[0].delta.content or "" for p in parts if p.choices) == text
    free = client.chat.completions.create(**options, response_format={"type": "json_object"})
    assert free.choices[0].message.content.startswith("{")


@pytest.mark.parametrize(("more", "pattern"), [
    ({"guided_regex": "[0-9]{4}-[0-9]{2}"}, r"\d{4}-\d{2}"),
    ({"guided_choice": ["yes", "no"]}, "yes|no"),
    ({"guided_json": {"enum": [1, 2]}}, "1|2"),
    ({"structured_outputs": {"choice": ["a|b", "c"]}}, r"a\|b|c"),
    ({"structured_outputs": {"regex": "x+y"}}, "x+y"),
    ({"structured_outputs": {"json": {"type": "null"}}}, "null"),
])  # fmt: skip
def test_other_ways_to_ask(client, more, pattern):
    reply = client.completions.create(
        model="toy", prompt="abc", max_tokens=40, extra_body=more, logit_bias={"127": 5}, seed=1
    )
    text = reply.choices[0].text
    assert re.fullmatch(pattern, text) or reply.choices[0].finish_reason == "length"


@pytest.mark.parametrize(("change", "message"), [
    ({"response_format": {"type": "json_schema"}}, "json_schema must be an object"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "schema is miss"),
    ({"guided_regex": "a("}, "cannot be followed"), ({"guided_regex": 5}, "string"),
    ({"guided_choice": [1]}, "strings"), ({"structured_outputs": {"ebnf": "x"}}, "unknown field"),
    ({"guided_choice": ["a"], "guided_regex": "a"}, "exclude each other"),
])  # fmt: skip
def test_errors_have_openais_shape(client, change, message):
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        client.chat.completions.create(model="toy", messages=MESSAGES, extra_body=change)
    assert caught.value.body["type"] == "invalid_request_error"


def test_nothing_compiles_for_a_grammar(engine, counts):
    counts.look()
    wanted = [grammar.regex("[a-z]{3}"), grammar.json_schema(TIGHT), None, grammar.choice(["a"])]
    for stream in [engine.submit(ask(prompt(n), 9, grammar=g)) for n, g in enumerate(wanted, 3)]:
        stream.result()
    settled(engine)
    assert counts.look() == (0, 0)
