"""What else a model may remember: matrices, convolutions, latent vectors, windows, experts."""

import pytest

from jaxllm.serve.config import EngineConfig
from jaxllm.serve.engine import Engine
from tests.contracts.specs import SPECS
from tests.serve.conftest import ask, made
from tests.serve.test_engine import settled

CONFIG = EngineConfig(max_sequences=2, max_batch_tokens=16, page_size=4, cache_tokens=64)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["dual", "selective", "latent", "streaming", "capped_gated", "gqa"]
)
def test_together_as_if_alone(name):
    """More sequences than slots, two of them with one prompt, and too few pages for all."""
    model = made(SPECS[name])
    prompts = [list(range(3, 3 + n)) for n in (1, 20, 20, 33)]
    with Engine(model, CONFIG) as engine:
        streams = [engine.submit(ask(ids, 14)) for ids in prompts]
        found = [stream.result()[0].token_ids for stream in streams]
        settled(engine)
        assert all(page.held == 0 for page in engine.scheduler.pages.values())
    assert found == [model.generate(ids, max_tokens=14).token_ids for ids in prompts]
