"""An engine over several devices answers as one over one."""

import dataclasses

import jax
import pytest

import jaxllm
from jaxllm.aot.program import abstract_like
from jaxllm.core.mesh import make_mesh
from jaxllm.core.policy import Policy
from jaxllm.core.sharding import shard
from jaxllm.core.tree import segments_of
from jaxllm.errors import UnsupportedError
from jaxllm.infer.generate import Generator
from jaxllm.infer.programs import Setup
from jaxllm.nn import api
from jaxllm.serve.engine import Engine
from tests.contracts.specs import redraw
from tests.serve.conftest import CONFIG, SPEC, STORE, ask, prompt
from tests.serve.test_engine import PENALIZED, SAMPLED, alone, settled

SMALL = dataclasses.replace(CONFIG, max_sequences=2, decode_steps=2)


def on(**axes: int) -> jaxllm.Model:
    """The toy on a mesh."""
    mesh, policy, weights = make_mesh(axes), Policy(), redraw(SPEC)
    params = shard(weights, api.param_shardings(SPEC, weights, mesh, policy))
    setup = Setup(
        spec=SPEC,
        policy=policy,
        params=jax.tree.map(abstract_like, params),
        segments=segments_of(weights["layers"]),
        mesh=mesh,
        options=(("xla_backend_optimization_level", 0),),
    )
    generator = Generator(setup, params, STORE)
    return jaxllm.Model(
        spec=SPEC, params=params, tokenizer=None, policy=policy, eos_ids=(), generator=generator
    )


@pytest.mark.parametrize("draft", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_devices_answer_as_one(toy, counts, draft):
    """Greedy, sampled and penalised ones, alone for a while, more than slots; a prefix found."""
    model = on(tensor=2)
    requests = [ask(prompt(5 + 7 * i, seed=i), 12, **kind)
                for i, kind in enumerate([{}, SAMPLED, PENALIZED, {}, {}])]  # fmt: skip
    requests.append(ask((*requests[4].prompt_ids, 1, 2, 3), 8))
    config = dataclasses.replace(SMALL, draft_tokens=1, draft_cost=0.01) if draft else SMALL
    with Engine(model, config, draft=model if draft else None) as engine:
        pools = jax.tree.leaves(engine.runner.state)
        assert {pool.sharding.spec[-2] for pool in pools} == {"tensor"}
        assert all(2 * p.addressable_shards[0].data.size == p.size for p in pools)
        counts.look()
        streams = [engine.submit(request) for request in requests]
        found = [stream.result()[0] for stream in streams]
        assert counts.look() == (0, 0)
        settled(engine)
        assert (engine.stats().accepted_tokens > 0) == draft
    assert [choice.token_ids for choice in found] == [alone(toy, request) for request in requests]
    assert found[-1].cached_tokens > 0


def test_meshes_that_do_not_divide(toy):
    with pytest.raises(UnsupportedError, match=r"2 heads of keys.*nearest that works is tensor=2"):
        Engine(on(tensor=4), SMALL)
    with pytest.raises(UnsupportedError, match=r"found data; take a mesh such as tensor=2"):
        Engine(on(data=2), SMALL)
    with pytest.raises(UnsupportedError, match="lie on different meshes"):
        Engine(on(tensor=2), SMALL, draft=toy)
