"""The server against OpenAI's own client, and against those who mean it harm."""

import asyncio
import contextlib
import dataclasses
import json
import threading
import time

import httpx
import openai
import pytest

from jaxllm.errors import ConfigError
from jaxllm.serve.engine import Engine
from jaxllm.serve.http.app import App
from jaxllm.serve.http.config import ServerConfig
from jaxllm.serve.http.server import Server
from tests.serve.conftest import CONFIG, CONTEXT, ask, prompt
from tests.serve.test_engine import settled

KEY = "a secret"
MESSAGES = [{"role": "user", "content": "Hi"}]
BOUNDS = ServerConfig(
    port=0, api_keys=("another", KEY), max_body_bytes=20_000, max_tokens=64, keep_alive_s=0.05,
    max_n=4, max_prompts=4, drain_s=20.0,
)  # fmt: skip


@contextlib.contextmanager
def serving(engine, config=BOUNDS, make=lambda e, c: App("toy", e.model, e, c)):
    """A server on a thread of its own."""
    server = Server(make(engine, config))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield server
    finally:
        server.stop()
        thread.join(timeout=60)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def address(engine):
    with serving(engine) as server:
        yield f"http://127.0.0.1:{server.port}"


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def web(address):
    with httpx.Client(base_url=address, headers={"Authorization": f"Bearer {KEY}"}) as web:
        yield web


def chat_ids(toy):
    return toy.tokenizer.apply_chat(MESSAGES)


def test_a_chat_is_model_generate(toy, client):
    reply = client.chat.completions.create(
        model="toy", messages=MESSAGES, max_tokens=12, temperature=0
    )
    wanted = toy.generate(MESSAGES, max_tokens=12)
    assert reply.choices[0].message.content == wanted.text
    assert reply.choices[0].finish_reason == wanted.finish_reason
    assert reply.usage.completion_tokens == len(wanted.token_ids)
    assert reply.usage.prompt_tokens == len(chat_ids(toy))
    assert reply.object == "chat.completion"


def test_a_streamed_chat_is_the_same(client):
    options = {"model": "toy", "messages": MESSAGES, "max_tokens": 20, "temperature": 0}
    whole = client.chat.completions.create(**options)
    parts = list(
        client.chat.completions.create(
            **options, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(p.choices[0].delta.content or "" for p in parts if p.choices)
    assert text == whole.choices[0].message.content
    assert parts[0].choices[0].delta.role == "assistant"
    assert [p.choices[0].finish_reason for p in parts if p.choices][-1] == "length"
    assert parts[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(p.usage is None for p in parts[:-1])


def test_several_answers_and_seeds(client):
    options = {"model": "toy", "messages": MESSAGES, "max_tokens": 8, "n": 3, "seed": 7}
    first, second = (client.chat.completions.create(**options) for _ in range(2))
    texts = [[c.message.content for c in r.choices] for r in (first, second)]
    assert texts[0] == texts[1]
    assert [c.index for c in first.choices] == [0, 1, 2]
    streamed = ["", "", ""]
    for part in client.chat.completions.create(**options, stream=True):
        for choice in part.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts[0]


def test_logprobs(client):
    reply = client.chat.completions.create(
        model="toy", messages=MESSAGES, max_tokens=5, temperature=0, logprobs=True, top_logprobs=2
    )
    content = reply.choices[0].logprobs.content
    assert len(content) == 5
    for entry in content:
        assert entry.logprob == entry.top_logprobs[0].logprob
        assert entry.token == entry.top_logprobs[0].token
    plain = client.completions.create(
        model="toy", prompt=[1, 2, 3], max_tokens=4, temperature=0, logprobs=2
    )
    scores = plain.choices[0].logprobs
    assert len(scores.tokens) == len(scores.token_logprobs) == len(scores.text_offset) == 4
    assert scores.token_logprobs[0] == pytest.approx(max(scores.top_logprobs[0].values()))


def test_completions_of_text_and_ids(toy, client):
    one = client.completions.create(model="toy", prompt="abc", max_tokens=7, temperature=0)
    wanted = toy.generate("abc", raw=True, max_tokens=7)
    assert one.choices[0].text == wanted.text
    ids = toy.tokenizer.encode("abc")
    many = client.completions.create(
        model="toy", prompt=[ids, [5, 6]], max_tokens=7, temperature=0, n=2
    )
    assert [c.index for c in many.choices] == [0, 1, 2, 3]
    assert [many.choices[i].text for i in (0, 1)] == [wanted.text] * 2
    assert many.choices[2].text == toy.generate([5, 6], max_tokens=7).text
    parts = client.completions.create(
        model="toy", prompt=[ids, [5, 6]], max_tokens=7, temperature=0, stream=True
    )
    texts = ["", ""]
    for part in parts:
        texts[part.choices[0].index] += part.choices[0].text
    assert texts == [many.choices[0].text, many.choices[2].text]


def test_stop_bias_and_penalties_reach_the_engine(client):
    options = {"model": "toy", "messages": MESSAGES, "max_tokens": 10, "temperature": 0}
    forced = client.chat.completions.create(**options, logit_bias={"66": 100})
    assert len(set(forced.choices[0].message.content)) == 1
    stopped = client.chat.completions.create(
        **options, logit_bias={"66": 100}, stop=forced.choices[0].message.content[:2]
    )
    assert (stopped.choices[0].message.content, stopped.choices[0].finish_reason) == ("", "stop")
    extra = {"repetition_penalty": 1.3, "top_k": 5, "min_p": 0.1, "typical_p": 0.9}
    once = client.chat.completions.create(**options, frequency_penalty=2.0, extra_body=extra)
    assert once.usage.completion_tokens == 10


def test_models_and_tokens(toy, client, web):
    assert [m.id for m in client.models.list()] == ["toy"]
    assert client.models.retrieve("toy").owned_by == "jaxllm"
    with pytest.raises(openai.NotFoundError, match="allowed: 'toy'"):
        client.models.retrieve("gpt")
    found = web.post("/tokenize", json={"prompt": "abc"}).json()
    assert found["tokens"] == toy.tokenizer.encode("abc")
    found = web.post("/tokenize", json={"messages": MESSAGES}).json()
    assert (found["tokens"], found["max_model_len"]) == (chat_ids(toy), CONTEXT)


BASE = {"model": "toy", "messages": MESSAGES, "max_tokens": 3}
WRONG = [
    ({"temperature": 3}, "temperature"), ({"temperature": "hot"}, "temperature"),
    ({"top_p": -1}, "top_p"), ({"n": 5}, "n"), ({"n": True}, "n"),
    ({"max_tokens": 65}, "max_tokens"),
    ({"stop": ["x"] * 17}, "stop"), ({"stop": [""]}, "stop"), ({"stop": 5}, "stop"),
    ({"logit_bias": {"a": 1}}, "logit_bias"), ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {str(i): 1 for i in range(65)}}, "logit_bias"),
    ({"top_logprobs": 2}, "top_logprobs"), ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"messages": []}, "messages"), ({"messages": "Hi"}, "messages"),
    ({"temprature": 1}, "temprature"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"tools": [{}]}, "tools"), ({"stream_options": {}}, "stream_options"), ({"seed": 1.5}, "seed"),
    ({"messages": [{"role": "user"}]}, None), ({"messages": [1]}, None),
    ({"messages": [{"role": "user", "content": "x" * 500}]}, None),
]  # fmt: skip


@pytest.mark.parametrize(("change", "param"), WRONG)
def test_a_bad_request_is_the_callers_error(web, change, param):
    reply = web.post("/v1/chat/completions", json=BASE | change)
    error = reply.json()["error"]
    assert reply.status_code == 400, error
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert error["message"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'{"a": NaN}', b"\xff\xfe", b"[" * 9000, b'{"a":' * 3000]
)
def test_a_body_that_is_no_object(web, body):
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize"):
        assert web.post(path, content=body).status_code == 400


def test_openai_errors(client, address):
    with pytest.raises(openai.BadRequestError, match="context"):
        client.completions.create(model="toy", prompt=[1] * CONTEXT, max_tokens=1)
    with pytest.raises(openai.BadRequestError, match=r"0\.\.271"):
        client.completions.create(model="toy", prompt=[999], max_tokens=1)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**BASE | {"model": "another"})
    for key in ("wrong", KEY + "x"):
        with openai.OpenAI(base_url=f"{address}/v1", api_key=key) as stranger:
            with pytest.raises(openai.AuthenticationError, match="API key"):
                stranger.models.list()


@pytest.mark.parametrize(
    "path", ["/metrics", "/v1/models", "/nowhere", "/docs", "/", "/openapi.json"]
)
def test_every_route_but_two_needs_a_key(address, path):
    assert httpx.get(address + path).status_code == 401
    assert httpx.get(address + path, headers={"Authorization": f"Basic {KEY}"}).status_code == 401
    for route in ("/health", "/ready"):
        assert httpx.get(address + route).status_code == 200


def test_sizes_are_bounded(web):
    assert web.post("/tokenize", content=b"x" * 20_001).status_code == 413
    parts = iter([b"x" * 15_000] * 2)
    assert web.post("/tokenize", content=parts).status_code == 413
    assert web.get("/health", headers={"X": "y" * 70_000}).status_code == 431
    assert web.get("/v1/nothing").status_code == 404
    assert web.get("/v1/completions").status_code == 405


def test_a_public_address_needs_a_key():
    for host in ("0.0.0.0", "10.0.0.1", "::", "example.org"):
        with pytest.raises(ConfigError, match="api-key"):
            ServerConfig(host=host)
        assert ServerConfig(host=host, api_keys=("k",)).host == host
    assert ServerConfig(host="localhost").host == "localhost"


@pytest.mark.parametrize("stream", [True, False])
def test_hanging_up_frees_the_pages(engine, address, stream):
    body = {"prompt": [1, 2, 3], "max_tokens": 64, "ignore_eos": True, "stream": stream, "n": 4}
    headers = {"Authorization": f"Bearer {KEY}"}
    before = engine.stats().drawn_tokens
    with pytest.raises(httpx.ReadTimeout):
        with httpx.Client(timeout=0.05) as web:
            with web.stream("POST", f"{address}/v1/completions", json=body, headers=headers) as r:
                r.read() if not stream else [time.sleep(0.02) for _ in r.iter_lines()]
                raise httpx.ReadTimeout("hung up")
    settled(engine)
    assert engine.stats().drawn_tokens - before <= 4 * 64


def test_metrics(client, web):
    client.chat.completions.create(**BASE)
    list(client.chat.completions.create(**BASE, stream=True))
    lines = web.get("/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if line[0] != "#")
    assert float(values["jaxllm_drawn_tokens_total"]) > 0
    assert float(values["jaxllm_time_to_first_token_seconds_count"]) > 0
    assert "jaxllm_compilations_after_ready_total" in values
    assert float(values["jaxllm_held_pages"]) == 0
    assert any(
        name.startswith('jaxllm_requests_total{route="chat",status="200"}') for name in values
    )


def test_a_full_queue_is_429_and_silence_is_filled(toy):
    config = dataclasses.replace(CONFIG, max_sequences=1, max_queue=1, cache_tokens=CONTEXT)
    with Engine(toy, config) as engine, serving(engine) as server:
        go, dispatch = threading.Event(), engine.runner.dispatch
        engine.runner.dispatch = lambda turns: (go.wait(), dispatch(turns))[1]
        address = f"http://127.0.0.1:{server.port}/v1/completions"
        headers = {"Authorization": f"Bearer {KEY}"}
        body = {"prompt": [1, 2, 3], "max_tokens": 5, "stream": True}
        lines = []

        def listen():
            with httpx.stream("POST", address, json=body, headers=headers, timeout=60) as reply:
                lines.extend(reply.iter_lines())

        threads = [threading.Thread(target=listen) for _ in range(2)]
        for i, thread in enumerate(threads):
            thread.start()
            while engine.stats().waiting + engine.stats().running <= i:
                time.sleep(0.01)
        reply = httpx.post(address, json=body, headers=headers)
        assert (reply.status_code, reply.headers["retry-after"]) == (429, "1")
        assert reply.json()["error"]["code"] == "queue_full"
        time.sleep(0.2)
        go.set()
        for thread in threads:
            thread.join()
        assert ": keep-alive" in lines
        assert lines.count("data: [DONE]") == 2


def test_a_dead_engine_is_503(toy):
    with Engine(toy, CONFIG) as engine, serving(engine) as server:
        engine.runner.dispatch = lambda _: 1 / 0
        web = httpx.Client(
            base_url=f"http://127.0.0.1:{server.port}", headers={"Authorization": f"Bearer {KEY}"}
        )
        body = {"prompt": [1, 2, 3], "max_tokens": 5}
        reply = web.post("/v1/completions", json=body)
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "10")
        assert "ZeroDivisionError" in reply.json()["error"]["message"]
        assert [web.get(p).status_code for p in ("/health", "/ready")] == [503, 503]
        assert web.post("/v1/completions", json=body).status_code == 503
        web.close()


def test_stopping_lets_answers_end(toy):
    with Engine(toy, CONFIG) as engine:
        with serving(engine) as server:
            url = f"http://127.0.0.1:{server.port}/v1/completions"
            headers = {"Authorization": f"Bearer {KEY}"}
            body = {"prompt": [1, 2, 3], "max_tokens": 64, "ignore_eos": True, "stream": True}
            with httpx.stream("POST", url, json=body, headers=headers, timeout=60) as reply:
                lines = reply.iter_lines()
                next(lines)
                server.stop()
                assert [line for line in lines if line][-1] == "data: [DONE]"
        settled(engine)


def test_a_model_without_text(toy):
    model = dataclasses.replace(toy, tokenizer=None)
    with Engine(model, CONFIG) as engine, serving(engine) as server:
        client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{server.port}/v1", api_key=KEY, max_retries=0
        )
        with pytest.raises(openai.BadRequestError, match="no tokenizer"):
            client.chat.completions.create(**BASE)
        reply = client.completions.create(model="toy", prompt=[4, 5], max_tokens=3)
        assert (reply.choices[0].text, reply.usage.completion_tokens) == ("", 3)
        assert engine.generate(ask(prompt(3), 2))[0].text == ""
        client.close()


def test_json_is_what_a_stream_sends(web):
    """Every event but the last is a JSON object."""
    with web.stream("POST", "/v1/chat/completions", json=BASE | {"stream": True}) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        events = [line[6:] for line in reply.iter_lines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    assert all(json.loads(e)["object"] == "chat.completion.chunk" for e in events[:-1])
