"""The server against those who mean it harm, and the engine's death under load."""

import asyncio
import dataclasses
import hmac
import threading
import time

import httpx
import openai
import pytest

from jaxllm.serve.engine import Engine
from jaxllm.serve.http.config import ServerConfig
from jaxllm.serve.http.guard import Guard
from tests.serve.conftest import CONFIG, CONTEXT, ask, prompt
from tests.serve.test_engine import settled
from tests.serve.test_http import BASE, BOUNDS, KEY, MESSAGES, serving
from tests.text.toys import byte_tokenizer

HEADERS = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def address(engine):
    with serving(engine) as server:
        yield f"http://127.0.0.1:{server.port}"


def client_of(address, **options):
    options = {"api_key": KEY, "max_retries": 0} | options
    return openai.OpenAI(base_url=f"{address}/v1", **options)


@pytest.mark.parametrize("field", ["chat_template", "chat_template_kwargs", "tokenizer", "adapter"])
def test_nobody_brings_a_template(address, field):
    reply = httpx.post(
        f"{address}/v1/chat/completions", json=BASE | {field: "{{ 1 }}"}, headers=HEADERS
    )
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, field)


@pytest.mark.slow
def test_a_template_that_runs_on_is_stopped(toy):
    """The model's own template may be a trap: it costs its sender five seconds, and nobody else."""
    trap = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    tokenizer = dataclasses.replace(byte_tokenizer(), chat_template=trap)
    model = dataclasses.replace(toy, tokenizer=tokenizer)
    with Engine(model, CONFIG) as engine, serving(engine) as server:
        url = f"http://127.0.0.1:{server.port}"
        reply = httpx.post(f"{url}/v1/chat/completions", json=BASE, headers=HEADERS, timeout=60)
        assert reply.status_code == 400
        assert "longer than 5 s" in reply.text
        body = {"prompt": "abc", "max_tokens": 2}
        assert httpx.post(f"{url}/v1/completions", json=body, headers=HEADERS).status_code == 200


def test_every_key_is_compared_in_constant_time(monkeypatch):
    """All of them, by their digests, whichever is right."""
    seen = []
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: (seen.append((a, b)), a == b)[1])
    guard = Guard(None, ServerConfig(api_keys=("first", "second", "third")))
    for given in (b"first", b"third", b"x" * 9999):
        seen.clear()
        try:
            guard._tenant(b"Bearer " + given, basic=False)
        except ValueError:
            assert given[:1] == b"x"
        assert len(seen) == 3
        assert {len(digest) for pair in seen for digest in pair} == {32}


def test_requests_of_one_client_are_bounded():
    """Through however few connections they come; other clients are not touched."""
    seen = {"10.0.0.1": [], "10.0.0.2": []}

    async def several():
        go = asyncio.Event()

        async def inner(scope, receive, send):
            await go.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})

        guard = Guard(inner, dataclasses.replace(BOUNDS, api_keys=("k",), max_connections=3))

        async def one(client):
            async def send(message):
                if message["type"] == "http.response.start":
                    seen[client].append((message["status"], dict(message["headers"])))

            scope = {"type": "http", "method": "GET", "path": "/health", "headers": []}
            await guard(scope | {"client": (client, 1)}, None, send)

        clients = ["10.0.0.1"] * 5 + ["10.0.0.2"]
        tasks = [asyncio.create_task(one(client)) for client in clients]
        await asyncio.sleep(0.05)
        go.set()
        await asyncio.gather(*tasks)
        await one("10.0.0.1")  # and it may come again

    asyncio.run(several())
    assert [status for status, _ in seen["10.0.0.1"]] == [429, 429, 200, 200, 200, 200]
    assert seen["10.0.0.1"][0][1][b"retry-after"] == b"1"
    assert [status for status, _ in seen["10.0.0.2"]] == [200]


def test_the_engines_death_under_load(toy):
    """Every request that waits, runs or streams ends with an error of OpenAI's shape."""
    with Engine(toy, CONFIG) as engine, serving(engine) as server:
        url = f"http://127.0.0.1:{server.port}"
        dispatch, steps = engine.runner.dispatch, iter(range(12))
        engine.runner.dispatch = lambda turns: dispatch(turns) if next(steps) < 11 else 1 / 0
        ends = []

        def request(number):
            body = {"prompt": [number + 1] * 9, "max_tokens": 60, "ignore_eos": True}
            body["stream"] = number % 2 == 0
            reply = httpx.post(f"{url}/v1/completions", json=body, headers=HEADERS, timeout=60)
            said = reply.text.split("data: ")[-1] if reply.status_code == 200 else reply.text
            ends.append((reply.status_code, "ZeroDivisionError" in said, '"error"' in said))

        threads = [threading.Thread(target=request, args=(i,)) for i in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
            assert not thread.is_alive()
        assert len(ends) == 12
        assert all(died and shaped for _, died, shaped in ends)
        assert {status for status, _, _ in ends} <= {200, 503}
        assert httpx.get(f"{url}/health").status_code == 503


def test_answers_that_take_too_long_are_cut_at_the_end(toy):
    """SIGTERM waits for `drain_s` and no longer."""
    bounds = dataclasses.replace(BOUNDS, drain_s=1.0, max_tokens=4096)
    with Engine(toy, CONFIG) as engine:
        dispatch = engine.runner.dispatch
        engine.runner.dispatch = lambda turns: (time.sleep(0.2), dispatch(turns))[1]
        with serving(engine, bounds) as server:
            body = {"prompt": [1, 2], "max_tokens": 90, "ignore_eos": True, "stream": True}
            url = f"http://127.0.0.1:{server.port}/v1/completions"
            with httpx.stream("POST", url, json=body, headers=HEADERS, timeout=60) as reply:
                lines = reply.iter_lines()
                next(lines)
                begun = time.monotonic()
                server.stop()
                with pytest.raises(httpx.HTTPError):
                    list(lines)
                assert time.monotonic() - begun < 10
        engine.runner.dispatch = dispatch
        settled(engine)


def test_log_probabilities_of_a_stream(address):
    with client_of(address) as client:
        options = {"model": "toy", "messages": MESSAGES, "max_tokens": 6, "temperature": 0}
        options |= {"logprobs": True, "top_logprobs": 2}
        whole = client.chat.completions.create(**options).choices[0].logprobs.content
        parts = client.chat.completions.create(**options, stream=True)
        scores = [p.choices[0].logprobs for p in parts if p.choices]
        streamed = [entry for score in scores if score for entry in score.content]
        assert [e.token for e in streamed] == [e.token for e in whole]
        assert streamed[0].top_logprobs[0].logprob == pytest.approx(whole[0].logprob, abs=1e-4)


def test_every_class_of_openais_errors(toy, address):
    """Each that this server gives, as the official client sees it."""
    with client_of(address) as client, client_of(address, api_key="x") as stranger:
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(**BASE | {"temperature": 9})
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("another")
        with pytest.raises(openai.APIStatusError) as found:
            client.completions.create(model="toy", prompt="x" * 30_000)
        assert (found.value.status_code, found.value.code) == (413, "body_too_large")
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.001).completions.create(
                model="toy", prompt=[1], max_tokens=64
            )
    with serving(Engine(toy, CONFIG), ServerConfig(port=0)) as server:
        engine = server.app.engine
        url = f"http://127.0.0.1:{server.port}"
        foreign = {"Origin": "https://example.org"}
        with client_of(url, default_headers=foreign) as client:
            with pytest.raises(openai.PermissionDeniedError):
                client.models.list()
        with client_of(url) as client:
            engine.config = dataclasses.replace(engine.config, max_queue=1)
            go = threading.Event()
            engine.runner.dispatch = lambda _: (go.wait(30), 1 / 0)
            engine.submit(ask(prompt(3), 9))
            while not engine.stats().running:
                time.sleep(0.01)
            engine.submit(ask(prompt(3), 9))
            with pytest.raises(openai.RateLimitError, match="queue is full"):
                client.completions.create(model="toy", prompt=[1])
            engine.config = dataclasses.replace(engine.config, max_queue=9)
            parts = client.completions.create(model="toy", prompt=[1], stream=True)
            go.set()
            with pytest.raises(openai.APIError, match="ZeroDivisionError"):
                list(parts)
            with pytest.raises(openai.InternalServerError) as found:
                client.completions.create(model="toy", prompt=[1])
            assert found.value.status_code == 503
            engine.close()
    with client_of(url) as client, pytest.raises(openai.APIConnectionError):
        client.models.list()


def test_prompts_are_bounded_by_tokens(address):
    with client_of(address) as client:
        with pytest.raises(openai.BadRequestError, match="context") as found:
            client.completions.create(model="toy", prompt="x" * (4 * CONTEXT))
        assert found.value.code == "context_length_exceeded"
