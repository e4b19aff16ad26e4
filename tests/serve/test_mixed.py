"""Steps that compute prompts while others decode, bounded by `mixed_tokens`."""

import dataclasses

import pytest

from jaxllm.errors import ConfigError
from jaxllm.serve.config import table
from jaxllm.serve.engine import Engine
from jaxllm.serve.pace import Cadence
from jaxllm.serve.programs import shapes
from tests.serve.conftest import CONFIG, ask, prompt
from tests.serve.test_engine import alone, settled


@pytest.mark.parametrize(("each", "tokens"), [(0.001, 512), (0.01, 64), (0.1, 8), (9.0, 8)])
def test_as_many_tokens_as_leave_steps_even(each, tokens):
    """Steps of one and `each` a token, in which four decode; at first the fewest, then one size
    more at a time, and never one that takes over 1.8 times a step of decoding for long."""
    cadence, took = Cadence([8, 16, 64, 256, 512]), []
    assert cadence.tokens(4) == 8
    cadence.learn(4, 1 + 4 * each, decode=True)
    for _ in range(50):
        found = cadence.tokens(4)
        assert not took or found <= 4 * max(took)
        took.append(found)
        cadence.learn(found, 1 + found * each, decode=False)
    assert took[-1] == tokens
    assert all((1 + size * each) <= 1.8 * (1 + 4 * each) for size in took if size > 8)
    assert cadence.tokens(100) in (256, 512) and cadence.tokens(600) == 512


def test_a_size_that_was_slow_once_is_tried_again():
    cadence = Cadence([8, 16])
    cadence.learn(4, 1.0, decode=True)
    cadence.learn(8, 1.0, decode=False)
    cadence.learn(16, 9.0, decode=False)
    assert cadence.tokens(4) == 8
    for _ in range(600):
        cadence.learn(8, 1.0, decode=False)
    assert cadence.tokens(4) == 16


@pytest.mark.slow
def test_answers_by_the_clock_are_the_same(toy):
    """Whatever sizes are taken."""
    requests = [ask(prompt(3 + 9 * i, seed=i), 14) for i in range(6)]
    with Engine(toy, dataclasses.replace(CONFIG, mixed_tokens="auto")) as engine:
        found = [s.result()[0].token_ids for s in [engine.submit(one) for one in requests]]
        assert engine.scheduler.cadence is not None
        assert engine.stats().compilations == 0
        settled(engine)
    assert found == [alone(toy, request) for request in requests]


def test_few_tokens_of_prompts_have_a_program_of_their_own(toy, monkeypatch):
    """A step that `mixed_tokens` bounds costs what so many tokens do, not the next size."""
    config = dataclasses.replace(CONFIG, mixed_tokens=6)
    requests = [ask(prompt(3), 30, ignore_eos=True), ask(prompt(50), 4)]
    with Engine(toy, config) as engine:
        sizes, dispatch = [], engine.runner.dispatch

        def spied(turns):
            shape = engine.runner.shape_of(turns)
            sizes.append((len(turns), shape.tokens, shape.longest > 1))
            return dispatch(turns)

        monkeypatch.setattr(engine.runner, "dispatch", spied)
        streams = [engine.submit(requests[0])]
        next(iter(streams[0]))
        streams.append(engine.submit(requests[1]))
        assert streams[1].result()[0].token_ids == alone(toy, requests[1])
        settled(engine)
        mixed = {tokens for rows, tokens, chunk in sizes if rows == 2 and chunk}
        assert mixed == {6}


@pytest.mark.parametrize(
    ("mixed", "tokens"), [(None, {4, 16}), (6, {4, 6, 16}), (16, {4, 16}), ("auto", {4, 8, 16})]
)
def test_the_table_with_a_bound_on_mixed_steps(toy, mixed, tokens):
    config = dataclasses.replace(CONFIG, mixed_tokens=mixed).filled(toy.spec)
    sizes = table(toy.generator.setup, config)
    assert {s.tokens for s in sizes if s.tokens >= 4} == tokens
    assert sizes[-1].tokens == 16  # the largest comes last
    assert len(set(sizes)) == len(sizes)
    with pytest.raises(ConfigError, match="mixed_tokens is a number or auto, found 'even'"):
        dataclasses.replace(CONFIG, mixed_tokens="even")


def test_mixed_steps_without_options_on_an_accelerator():
    """One program more for each number of tokens, with the most rows; the table stays closed."""
    table = shapes(tokens=2048, sequences=256, longest=2048, contexts=(8192,), greedy=4)
    mixed = [(s.tokens, s.rows) for s in table if s.greedy and s.longest > 1]
    assert mixed == [(16, 8), (64, 64), (256, 256), (1024, 256), (2048, 256)]
    assert len(set(table)) == len(table) == 35
    assert (table[-1].tokens, table[-1].greedy) == (2048, False)
    alone = shapes(tokens=256, sequences=1, longest=256, contexts=(8192,), greedy=1)
    assert not any(s.greedy and s.longest > 1 for s in alone)
