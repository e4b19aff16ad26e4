"""SmolLM2 by OpenAI's client: transformers' greedy tokens, alone and in a crowd."""

import concurrent.futures
import random

import openai
import pytest

import jaxllm
from jaxllm.serve.config import EngineConfig
from jaxllm.serve.engine import Engine
from jaxllm.serve.http.app import App
from tests.oracle.test_smollm2 import CHATS, source  # noqa: F401 - a fixture
from tests.serve.test_http import BOUNDS, KEY, serving

pytestmark = pytest.mark.slow

BOUNDED = EngineConfig(context=512, cache_tokens=4096, max_sequences=8, max_batch_tokens=64)


@pytest.fixture(scope="module")
def model(source):  # noqa: F811
    return jaxllm.load(source, dtype="float32")


@pytest.fixture(scope="module")
def client(model):
    with Engine(model, BOUNDED) as engine:
        with serving(engine, BOUNDS, lambda e, c: App("smollm2", e.model, e, c)) as server:
            url = f"http://127.0.0.1:{server.port}/v1"
            with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=600) as client:
                yield client
        assert engine.stats().compilations == 0


def answered(client, chat):
    """(text, the text of each token) of a greedy answer."""
    reply = client.chat.completions.create(
        model="smollm2", messages=chat["messages"], max_tokens=24, temperature=0, logprobs=True
    )
    (choice,) = reply.choices
    return choice.message.content, [entry.token for entry in choice.logprobs.content]


def wanted(model, chat):
    """The same of transformers' tokens."""
    special = set(model.eos_ids)
    text = model.tokenizer.decode([i for i in chat["greedy"] if i not in special])
    return text, [model.tokenizer.decode([i], skip_special=False) for i in chat["greedy"]]


def test_alone(model, client):
    for chat in CHATS:
        assert answered(client, chat) == wanted(model, chat)


def test_among_64_others(model, client):
    """Sampled and greedy ones of all lengths, that come and go meanwhile."""
    draw = random.Random(1)
    words = ["the", "of", "sea", "and", "a", "lighthouse", "storm", "why", "ship", "one", "two"]

    def other(number):
        text = " ".join(draw.choice(words) for _ in range(draw.randint(1, 60)))
        options = [{"temperature": 0}, {"temperature": 1.3, "top_p": 0.9}, {"presence_penalty": 1}]
        return client.completions.create(
            model="smollm2", prompt=text, max_tokens=draw.randint(4, 24), **options[number % 3]
        )

    with concurrent.futures.ThreadPoolExecutor(64 + len(CHATS)) as pool:
        others = [pool.submit(other, number) for number in range(32)]
        asked = [pool.submit(answered, client, chat) for chat in CHATS]
        others += [pool.submit(other, number) for number in range(32)]
        for chat, found in zip(CHATS, asked, strict=True):
            assert found.result() == wanted(model, chat)
        assert all(done.result().usage.completion_tokens for done in others)
