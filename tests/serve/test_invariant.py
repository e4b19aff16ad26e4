"""The batch-invariant mode: the same bits for a request, alone and among others."""

import dataclasses

import pytest

from jaxllm.errors import ConfigError, UnsupportedError
from jaxllm.serve.config import EngineConfig
from jaxllm.serve.engine import Engine
from jaxllm.spec.ops import MLP
from tests.contracts.specs import SPECS
from tests.contracts.toys import LOCAL, heads, model, pre
from tests.serve.conftest import CONFIG, CONTEXT, ask, made, prompt
from tests.serve.test_engine import PENALIZED, SAMPLED

INVARIANT = dataclasses.replace(CONFIG, batch_invariant=True)
KINDS = [{}, SAMPLED | {"seed": 5}, PENALIZED | {"seed": 6}, {"logit_bias": {3: 2.0}}]
LENGTHS = (1, 3, 5, 16, 17, 30, 50, 30)
WIDE = MLP(width=768)


@pytest.fixture(scope="module")
def wide():
    """A toy whose sums are long enough for their order to be seen."""
    layers = pre("G", heads(4, 2, head_dim=32), WIDE), pre("L", heads(4, 2, mask=LOCAL), WIDE)
    return made(model(*layers, layers="G L", vocab=272, width=256, context=CONTEXT))


def asked(index: int, length: int, tenant: str):
    """One of several requests, whose prompt nobody of another tenant has left in pages."""
    kind = KINDS[index % len(KINDS)]
    return ask(prompt(length, seed=index), 8 + index, logprobs=5, tenant=tenant, **kind)


def pairs(model, config):
    """What each request gets alone, and among all others: tokens, and their scores to the bit."""
    with Engine(model, config) as engine:
        alone = [
            engine.generate(asked(i, length, f"alone {i}"))[0] for i, length in enumerate(LENGTHS)
        ]
        requests = [asked(i, length, "together") for i, length in enumerate(LENGTHS)]
        streams = [engine.submit(request) for request in requests]
        together = [stream.result()[0] for stream in streams]
        again = [engine.generate(request)[0] for request in requests]  # from pages that they left
        assert engine.stats().compilations == 0
        preempted = engine.stats().preemptions
    kept = [[(c.token_ids, c.logprobs) for c in some] for some in (alone, together, again)]
    return list(zip(*kept, strict=True)), preempted


@pytest.mark.parametrize(
    "changes",
    [{}, {"max_batch_tokens": 13}, {"cache_tokens": CONTEXT}],
    ids=["plain", "odd", "preempted"],
)
def test_a_request_gets_the_same_bits_whatever_else_is_on_its_way(wide, changes):
    found, preempted = pairs(wide, dataclasses.replace(INVARIANT, **changes))
    assert all(one == other == again for one, other, again in found)
    assert all(len(scores) == len(ids) > 0 for (ids, scores), *_ in found)
    assert preempted > 0 or "cache_tokens" not in changes


@pytest.mark.slow
@pytest.mark.parametrize("name", ["latent", "streaming", "capped_gated"])
def test_other_memories_too(name):
    found, _ = pairs(made(dataclasses.replace(SPECS[name], vocab=272, context=CONTEXT)), INVARIANT)
    assert all(one == other == again for one, other, again in found)


def test_programs_of_several_sizes_differ_in_the_last_bits(wide):
    """What the mode is for; the tokens are the same."""
    found, _ = pairs(wide, CONFIG)
    assert any(one != other for one, other, _ in found)
    assert all(one[0] == other[0] == again[0] for one, other, again in found)


def test_all_steps_are_one_program(toy):
    with Engine(toy, INVARIANT) as engine:
        (shape,) = engine.runner._shapes
    assert (shape.tokens, shape.rows, shape.longest) == (16, 4, 16)
    filled = EngineConfig(batch_invariant=True).filled(toy.spec)
    assert (filled.max_batch_tokens, filled.decode_steps) == (64, 1)


@pytest.mark.parametrize(
    ("name", "value"), [("draft_tokens", 3), ("mixed_tokens", 32), ("decode_steps", 4)]
)
def test_what_asks_for_another_program_is_refused(name, value):
    with pytest.raises(ConfigError, match=f"{name} asks for another: leave out {name}"):
        EngineConfig(batch_invariant=True, **{name: value})


@pytest.mark.parametrize("name", ["dual", "selective"])
def test_a_state_that_holds_all_tokens_in_one_is_refused(name):
    with pytest.raises(UnsupportedError, match="batch_invariant: this model has layers whose sta"):
        EngineConfig(batch_invariant=True).filled(SPECS[name])


def test_a_draft_model_is_refused(toy):
    with pytest.raises(UnsupportedError, match="a draft model needs others"):
        Engine(toy, INVARIANT, draft=toy)
