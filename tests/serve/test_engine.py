"""The engine against the model alone: the same tokens whatever else is going on."""

import asyncio
import dataclasses
import threading
import time

import jax
import numpy as np
import pytest

from jaxllm.errors import CapacityError, ConfigError, ShapeError, UnsupportedError
from jaxllm.serve.engine import Engine
from jaxllm.serve.programs import shapes
from jaxllm.state.paged import page_axes
from tests.serve.conftest import CONFIG, CONTEXT, ask, prompt

LENGTHS = [1, 3, 4, 5, 16, 17, 30, 50]
SAMPLED = {"temperature": 1.3, "top_k": 60, "top_p": 0.95, "typical_p": 0.9, "min_p": 0.001}
PENALIZED = {"temperature": 1.0, "repetition_penalty": 1.4, "frequency_penalty": 0.5}


def alone(toy, request):
    """What `Model.generate` gives for a request."""
    options = dataclasses.asdict(request.sampling)
    ids = list(request.prompt_ids)
    return toy.generate(ids, max_tokens=request.max_tokens, **options).token_ids


def nobodys_hold_nan(engine):
    """Each pool has one page more than is handed out, the last; nothing that it holds is read."""
    setup, runner = engine.runner.setup, engine.runner
    pages = engine.scheduler.pages

    def spoiled(mark, pools):
        group, axis = mark

        def one(pool):
            assert pool.shape[axis] == pages[group].count + 1
            held = np.array(pool)
            np.moveaxis(held, axis, 0)[-1] = np.nan
            return jax.device_put(held, pool.sharding)

        return jax.tree.map(one, pools)

    marks, (state, other) = page_axes(setup.spec, setup.segments), runner.state
    state = jax.tree.map(spoiled, marks, state, is_leaf=lambda x: isinstance(x, tuple))
    runner.state = state, other


def settled(engine):
    """Nothing is held once all have their answers."""
    while engine.stats().running or engine.stats().waiting:
        time.sleep(0.001)
    for pages in engine.scheduler.pages.values():
        pages.check()
    assert engine.stats().held_pages == 0


@pytest.mark.parametrize("length", LENGTHS)
def test_one_request_is_model_generate(toy, engine, length):
    request = ask(prompt(length), 12)
    (choice,) = engine.generate(request)
    wanted = toy.generate(list(request.prompt_ids), max_tokens=12)
    assert (choice.token_ids, choice.text) == (wanted.token_ids, wanted.text)
    assert choice.finish_reason == wanted.finish_reason


def test_requests_among_others_are_as_if_alone(toy, engine):
    """Greedy, sampled and penalised ones together, more than there are slots and pages for."""
    kinds = [{}, SAMPLED | {"seed": 5}, PENALIZED | {"seed": 6}, {"temperature": 0.7, "seed": 9}]
    requests = [
        ask(prompt(length, seed=i), 10 + i, **kinds[i % 4])
        for i, length in enumerate([*LENGTHS, *LENGTHS[::-1]])
    ]
    before = engine.stats()
    streams = [engine.submit(request) for request in requests]
    found = [stream.result()[0].token_ids for stream in streams]
    assert found == [alone(toy, request) for request in requests]
    settled(engine)
    assert engine.stats().drawn_tokens - before.drawn_tokens == sum(map(len, found))


def test_steps_without_options_have_programs_of_their_own(toy, monkeypatch):
    """As on a GPU; other steps, and those before and after, take the others."""
    monkeypatch.setattr(
        "jaxllm.serve.parts.table",
        lambda *_: shapes(tokens=16, sequences=2, longest=16, contexts=(CONTEXT,), greedy=1),
    )
    config = dataclasses.replace(CONFIG, max_sequences=2, max_batch_tokens=16)
    plain, other = ask(prompt(5), 20), ask(prompt(9, seed=1), 6, **SAMPLED)
    with Engine(toy, config) as engine:
        used, dispatch = [], engine.runner.shape_of
        monkeypatch.setattr(
            engine.runner, "shape_of", lambda turns: used.append(dispatch(turns)) or used[-1]
        )
        streams = [engine.submit(plain), engine.submit(other)]
        found = [stream.result()[0].token_ids for stream in streams]
        (again,) = engine.generate(dataclasses.replace(plain, tenant="another"))
        kinds = {(shape.greedy, shape.longest == 1) for shape in used}
        (scored,) = engine.generate(dataclasses.replace(plain, logprobs=2))
        assert engine.stats().compilations == 0
    assert [*found, again.token_ids] == [alone(toy, one) for one in (plain, other, plain)]
    assert kinds == {(False, False), (False, True), (True, False), (True, True)}
    assert scored.token_ids == found[0] and len(scored.logprobs) == len(found[0])


def test_the_device_takes_several_steps_by_itself(toy, monkeypatch):
    """Answers of lengths that are no multiple, one with an end, one with options for a while, pages
    that run out; others come while it is at it."""
    config = dataclasses.replace(CONFIG, decode_steps=3, cache_tokens=CONTEXT + 24)
    requests = [ask(prompt(9, seed=i), 11 + 2 * i) for i in range(5)]
    requests += [ask(prompt(20, seed=9), 60), ask(prompt(7), 9, **SAMPLED)]
    end = alone(toy, requests[4])[7]
    requests[4] = dataclasses.replace(requests[4], stop_ids=(end,))
    with Engine(toy, config) as engine:
        used, dispatch = [], engine.runner.shape_of
        monkeypatch.setattr(
            engine.runner, "shape_of", lambda turns: used.append(dispatch(turns)) or used[-1]
        )
        streams = [engine.submit(request) for request in requests]
        found = [stream.result()[0].token_ids for stream in streams]
        assert engine.stats().compilations == 0
        settled(engine)
    wanted = [alone(toy, request) for request in requests]
    wanted[4] = wanted[4][: wanted[4].index(end) + 1]
    assert found == wanted
    assert {shape.steps for shape in used} == {1, 3}
    with pytest.raises(ConfigError, match="decode_steps is at most 16"):
        dataclasses.replace(CONFIG, decode_steps=17)


@pytest.mark.parametrize("ahead", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_pages_that_run_out_lose_nothing(toy, ahead):
    config = dataclasses.replace(CONFIG, cache_tokens=CONTEXT, ahead=ahead)
    requests = [ask(prompt(20, seed=i), 60, **(SAMPLED if i % 2 else {})) for i in range(6)]
    with Engine(toy, config) as engine:
        nobodys_hold_nan(engine)
        found = [s.result()[0].token_ids for s in [engine.submit(r) for r in requests]]
        assert engine.stats().preemptions > 0
        settled(engine)
    assert found == [alone(toy, request) for request in requests]


def test_a_prompt_finds_the_pages_of_an_earlier_one(toy, engine):
    first = ask(prompt(40, seed=77), 5)
    second = ask([*first.prompt_ids[:30], 7, 8, 9], 5)
    engine.generate(first)
    (choice,) = engine.generate(second)
    assert choice.cached_tokens == 28  # seven whole pages of four
    assert choice.token_ids == alone(toy, second)
    (other,) = engine.generate(dataclasses.replace(second, tenant="somebody else"))
    assert (other.cached_tokens, other.token_ids) == (0, choice.token_ids)
    (whole,) = engine.generate(first)
    assert whole.cached_tokens == 36  # one token at least is computed
    assert whole.token_ids == alone(toy, first)


def test_a_pinned_prefix_is_found_by_all(toy):
    """By every tenant and after anything else; what follows it is not shared."""
    prefix = prompt(22, seed=8)
    with Engine(toy, CONFIG) as engine:
        assert engine.pin(prefix) == 20
        for i in range(6):  # more than there is room for
            engine.generate(ask(prompt(60, seed=20 + i), 4))
        held = engine.stats().held_pages
        request = ask((*prefix, *prompt(9)), 6)
        for tenant, cached in (("a", 20), ("b", 20), ("a", 28)):
            (choice,) = engine.generate(dataclasses.replace(request, tenant=tenant))
            assert (choice.cached_tokens, choice.token_ids) == (cached, alone(toy, request))
        assert engine.stats().held_pages == held > 0
        with pytest.raises(CapacityError, match="cannot be pinned"):
            engine.pin(prompt(90, seed=30))
        assert engine.alive
    with Engine(toy, dataclasses.replace(CONFIG, prefix_cache=False)) as engine:
        with pytest.raises(UnsupportedError, match="prefix cache is on"):
            engine.pin(prefix)


def test_several_answers_share_the_prompt(toy, engine):
    request = ask(prompt(33, seed=3), 9, n=3, temperature=1.5, seed=40)
    choices = engine.generate(request)
    wanted = [
        alone(toy, ask(prompt(33, seed=3), 9, temperature=1.5, seed=40 + i)) for i in (0, 1, 2)
    ]
    assert [choice.token_ids for choice in choices] == wanted
    assert [choice.cached_tokens for choice in choices] == [0, 32, 32]
    settled(engine)


def test_logprobs_are_those_of_the_model(toy, engine):
    request = ask(prompt(9), 6, logprobs=3, temperature=1.0, seed=2)
    (choice,) = engine.generate(request)
    whole = [*request.prompt_ids, *choice.token_ids]
    logits = toy.logits([whole])[0, len(request.prompt_ids) - 1 : -1].astype(np.float64)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert [entry.token for entry in choice.logprobs] == choice.token_ids
    for row, entry in zip(logs, choice.logprobs, strict=True):
        assert entry.logprob == pytest.approx(row[entry.token], abs=1e-4)
        order = np.argsort(-row)[:3]
        assert [i for i, _ in entry.top] == order.tolist()
        assert [x for _, x in entry.top] == pytest.approx(row[order], abs=1e-4)


def test_a_bias_forbids_and_commands(engine):
    plain = engine.generate(ask(prompt(5), 6))[0].token_ids
    without = engine.generate(ask(prompt(5), 6, logit_bias={plain[0]: -100.0}))[0].token_ids
    assert plain[0] not in without
    always = engine.generate(ask(prompt(5), 6, logit_bias={17: 100.0}))[0].token_ids
    assert always == [17] * 6


def test_stops(toy, engine):
    request = ask(prompt(30), 40)
    plain = engine.generate(request)[0]
    text = plain.text
    stop = text[8:11]
    (choice,) = engine.generate(dataclasses.replace(request, stop=(stop,)))
    assert (choice.text, choice.finish_reason) == (text[: text.index(stop)], "stop")
    end = plain.token_ids[4]
    (choice,) = engine.generate(dataclasses.replace(request, stop_ids=(end,)))
    assert choice.token_ids == plain.token_ids[: plain.token_ids.index(end) + 1]
    assert choice.finish_reason == "stop"
    settled(engine)


def test_the_context_ends_an_answer(toy, engine):
    request = ask(prompt(CONTEXT - 3), 50)
    (choice,) = engine.generate(request)
    assert (choice.token_ids, choice.finish_reason) == (alone(toy, request), "length")
    assert len(choice.token_ids) == 3
    with pytest.raises(CapacityError, match=f"context of {CONTEXT}"):
        engine.submit(ask(prompt(CONTEXT), 1))


def test_a_cancelled_request_frees_its_pages(engine):
    stream = engine.submit(ask(prompt(10), 80, ignore_eos=True))
    next(iter(stream))
    stream.cancel()
    settled(engine)


def test_async(engine):
    async def run():
        loop = asyncio.get_running_loop()
        streams = [engine.submit(ask(prompt(n), 6), loop=loop) for n in (3, 9)]
        return [(await stream.gather())[0].token_ids for stream in streams]

    wanted = [engine.generate(ask(prompt(n), 6))[0].token_ids for n in (3, 9)]
    assert asyncio.run(run()) == wanted


def test_a_full_queue_refuses(toy):
    config = dataclasses.replace(CONFIG, max_sequences=1, max_queue=2, cache_tokens=CONTEXT)
    with Engine(toy, config) as engine:
        streams = []
        with pytest.raises(CapacityError, match="queue is full"):
            for _ in range(9):
                streams.append(engine.submit(ask(prompt(8), 80, ignore_eos=True)))
        assert len(streams) >= 2
        for stream in streams:
            stream.cancel()


def test_a_dead_engine_ends_every_request(toy, monkeypatch):
    engine = Engine(toy, CONFIG)
    assert engine.alive
    both = threading.Event()

    def die(_):
        both.wait()
        return 1 / 0

    monkeypatch.setattr(engine.runner, "dispatch", die)
    streams = [engine.submit(ask(prompt(n), 5)) for n in (2, 3)]
    both.set()
    for stream in streams:
        with pytest.raises(CapacityError, match="engine died: ZeroDivisionError"):
            stream.result()
    assert not engine.alive
    with pytest.raises(CapacityError, match="engine died"):
        engine.submit(ask(prompt(2), 5))
    engine.close()


def test_closing_ends_what_runs(toy):
    engine = Engine(toy, CONFIG)
    done = engine.submit(ask(prompt(5), 10))
    engine.close(drain_s=60.0)
    assert len(done.result()[0].token_ids) == 10
    engine = Engine(toy, CONFIG)
    cut = engine.submit(ask(prompt(5), 90, ignore_eos=True))
    engine.close()
    with pytest.raises(CapacityError, match="shutting down"):
        cut.result()


@pytest.mark.parametrize("wrong", [
    {"max_tokens": 0}, {"n": 0}, {"n": 129}, {"stop": ("",)}, {"stop": ("x",) * 17},
    {"logit_bias": {1: 101.0}}, {"logit_bias": dict.fromkeys(range(65), 1.0)}, {"logprobs": 21},
    {"prompt_ids": ()},
])  # fmt: skip
def test_a_request_out_of_bounds(wrong):
    with pytest.raises(ConfigError):
        dataclasses.replace(ask((1, 2)), **wrong)


def test_ids_outside_of_the_vocabulary(engine):
    with pytest.raises(ShapeError, match=r"0\.\.271"):
        engine.submit(ask((1, 272)))
    with pytest.raises(ShapeError, match="logit_bias"):
        engine.submit(ask((1, 2), logit_bias={999: 1.0}))


def test_nothing_compiles_after_ready(engine, counts):
    """A fuzzed mix of everything that a request can say."""
    random = np.random.default_rng(0)
    counts.look()
    before, streams = engine.stats(), []
    for i in range(40):
        options = [{}, SAMPLED, PENALIZED, {"temperature": 2.0}][random.integers(4)]
        more = {"n": int(random.integers(1, 4)), "priority": int(random.integers(3))}
        more |= {"logprobs": [None, 0, 20][random.integers(3)], "tenant": "ab"[i % 2]}
        if random.random() < 0.3:
            more["logit_bias"] = {int(random.integers(272)): 5.0}
        if random.random() < 0.3:
            more["stop"] = ("e", "ab")
        size, count = int(random.integers(1, 60)), int(random.integers(1, 20))
        streams.append(engine.submit(ask(prompt(size, seed=i % 5), count, **options, **more)))
        if random.random() < 0.2:
            streams.pop().cancel()
    for stream in streams:
        stream.result()
    settled(engine)
    assert counts.look() == (0, 0)
    assert engine.stats().compilations == before.compilations
