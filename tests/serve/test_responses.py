"""/v1/responses by OpenAI's client: items, events, schemas, calls."""

import json

import openai
import pytest

from tests.serve.test_grammar import BLANKS, TIGHT, Pet, fits
from tests.serve.test_http import BOUNDS, KEY, MESSAGES, serving
from tests.serve.test_tools import ZONES, client, form, served  # noqa: F401 - fixtures

ASKED = {"model": "toy", "input": "Hi", "max_output_tokens": 12, "temperature": 0}
BIAS = {"logit_bias": {str(i): -100 for i in BLANKS}, "seed": 4}
TOOL = {"type": "function", "name": "time", "parameters": ZONES}


@pytest.fixture(scope="module")
def plain(engine):
    with serving(engine) as server:
        url = f"http://127.0.0.1:{server.port}/v1"
        with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
            yield client


def test_a_response_is_model_generate(toy, plain):
    reply = plain.responses.create(**ASKED, instructions=None)
    wanted = toy.generate(MESSAGES, max_tokens=12)
    assert reply.output_text == wanted.text
    assert (reply.status, reply.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (reply.usage.output_tokens, reply.usage.total_tokens) == (
        len(wanted.token_ids),
        len(wanted.token_ids) + reply.usage.input_tokens,
    )
    assert (reply.object, reply.model, reply.error) == ("response", "toy", None)
    assert reply.output[0].content[0].type == "output_text"


def test_events_tell_the_same(plain):
    whole = plain.responses.create(**ASKED)
    events = list(plain.responses.create(**ASKED, stream=True))
    assert [e.sequence_number for e in events] == list(range(len(events)))
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert text == whole.output_text
    kinds = [e.type.removeprefix("response.") for e in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    ending = ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert kinds[-4:] == ending
    final = events[-1].response
    assert final.output_text == whole.output_text
    assert final.usage == whole.usage.model_copy(
        update={"input_tokens_details": final.usage.input_tokens_details}
    )


def test_messages_and_instructions_make_the_prompt(toy, plain):
    parts = [{"type": "input_text", "text": "H"}, {"type": "input_text", "text": "i"}]
    items = [{"role": "user", "content": parts}]
    assert plain.responses.create(**ASKED | {"input": items}).output_text == (
        plain.responses.create(**ASKED).output_text
    )
    told = plain.responses.create(**ASKED | {"instructions": "Be.", "max_output_tokens": 4})
    messages = [{"role": "system", "content": "Be."}, *MESSAGES]
    assert told.usage.input_tokens == len(toy.tokenizer.apply_chat(messages))


def test_json_by_a_schema(plain):
    schema = {"type": "json_schema", "name": "pet", "schema": TIGHT, "strict": True}
    asked = ASKED | {"max_output_tokens": 60, "text": {"format": schema}, "extra_body": BIAS}
    reply = plain.responses.create(**asked)
    assert fits(reply.output_text)["name"] == "Tom"
    assert (reply.status, reply.incomplete_details) == ("completed", None)
    with plain.responses.stream(**asked) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == reply.output_text
    parsed = plain.responses.parse(
        **ASKED | {"max_output_tokens": 60}, text_format=Pet, extra_body=BIAS
    )
    assert isinstance(parsed.output_parsed, Pet)


def test_a_call_is_an_item(client):  # noqa: F811
    asked = ASKED | {"tools": [TOOL], "max_output_tokens": 64, "extra_body": BIAS}
    asked |= {"tool_choice": {"type": "function", "name": "time"}}
    reply = client.responses.create(**asked)
    (item,) = reply.output
    assert (item.type, item.name, reply.status) == ("function_call", "time", "completed")
    assert json.loads(item.arguments)["z"] in "AB"
    events = list(client.responses.create(**asked, stream=True))
    pieces = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    assert "".join(pieces) == item.arguments
    assert len(pieces) > 1
    assert events[-1].response.output[0].arguments == item.arguments
    back = [
        {"role": "user", "content": "Hi"},
        {"type": "function_call", "call_id": item.call_id, "name": "time", "arguments": "{}"},
        {"type": "function_call_output", "call_id": item.call_id, "output": "noon"},
    ]
    again = client.responses.create(**ASKED | {"input": back, "tools": [TOOL]})
    assert again.usage.output_tokens == 12


@pytest.mark.parametrize(("change", "message"), [
    ({"input": []}, "input must be"), ({"input": [5]}, "must be an object"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "parts with text"),
    ({"input": [{"type": "reasoning"}]}, "function_call"),
    ({"previous_response_id": "x"}, "served"),
    ({"text": {"format": {"type": "xml"}}}, "json_object or json_schema"),
    ({"max_output_tokens": BOUNDS.max_tokens + 1}, "max_output_tokens"),
    ({"background": True}, "background"), ({"temprature": 1}, "temperature"),
])  # fmt: skip
def test_wrong_requests(plain, change, message):
    with pytest.raises(openai.BadRequestError, match=message):
        plain.responses.create(**ASKED | {"extra_body": change})


def test_a_dead_engine_fails_the_response(toy):
    from jaxllm.serve.engine import Engine
    from tests.serve.conftest import CONFIG

    with Engine(toy, CONFIG) as engine, serving(engine) as server:
        url = f"http://127.0.0.1:{server.port}/v1"
        with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
            engine.runner.dispatch = lambda turns: 1 / 0
            events = list(client.responses.create(**ASKED, stream=True))
    assert events[-1].type == "response.failed"
    assert "engine died" in events[-1].response.error.message
