"""Vectors over HTTP are those of the model; nothing compiles for any mix of lengths."""

import dataclasses

import numpy as np
import openai
import pytest

from jaxllm.errors import UnsupportedError
from jaxllm.serve.embedder import Embedder
from jaxllm.serve.engine import Engine
from jaxllm.serve.http.app import App
from jaxllm.spec.mask import Full
from jaxllm.spec.model import Pooling
from tests.aot.conftest import counts  # noqa: F401 - a fixture
from tests.contracts.specs import MLP48, heads, model, pre
from tests.serve.conftest import CONFIG, made
from tests.serve.test_http import BASE, BOUNDS, KEY, serving
from tests.text.toys import byte_tokenizer

SPEC = dataclasses.replace(
    model(pre("G", heads(4, 2, mask=Full()), MLP48), layers="G", vocab=272), context=32
)
TEXTS = ["a", "some more", "x" * 20, "b" * 50, "", "c d e f", "g", "h" * 9, "ij" * 8]


@pytest.fixture(scope="module")
def encoder():
    return made(SPEC, byte_tokenizer())


@pytest.fixture(scope="module")
def embedder(encoder):
    with Embedder(encoder, max_tokens=24) as embedder:
        yield embedder


def test_vectors_are_the_models(encoder, embedder, counts):  # noqa: F811
    texts = [text for text in TEXTS if text]
    wanted = np.stack([encoder.embed(t[:24])[0] for t in texts])
    counts.look()
    found, tokens = embedder.embed(texts)
    assert np.abs(found - wanted).max() < 1e-5
    assert tokens == sum(min(len(t), 24) for t in texts)
    for count in range(1, 9):
        embedder.embed([list(range(1, 1 + n)) for n in range(1, 1 + count)])
    assert counts.look() == (0, 0)


def test_over_http(encoder, embedder):
    app_engine = type("NoEngine", (), {"model": encoder})
    with serving(
        app_engine, make=lambda e, c: App("toy", encoder, None, c, embedder=embedder)
    ) as s:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{s.port}/v1", api_key=KEY, max_retries=0)
        reply = client.embeddings.create(model="toy", input=["abc", "de"])
        plain = client.embeddings.create(model="toy", input="abc", encoding_format="float")
        assert np.allclose(reply.data[0].embedding, encoder.embed("abc")[0], atol=1e-5)
        assert np.allclose(plain.data[0].embedding, reply.data[0].embedding)
        assert (reply.usage.prompt_tokens, len(reply.data)) == (5, 2)
        ids = client.embeddings.create(model="toy", input=[[1, 2], [3]])
        assert np.allclose(ids.data[1].embedding, encoder.embed([3])[0], atol=1e-5)
        for wrong in ([], [1] * 25, ["a"] * 5, 7, [""], [999]):
            with pytest.raises(openai.BadRequestError):
                client.embeddings.create(model="toy", input=wrong)
        with pytest.raises(openai.BadRequestError, match="encoder"):
            client.chat.completions.create(**BASE)
        client.close()


def test_a_decoder_that_does_not_pool(toy):
    with Engine(toy, CONFIG) as engine, serving(engine, BOUNDS) as server:
        client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{server.port}/v1", api_key=KEY, max_retries=0
        )
        with pytest.raises(openai.BadRequestError, match="become a vector"):
            client.embeddings.create(model="toy", input="a")
        client.close()


def test_too_many_lengths_are_refused(encoder, monkeypatch):
    monkeypatch.setattr("jaxllm.serve.embedder.MOST_LENGTHS", 1)
    with pytest.raises(UnsupportedError, match=r"Model\.embed"):
        Embedder(encoder)
    assert Pooling().by == "mean"
