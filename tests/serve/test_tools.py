"""Tools by OpenAI's client: called because they must be, read because they were."""

import dataclasses
import json

import openai
import pytest

from jaxllm.serve.engine import Engine
from tests.serve.conftest import CONFIG
from tests.serve.test_engine import settled
from tests.serve.test_grammar import BLANKS
from tests.serve.test_http import KEY, MESSAGES, serving
from tests.text.test_tools import BARE, TAGGED

ZONES = {
    "type": "object",
    "properties": {"z": {"enum": ["A", "B"]}},
    "required": ["z"],
    "additionalProperties": False,
}
TIME = {"type": "function", "function": {"name": "time", "parameters": ZONES}}
STOP = {"type": "function", "function": {"name": "go", "description": "Goes."}}
STOP["function"]["parameters"] = {"type": "object", "additionalProperties": False}
ASKED = {
    "model": "toy", "messages": MESSAGES, "max_tokens": 64, "seed": 4, "tools": [TIME, STOP],
    "parallel_tool_calls": False, "logit_bias": {str(i): -100 for i in BLANKS},
}  # fmt: skip


@pytest.fixture(scope="module", params=["tagged", "bare"])
def form(request):
    return request.param


@pytest.fixture(scope="module")
def served(form, toy):
    """(engine, client); a template in each of the two forms."""
    template = {"tagged": TAGGED, "bare": BARE}[form]
    tokenizer = dataclasses.replace(toy.tokenizer, chat_template=template)
    model = dataclasses.replace(toy, tokenizer=tokenizer)
    with Engine(model, CONFIG) as engine, serving(engine) as server:
        url = f"http://127.0.0.1:{server.port}/v1"
        with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
            yield engine, client


@pytest.fixture(scope="module")
def client(served):
    return served[1]


def called(name, arguments, form):
    text = json.dumps(
        {"name": name, {"tagged": "arguments", "bare": "parameters"}[form]: arguments}
    )
    return f"<tool_call>{text}</tool_call>" if form == "tagged" else text


@pytest.mark.parametrize("choice", [
    "required", {"type": "function", "function": {"name": "time"}},
    {"type": "function", "function": {"name": "go"}},
])  # fmt: skip
def test_a_tool_that_must_be_called_is(client, choice):
    reply = client.chat.completions.create(**ASKED, tool_choice=choice)
    (answer,) = reply.choices
    assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)
    (call,) = answer.message.tool_calls
    arguments = json.loads(call.function.arguments)
    if choice != "required":
        assert call.function.name == choice["function"]["name"]
    assert arguments == {} if call.function.name == "go" else arguments["z"] in "AB"
    assert call.id.startswith("call_")
    name, streamed, finish = "", "", None
    for part in client.chat.completions.create(**ASKED, tool_choice=choice, stream=True):
        delta, finish = part.choices[0].delta, part.choices[0].finish_reason
        assert not delta.content
        for piece in delta.tool_calls or ():
            assert piece.index == 0
            name += piece.function.name or ""
            streamed += piece.function.arguments or ""
    assert (name, streamed, finish) == (call.function.name, call.function.arguments, "tool_calls")


def test_a_call_that_the_model_chose(client, form):
    """Whatever the model writes is read: here it has no other choice."""
    text = called("time", {"z": "B"}, form)
    options = ASKED | {"extra_body": {"guided_choice": [text]}, "logit_bias": {}}
    reply = client.chat.completions.create(**options)
    (call,) = reply.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("time", {"z": "B"})
    assert reply.choices[0].finish_reason == "tool_calls"
    plain = client.chat.completions.create(**options, tool_choice="none")
    assert (plain.choices[0].message.content, plain.choices[0].finish_reason) == (text, "stop")
    unknown = called("nobody", {}, form)
    reply = client.chat.completions.create(**options | {"extra_body": {"guided_choice": [unknown]}})
    assert (reply.choices[0].message.content, reply.choices[0].message.tool_calls) == (
        unknown,
        None,
    )


def test_text_stays_text(client):
    options = ASKED | {"temperature": 0, "max_tokens": 12}
    reply = client.chat.completions.create(**options)
    parts = list(client.chat.completions.create(**options, stream=True))
    text = "".join(p.choices[0].delta.content or "" for p in parts)
    assert text == reply.choices[0].message.content
    assert reply.choices[0].finish_reason == parts[-1].choices[0].finish_reason == "length"


def test_a_cut_call_is_cut(client):
    reply = client.chat.completions.create(
        **ASKED | {"max_tokens": 40}, tool_choice=STOP | {"function": {"name": "go"}}
    )
    assert reply.choices[0].finish_reason in ("length", "tool_calls")


def test_results_go_back(served):
    engine, client = served
    call = {"id": "1", "type": "function", "function": {"name": "go", "arguments": "{}"}}
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "ok"},
    ]
    reply = client.chat.completions.create(**ASKED | {"messages": messages, "max_tokens": 5})
    assert reply.usage.completion_tokens == 5
    settled(engine)
    assert engine.stats().compilations == 0


@pytest.mark.parametrize(("change", "message"), [
    ({"tools": [{}]}, "type is served"), ({"tools": [TIME, TIME]}, "the same name"),
    ({"tools": [{"type": "x"}] * 129}, "at most 128"), ({"tool_choice": "any"}, "tool_choice is"),
    ({"tools": [], "tool_choice": "required"}, "needs tools"),
    ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice is"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "letters"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 1}}]}, "schema"),
    ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "excludes"),
])  # fmt: skip
def test_wrong_tools(client, change, message):
    with pytest.raises(openai.BadRequestError, match=message):
        client.chat.completions.create(**ASKED | change)


def test_a_template_without_tools(engine):
    with serving(engine) as server:
        url = f"http://127.0.0.1:{server.port}/v1"
        with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
            with pytest.raises(openai.BadRequestError, match="no known way"):
                client.chat.completions.create(**ASKED)
            client.chat.completions.create(**ASKED | {"max_tokens": 2}, tool_choice="none")
