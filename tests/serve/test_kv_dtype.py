"""Pages of 8 bits in the engine: replies nearly those of float32 pages, nothing else changes."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxllm.cli.main import main
from jaxllm.core.precision import dtype_of
from jaxllm.errors import ConfigError, UnsupportedError
from jaxllm.serve.config import EngineConfig, lay_out, table
from jaxllm.serve.engine import Engine
from jaxllm.state.paged import page_bytes
from tests.contracts.specs import SPECS
from tests.serve.conftest import CONFIG, CONTEXT, SPEC, ask, made, prompt
from tests.serve.test_mesh import on

LENGTHS = [1, 5, 17, 40]


def scored(engine, ids, count=12):
    """(tokens, log probability of each) of a greedy answer, and of its most likely alternatives."""
    (choice,) = engine.generate(ask(ids, count, logprobs=5))
    return choice


def alternatives(choice) -> list[dict[int, float]]:
    return [dict(entry.top) for entry in choice.logprobs]


@pytest.mark.parametrize("kv_dtype", ["int8", pytest.param("fp8", marks=pytest.mark.slow)])
def test_replies_are_close_and_nothing_compiles(toy, engine, kv_dtype):
    """The log probabilities of the first token, which both compute from the same prompt, and a
    prompt that finds an earlier one's pages as if it had computed them."""
    config = dataclasses.replace(CONFIG, kv_dtype=kv_dtype, max_sequences=2)
    with Engine(toy, config) as other:
        dtypes = {str(x.dtype) for x in jax.tree.leaves(other.runner.state)}
        streams = [other.submit(ask(prompt(n), 12, logprobs=5)) for n in LENGTHS]
        together = [stream.result()[0] for stream in streams]
        alone = [scored(other, prompt(n)) for n in LENGTHS]
        assert other.stats().compilations == 0
        assert other.stats().held_pages == 0
    assert dtypes == {{"int8": "int8", "fp8": "float8_e4m3fn"}[kv_dtype], "float32"}
    assert alone[-1].cached_tokens == 36
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    errors = []
    for n, choice in zip(LENGTHS, alone, strict=True):
        wanted, found = (alternatives(c)[0] for c in (scored(engine, prompt(n)), choice))
        errors += [found[token] - wanted[token] for token in wanted.keys() & found.keys()]
    assert len(errors) >= 4 * len(LENGTHS)
    assert 1e-6 < np.abs(errors).max() < {"int8": 0.05, "fp8": 0.3}[kv_dtype]


@pytest.mark.slow
def test_two_devices_and_drafts_answer_as_one_device_without(toy):
    config = dataclasses.replace(CONFIG, kv_dtype="int8", max_sequences=2)
    requests = [ask(prompt(n), 20) for n in LENGTHS] + [ask(prompt(7) * 3, 24)]

    def answers(model, config):
        with Engine(model, config) as engine:
            streams = [engine.submit(request) for request in requests]
            found = [stream.result()[0].token_ids for stream in streams]
            assert engine.stats().compilations == 0
            return found, engine.runner.state

    wanted, _ = answers(toy, config)
    found, state = answers(on(tensor=2), config)
    assert found == wanted
    pools = jax.tree.leaves(state)
    assert all(2 * x.addressable_shards[0].data.size == x.size for x in pools)
    drafted, _ = answers(toy, dataclasses.replace(config, draft_tokens=3, draft_cost=0.01))
    assert drafted == wanted


@pytest.mark.slow
@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_pages_of_8_bits_go_to_the_host_and_come_back(toy, kv_dtype):
    """With their scales: answers are those of an engine that keeps all."""
    config = dataclasses.replace(CONFIG, kv_dtype=kv_dtype, max_sequences=2)
    requests = [ask(prompt(60, seed=i % 3), 8) for i in range(9)]

    def answers(config):
        with Engine(toy, config) as engine:
            found = [engine.generate(request)[0].token_ids for request in requests]
            return found, engine.stats()

    wanted, _ = answers(dataclasses.replace(config, cache_tokens=1024))
    tight = dataclasses.replace(config, cache_tokens=CONTEXT, spill_gib=2**-12)
    found, stats = answers(tight)
    assert found == wanted
    assert stats.spilled_pages > 0 and stats.restored_pages > 0 and stats.compilations == 0


def test_more_tokens_fit(toy, monkeypatch):
    """A byte a number and eight for both scales of a head, where float32 takes four a number."""
    monkeypatch.setattr("jaxllm.serve.config._budget", lambda *_: 40_000)
    setup, tokens, size = toy.generator.setup, {}, {}
    for kv_dtype in ("auto", "int8", "fp8"):
        bounds = EngineConfig(max_sequences=4, max_batch_tokens=16, page_size=4, context=96)
        config = dataclasses.replace(bounds, kv_dtype=kv_dtype).filled(SPEC)
        memory = lay_out(setup, config, table(setup, config), None)
        assert memory.kv_dtype == kv_dtype
        how = {"page_size": 4, "dtype": dtype_of("float32"), "kv_dtype": kv_dtype}
        size[kv_dtype] = page_bytes(SPEC, **how)
        held = sum(size[kv_dtype][group] * count for group, count in memory.pages.items())
        assert 20_000 < held <= 40_000
        tokens[kv_dtype] = memory.pages["all"]
    ratio = size["auto"]["all"] / size["int8"]["all"]
    assert ratio == 4 * 8 / (8 + 4)
    assert tokens["int8"] == tokens["fp8"] > 2 * tokens["auto"]


def test_bad_names_and_models_that_cannot(capsys):
    with pytest.raises(ConfigError, match="kv_dtype 'int4' is unknown; did you mean 'int8'"):
        EngineConfig(kv_dtype="int4")
    with pytest.raises(UnsupportedError, match="use 'auto'"):
        Engine(made(SPECS["latent"]), dataclasses.replace(CONFIG, kv_dtype="int8", context=12))
    with pytest.raises(SystemExit):
        main(["serve", "x", "--kv-dtype", "int4"])
    assert "kv-dtype" in capsys.readouterr().err
