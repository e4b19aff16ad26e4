"""A toy model served with few pages and tiny steps, so that every branch is taken."""

import dataclasses
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxllm
from jaxllm.aot.store import Store
from jaxllm.core.policy import Policy
from jaxllm.core.tree import segments_of
from jaxllm.infer.generate import Generator
from jaxllm.infer.programs import Setup
from jaxllm.infer.sampling import Sampling
from jaxllm.serve.config import EngineConfig
from jaxllm.serve.engine import Engine
from jaxllm.serve.request import Request
from jaxllm.spec.model import ModelSpec
from jaxllm.text.tokenizer import Tokenizer
from tests.aot.conftest import counts  # noqa: F401 - a fixture
from tests.contracts.specs import LOCAL, MLP48, RMS, heads, model, pre, redraw
from tests.text.toys import byte_tokenizer

CONTEXT = 96
SPEC = dataclasses.replace(
    model(
        pre("G", heads(4, 2, qkv_bias=True), MLP48),
        pre("L", heads(4, 2, mask=LOCAL), MLP48),
        layers="G L",
        vocab=272,
        final_norm=RMS,
    ),
    context=CONTEXT,
)
CONFIG = EngineConfig(max_sequences=4, max_batch_tokens=16, page_size=4, cache_tokens=160)


STORE = Store(Path(tempfile.mkdtemp(prefix="jaxllm-serve-programs-")))


def made(spec: ModelSpec, tokenizer: Tokenizer | None = None) -> jaxllm.Model:
    """A model of random weights that decodes on and on; programs are compiled quickly and once."""
    policy, weights = Policy(), redraw(spec)
    params = jax.tree.map(jax.device_put, weights)
    setup = Setup(
        spec=spec,
        policy=policy,
        params=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), weights),
        segments=segments_of(weights["layers"]),
        options=(("xla_backend_optimization_level", 0),),
    )
    return jaxllm.Model(
        spec=spec,
        params=params,
        tokenizer=tokenizer,
        policy=policy,
        eos_ids=(),
        generator=Generator(setup, params, STORE, tokens_per_call=4, ahead=0),
    )


@pytest.fixture(scope="session")
def toy() -> jaxllm.Model:
    """The model, which answers alone."""
    return made(SPEC, byte_tokenizer())


@pytest.fixture(scope="session")
def engine(toy: jaxllm.Model):
    """The same model, served."""
    with Engine(toy, CONFIG) as engine:
        yield engine


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    """Random ids."""
    random = np.random.default_rng(1000 * seed + length)
    return tuple(random.integers(0, 256, length).tolist())


def ask(ids, count: int = 8, **more) -> Request:
    """A request; options of `Sampling` among the others."""
    names = {field.name for field in dataclasses.fields(Sampling)}
    sampling = Sampling(**{k: v for k, v in more.items() if k in names})
    rest = {k: v for k, v in more.items() if k not in names}
    return Request(prompt_ids=tuple(ids), max_tokens=count, sampling=sampling, **rest)
