"""The server's own OpenAPI document, and a stranger's tool that holds the server to it."""

import dataclasses
import subprocess
import sys

import httpx
import pytest

from jaxllm.serve.engine import Engine
from tests.serve.conftest import CONFIG, SPEC, made
from tests.serve.test_engine import settled
from tests.serve.test_http import BOUNDS, KEY, serving
from tests.text.toys import byte_tokenizer

HEADERS = {"Authorization": f"Bearer {KEY}"}
ROOMY = dataclasses.replace(BOUNDS, max_body_bytes=4 << 20)  # 413 is no 400


@pytest.fixture(scope="module")
def address(engine):
    with serving(engine, ROOMY) as server:
        yield f"http://127.0.0.1:{server.port}"


@pytest.fixture(scope="module")
def document(address):
    return httpx.get(f"{address}/openapi.json", headers=HEADERS).json()


def body_of(document, path):
    return document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]


def test_it_says_what_is_checked(document):
    """Bounds come from the server's own configuration, through the code that checks them."""
    schema = body_of(document, "/v1/chat/completions")
    fields = schema["properties"]
    assert fields["n"] == {"type": ["integer", "null"], "minimum": 1, "maximum": BOUNDS.max_n}
    assert fields["max_tokens"]["maximum"] == BOUNDS.max_tokens
    assert fields["messages"]["maxItems"] == BOUNDS.max_messages
    assert fields["model"] == {"enum": ["toy", None]}
    assert (schema["required"], schema["additionalProperties"]) == (["messages"], False)
    assert "messages" not in body_of(document, "/v1/completions")["properties"]
    assert set(document["paths"]) >= {"/", "/health", "/ready", "/metrics", "/openapi.json"}
    for path, ways in document["paths"].items():
        (way,) = ways.values()
        assert way["summary"]
        assert bool(way.get("security")) == (path not in ("/health", "/ready"))


def test_every_field_of_the_document_is_read(document, address):
    """And each answers to null, as if it were not there."""
    for path, needed in (("chat/completions", "messages"), ("completions", "prompt")):
        names = body_of(document, f"/v1/{path}")["properties"]
        given = {"messages": [{"role": "user", "content": "x"}], "prompt": [1]}
        body = dict.fromkeys(names) | {needed: given[needed], "max_tokens": 1}
        body.pop("max_completion_tokens", None)
        reply = httpx.post(f"{address}/v1/{path}", json=body, headers=HEADERS)
        assert reply.status_code == 200, reply.text


@pytest.mark.parametrize("text", ['"\\ud800"', '"\\uDFFF x"', '{"\\ud83d": 1}'])
def test_half_a_character_is_refused(address, text):
    """JSON can say what UTF-8 cannot."""
    body = f'{{"messages": [{{"role": "user", "content": {text}}}], "user": {text}}}'
    for path in ("/v1/chat/completions", "/tokenize", "/v1/responses"):
        reply = httpx.post(address + path, content=body, headers=HEADERS)
        assert (reply.status_code, "UTF-8" in reply.text) == (400, True)
    body = '{"messages": [{"role": "user", "content": "\\ud83d\\ude00"}], "max_tokens": 1}'
    reply = httpx.post(f"{address}/v1/chat/completions", content=body, headers=HEADERS)
    assert reply.status_code == 200


def test_405_says_what_is_allowed(address):
    reply = httpx.get(f"{address}/v1/completions", headers=HEADERS)
    assert (reply.status_code, reply.headers["allow"]) == (405, "POST")


def fuzzed(address, *options):
    """schemathesis: data that fits the document and data that does not, every check but one.

    What fits the document may still be refused: fields can exclude each other.
    """
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{address}/openapi.json"]
    command += ["-H", f"Authorization: Bearer {KEY}", "--mode", "all", "--continue-on-failure"]
    command += ["--checks", "all", "--exclude-checks", "positive_data_acceptance"]
    command += ["--generation-database", "none", "--no-color", "--request-timeout", "60", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "11/11" in done.stdout
    return done.stdout


def test_a_stranger_finds_nothing(engine, address):
    """The same requests each time; the slow test below draws new ones."""
    before = engine.stats().compilations
    fuzzed(address, "--phases", "examples,fuzzing,stateful", "-n", "3", "--seed", "0")
    settled(engine)
    assert engine.stats().compilations == before


@pytest.mark.slow
def test_a_stranger_finds_nothing_in_all_phases():
    """In an engine of its own, so that compilations of other tests are not counted."""
    bounds = dataclasses.replace(ROOMY, max_tokens=8)
    model = made(SPEC, byte_tokenizer())
    with Engine(model, CONFIG) as engine, serving(engine, bounds) as server:
        address = f"http://127.0.0.1:{server.port}"
        out = fuzzed(address, "--phases", "examples,coverage,fuzzing,stateful", "-n", "100")
        assert all(f"✅ {phase}" in out for phase in ("Coverage", "Fuzzing", "Stateful"))
        settled(engine)
        counts = httpx.get(f"{address}/metrics", headers=HEADERS).text
        assert 'status="200"' in counts
        assert 'status="5' not in counts
        assert "jaxllm_compilations_after_ready_total 0.0" in counts
