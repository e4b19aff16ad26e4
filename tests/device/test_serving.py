"""The batch-invariant mode on a GPU: JAX_PLATFORMS=cuda,cpu pytest -m gpu tests/device."""

import jax
import pytest

import jaxllm
from jaxllm.serve.config import EngineConfig
from tests.serve.test_invariant import pairs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a CUDA device"),
]


def test_a_request_gets_the_same_bits_whatever_else_is_on_its_way() -> None:
    model = jaxllm.load("random:llama-3.2-1b", dtype="bfloat16")
    bounds = {"max_sequences": 4, "max_batch_tokens": 64, "context": 128, "cache_tokens": 512}
    found, _ = pairs(model, EngineConfig(batch_invariant=True, **bounds))
    assert all(one == other == again for one, other, again in found)
