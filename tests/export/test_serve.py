"""`jaxllm run BUNDLE serve`: the server in front of a bundle, by OpenAI's client."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from jaxllm.cli.main import main
from jaxllm.export.engine import BundleEngine
from jaxllm.export.model import BundleModel, load_bundle
from jaxllm.serve.config import EngineConfig
from jaxllm.serve.http.app import App
from jaxllm.serve.request import Gone, Request
from tests.export.conftest import QUICK
from tests.export.test_run import BLOCK, ran
from tests.serve.test_http import BOUNDS, KEY, MESSAGES, serving

ASKED: dict[str, Any] = {"model": "toy", "max_tokens": 9, "temperature": 0}


@pytest.fixture(scope="module")
def model(talking: tuple[str, Path]) -> BundleModel:
    found = load_bundle(talking[1])
    found.bundle.way["compiler_options"] = QUICK
    return found


@pytest.fixture(scope="module")
def engine(model: BundleModel):
    with BundleEngine(model) as engine:
        yield engine


@pytest.fixture(scope="module")
def address(engine: BundleEngine):
    with serving(engine) as server:
        yield f"http://127.0.0.1:{server.port}"


@pytest.fixture(scope="module")
def client(address: str):
    with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def test_answers_are_those_of_generate(model, engine, client) -> None:
    before = engine.stats().compilations
    wanted = model.generate(MESSAGES, max_tokens=9)
    whole = client.chat.completions.create(messages=MESSAGES, **ASKED)
    assert whole.choices[0].message.content == wanted.text
    assert whole.choices[0].finish_reason == wanted.finish_reason
    assert whole.usage.completion_tokens == len(wanted.token_ids)
    assert whole.usage.prompt_tokens == len(wanted.prompt_token_ids)
    parts = client.chat.completions.create(messages=MESSAGES, stream=True, **ASKED)
    assert "".join(p.choices[0].delta.content or "" for p in parts) == wanted.text
    response = client.responses.create(model="toy", input="Hi", max_output_tokens=9, temperature=0)
    assert response.output_text == wanted.text
    plain = client.completions.create(prompt="abc", **ASKED)
    assert plain.choices[0].text == model.generate("abc", raw=True, max_tokens=9).text
    assert engine.stats().compilations == before


def test_sampling_seeds_and_ends(model, client) -> None:
    drawn = {"temperature": 1.2, "seed": 5, "top_p": 0.9, "presence_penalty": 0.5}
    reply = client.completions.create(prompt=[9, 8, 7], n=2, **ASKED | drawn)
    for index, choice in enumerate(reply.choices):
        options = {**drawn, "seed": 5 + index}
        assert choice.text == model.generate([9, 8, 7], max_tokens=9, **options).text
    text = model.generate("abc", raw=True, max_tokens=9).text
    stopped = client.completions.create(prompt="abc", stop=text[3:5], **ASKED)
    assert (
        stopped.choices[0].text
        == model.generate("abc", raw=True, max_tokens=9, stop=text[3:5]).text
    )
    assert stopped.choices[0].finish_reason == "stop"
    first = model.generate([9, 8, 7], max_tokens=1).token_ids[0]
    ended = client.completions.create(
        prompt=[9, 8, 7], **ASKED, extra_body={"stop_token_ids": [first]}
    )
    assert (ended.usage.completion_tokens, ended.choices[0].finish_reason) == (1, "stop")


@pytest.mark.parametrize(("change", "message"), [
    ({"logprobs": 2}, "log"), ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"extra_body": {"guided_regex": "a+"}}, "grammar"),
    ({"prompt": [1] * 64}, "context of 64"), ({"prompt": [9999]}, "token ids are in"),
    ({"max_tokens": 65}, "max_tokens"),
])  # fmt: skip
def test_what_a_bundle_does_not_do(client, change, message) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        client.completions.create(**ASKED | {"prompt": "x"} | change)


def test_the_rest_of_the_server(client, address) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    assert [m.id for m in client.models.list()] == ["toy"]
    for path in ("/health", "/ready", "/metrics", "/openapi.json", "/"):
        assert httpx.get(address + path, headers=headers).status_code == 200
    assert httpx.get(address + "/metrics").status_code == 401
    lines = httpx.get(address + "/metrics", headers=headers).text
    assert "jaxllm_compilations_after_ready_total 0.0" in lines
    with pytest.raises(openai.BadRequestError, match="vector"):
        client.embeddings.create(model="toy", input="x")


def held(engine: BundleEngine, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Every chunk waits for the event."""
    go, real = threading.Event(), engine.model.bundle.stream

    def stream(*args: Any, **more: Any) -> Any:
        for chunk in real(*args, **more):
            go.wait(30)
            yield chunk

    monkeypatch.setattr(engine.model.bundle, "stream", stream)
    return go


def until(fine: Any) -> None:
    end = time.monotonic() + 20
    while not fine():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_queue_is_bounded_and_hanging_up_leaves_it(model, monkeypatch) -> None:
    with BundleEngine(model, EngineConfig(max_queue=2)) as engine:
        go = held(engine, monkeypatch)
        with serving(engine, BOUNDS, lambda e, c: App("toy", e.model, e, c)) as server:
            url = f"http://127.0.0.1:{server.port}/v1/completions"
            body = {"prompt": [1, 2], "max_tokens": 30, "ignore_eos": True}
            headers = {"Authorization": f"Bearer {KEY}"}
            streams = [engine.submit(Request(prompt_ids=(1, 2), max_tokens=30)) for _ in range(2)]
            until(lambda: engine.stats().running == 1)
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(url, json=body, headers=headers, timeout=0.3)
            until(lambda: engine.stats().waiting == 1)  # the one who hung up is gone
            last = engine.submit(Request(prompt_ids=(3,), max_tokens=2, priority=-1))
            reply = httpx.post(url, json=body, headers=headers)
            assert (reply.status_code, reply.headers["retry-after"]) == (429, "1")
            streams[0].cancel()
            go.set()
            assert len(last.result()[0].token_ids) == 2
            assert streams[1].result()[0].finish_reason
            until(lambda: engine.stats().running == 0)


def test_a_dead_engine_ends_every_request(model, monkeypatch) -> None:
    with BundleEngine(model) as engine, serving(engine) as server:
        go = held(engine, monkeypatch)
        streams = [engine.submit(Request(prompt_ids=(1, 2), max_tokens=30)) for _ in range(3)]
        monkeypatch.setattr(engine.model.bundle, "run", lambda *_: 1 / 0)
        go.set()
        for stream in streams:
            with pytest.raises(Gone, match="ZeroDivisionError"):
                stream.result()
        web = httpx.Client(base_url=f"http://127.0.0.1:{server.port}")
        assert web.get("/health").status_code == 503
        headers = {"Authorization": f"Bearer {KEY}"}
        reply = web.post("/v1/completions", json={"prompt": [1]}, headers=headers)
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "10")
        web.close()


def test_closing_ends_what_runs(model, monkeypatch) -> None:
    with BundleEngine(model) as engine:
        go = held(engine, monkeypatch)
        streams = [engine.submit(Request(prompt_ids=(1, 2), max_tokens=30)) for _ in range(2)]
        until(lambda: engine.stats().running == 1)
        threading.Timer(0.2, go.set).start()
    for stream in streams:
        with pytest.raises(Gone, match="shutting down"):
            stream.result()


def test_a_public_address_needs_a_key(
    talking: tuple[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(talking[1]), "serve", "--host", "0.0.0.0"]) == 2
    assert "api-key" in capsys.readouterr().err


def test_the_server_needs_none_of_the_models_code() -> None:
    code = BLOCK.replace("NAMES", repr(("jaxllm.nn", "jaxllm.zoo", "flax")))
    code += "import jaxllm.export.engine, jaxllm.serve.http.app, jaxllm.serve.http.server\n"
    code += "import jaxllm.cli.run, jaxllm.serve.batch"
    assert ran("-c", code).stdout == ""


@pytest.mark.slow
def test_the_command(talking: tuple[str, Path]) -> None:
    """Without the model's code; SIGTERM ends it with 0."""
    code = BLOCK.replace("NAMES", repr(("jaxllm.nn", "jaxllm.zoo", "flax")))
    arguments = ["run", str(talking[1]), "serve", "--port", "0", "--api-key", KEY]
    code += f"from jaxllm.cli.main import main\nsys.exit(main({arguments!r}))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=os.environ
    ) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if ready := re.search(r"http://\S+", line):
                break
        assert ready, said
        with openai.OpenAI(base_url=ready[0] + "/v1", api_key=KEY) as client:
            (card,) = client.models.list()
            reply = client.chat.completions.create(
                model=card.id, messages=MESSAGES, max_tokens=5, temperature=0
            )
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        assert process.wait(timeout=60) == 0, rest
    wanted = load_bundle(talking[1]).generate(MESSAGES, max_tokens=5)
    assert (card.id, reply.choices[0].message.content) == ("toy", wanted.text)


def test_a_file_of_requests(talking, model, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("jaxllm.export.model.load_bundle", lambda *_, **__: model)
    body = {"model": "toy", "messages": MESSAGES, "max_tokens": 9, "temperature": 0}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    biased = {**line, "custom_id": "b", "body": {**body, "logit_bias": {"1": 5}}}
    requests, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    requests.write_text(f"{json.dumps(line)}\n{json.dumps(biased)}\n")
    assert main(["run", str(talking[1]), "batch", str(requests), str(answers)]) == 1
    assert "2 of 2 answered now, 0 before, 1 refused" in capsys.readouterr().err
    found = {
        x["custom_id"]: x["response"] for x in map(json.loads, answers.read_text().splitlines())
    }
    assert found["b"]["status_code"] == 400
    (choice,) = found["a"]["body"]["choices"]
    assert choice["message"]["content"] == model.generate(MESSAGES, max_tokens=9).text
