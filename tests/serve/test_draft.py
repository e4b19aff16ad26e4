"""A draft model changes when tokens come, never which: by itself, among others, in distribution."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.errors import UnsupportedError
from jaxllm.infer.sampling import Sampling
from jaxllm.ops.sampling import sample
from jaxllm.serve import grammar
from jaxllm.serve.engine import Engine
from jaxllm.serve.pace import Pace
from jaxllm.serve.steps import _accepted, _Places
from tests.contracts.specs import MLP48, RMS, SPECS, heads, model, pre
from tests.serve.conftest import CONFIG, CONTEXT, SPEC, ask, made, prompt
from tests.serve.test_engine import PENALIZED, SAMPLED, alone, settled
from tests.serve.test_speculation import fitness

DRAFTING = dataclasses.replace(CONFIG, max_sequences=2, draft_tokens=3, draft_cost=0.01)
KINDS = [{}, SAMPLED | {"seed": 5}, PENALIZED | {"seed": 6}, {"temperature": 0.7, "seed": 9}]


def small(**changes):
    """A draft of one layer, that remembers more or less of each token than the model does."""
    spec = model(pre("G", heads(2, 1), MLP48), layers="G", vocab=272, final_norm=RMS)
    return made(dataclasses.replace(spec, **({"context": CONTEXT} | changes)))


@pytest.fixture(scope="module")
def own(toy):
    """The model, rounded, as its own draft."""
    with Engine(toy, DRAFTING, draft=toy.quantize("int8")) as engine:
        yield engine


def counted(engine, before):
    now = engine.stats()
    names = ("drafted_tokens", "accepted_tokens", "steps", "drawn_tokens")
    return [getattr(now, name) - getattr(before, name) for name in names]


@pytest.mark.parametrize("options", KINDS)
def test_one_request_is_as_if_alone(toy, own, options):
    before = own.stats()
    request = ask(prompt(9, seed=2), 40, **options)
    (choice,) = own.generate(request)
    assert choice.token_ids == alone(toy, request)
    drafted, accepted, steps, drawn = counted(own, before)
    assert drawn == 40 and 0 < accepted <= drafted
    if options.get("repetition_penalty") is None:  # the draft does not see penalties
        assert accepted > 0.6 * drafted and steps < 28
    settled(own)


def test_requests_among_others(toy, own, counts):
    """More than there are slots for, of all kinds; a grammar among them; prompts that come in late
    and find pages; nothing is compiled."""
    requests = [ask(prompt(5 + 4 * i, seed=i), 24 + i, **KINDS[i % 4]) for i in range(8)]
    requests.append(ask((*requests[5].prompt_ids, 3, 4, 5), 20))
    bound = ask(prompt(8), 40, grammar=grammar.regex("(abc){12}"))
    wanted = [alone(toy, request) for request in requests]
    counts.look()
    before = own.stats()
    streams = [own.submit(request) for request in (*requests, bound)]
    *found, kept = [stream.result()[0] for stream in streams]
    assert [choice.token_ids for choice in found] == wanted
    assert kept.text == "abc" * 12
    assert counted(own, before)[0] > 20
    settled(own)
    again = own.generate(requests[-1])[0]
    assert (again.token_ids, again.cached_tokens > 0) == (wanted[-1], True)
    assert counts.look() == (0, 0)


def test_ends_and_log_probabilities(toy, own, engine):
    request = ask(prompt(12, seed=1), 30, logprobs=3)
    (found,), (wanted,) = own.generate(request), engine.generate(request)
    assert found.token_ids == wanted.token_ids
    for one, other in zip(found.logprobs, wanted.logprobs, strict=True):
        assert (one.token, [i for i, _ in one.top]) == (other.token, [i for i, _ in other.top])
        assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
    stop = wanted.token_ids[7]
    (cut,) = own.generate(dataclasses.replace(request, stop_ids=(stop,)))
    assert cut.token_ids == wanted.token_ids[: wanted.token_ids.index(stop) + 1]
    (last,) = own.generate(ask(prompt(CONTEXT - 6), 50))
    assert (len(last.token_ids), last.finish_reason) == (6, "length")


@pytest.mark.slow
def test_pages_that_run_out(toy):
    """Both models' pages are one account."""
    config = dataclasses.replace(DRAFTING, cache_tokens=CONTEXT)
    requests = [ask(prompt(16, seed=i), 60, **(SAMPLED if i % 2 else {})) for i in range(5)]
    with Engine(toy, config, draft=small()) as engine:
        assert len(engine.scheduler.pages) == 2  # of full and of windowed attention
        found = [s.result()[0].token_ids for s in [engine.submit(r) for r in requests]]
        assert engine.stats().preemptions > 0
        settled(engine)
    assert found == [alone(toy, request) for request in requests]


def test_a_draft_that_is_dear_or_wrong_is_left_alone():
    assert Pace(3, 0.02, 1.0).count(9) == 0  # as dear as the model
    assert Pace(7, 0.02, 0.1).count(9) == 3
    wrong, guesses = Pace(3, 0.02, 0.1), []
    for length in range(60):
        guesses.append(wrong.count(length) if wrong.active(length) else 0)
        if guesses[-1]:
            wrong.learn(guesses[-1], 0)
    assert guesses[0] and sum(map(bool, guesses)) < 20


def test_the_distribution_is_that_of_no_draft():
    """51,200 pairs of tokens with top-p: a draft of other probabilities draws by the same noise,
    and what stays is distributed as if there were none."""
    dice = np.random.default_rng(7)
    vocab, rows = 10, 512
    first = jnp.asarray(dice.normal(size=vocab) * 1.5, jnp.float32)
    second = jnp.asarray(dice.normal(size=(vocab, vocab)) * 1.5, jnp.float32)
    guess = first + jnp.asarray(dice.normal(size=vocab) * 0.5, jnp.float32)
    options = Sampling(temperature=0.9, top_p=0.85)

    @jax.jit
    def draw(seeds):
        drawing = jax.tree.map(
            jnp.asarray, dataclasses.replace(options.rows(rows), seed=jnp.asarray(seeds))
        )
        at = jnp.full((rows,), 100, jnp.int32)
        drafts = sample(jnp.tile(guess, (rows, 1)), drawing, at)
        one = sample(jnp.tile(first, (rows, 1)), drawing, at)
        two = sample(second[drafts], drawing, at + 1)
        ids = jnp.stack([jnp.zeros_like(drafts), drafts], axis=1).reshape(-1)
        offsets = jnp.tile(jnp.arange(2), rows)
        places = _Places(jnp.repeat(jnp.arange(rows), 2), offsets >= 0, offsets, offsets)
        tokens = jnp.stack([one, two], axis=1).reshape(-1)
        return tokens.reshape(rows, 2), _accepted(tokens, ids, places, 2).reshape(rows, 2)

    def exact(logits):
        p = np.exp(np.asarray(logits, np.float64) / 0.9)
        p /= p.sum()
        order = np.argsort(-p)
        kept = order[: int(np.searchsorted(np.cumsum(p[order]), 0.85) + 1)]
        return np.where(np.isin(np.arange(vocab), kept), p, 0) / p[kept].sum()

    found, after = np.zeros(vocab), np.zeros((vocab, vocab))
    for step in range(100):
        tokens, stays = map(np.asarray, draw(np.arange(rows, dtype=np.uint32) + rows * step))
        found += np.bincount(tokens[:, 0], minlength=vocab)
        np.add.at(after, (tokens[stays[:, 1], 0], tokens[stays[:, 1], 1]), 1)
    wanted = exact(first)
    assert found.sum() >= 50_000
    assert fitness(found, wanted) > 0.01
    kept = after.sum(axis=1)
    assert kept.sum() > 0.6 * found.sum()  # the same noise: much the same tokens
    tested = [token for token in range(vocab) if kept[token] > 2_000]
    assert len(tested) > 2
    for token in tested:
        assert fitness(after[token], exact(second[token])) > 0.01 / len(tested)


def test_drafts_that_do_not_go_with_the_model(toy):
    cases = [
        (made(dataclasses.replace(SPEC, vocab=273)), "273 tokens, the model 272"),
        (small(context=CONTEXT - 1), f"context is {CONTEXT - 1} tokens, the engine's {CONTEXT}"),
        (made(dataclasses.replace(SPECS["selective"], vocab=272)), "cannot be taken back"),
    ]
    for draft, message in cases:
        with pytest.raises(UnsupportedError, match=message):
            Engine(toy, CONFIG, draft=draft)
