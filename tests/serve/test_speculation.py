"""Drafts change when tokens come, never which: by hand, among others, and in distribution."""

import dataclasses
import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.errors import ConfigError, UnsupportedError
from jaxllm.infer.sampling import Sampling
from jaxllm.ops.sampling import History
from jaxllm.serve import grammar
from jaxllm.serve.config import EngineConfig
from jaxllm.serve.engine import Engine
from jaxllm.serve.ngram import SIZES, Drafter, agreed
from jaxllm.serve.programs import Options, shapes, verifying
from jaxllm.serve.steps import _accepted, _drafted, _draw, _Places
from tests.contracts.specs import SPECS
from tests.serve.conftest import CONFIG, CONTEXT, ask, made, prompt
from tests.serve.test_engine import PENALIZED, SAMPLED, alone, settled

DRAFTING = dataclasses.replace(CONFIG, draft_tokens=3, draft_cost=0.01)


@pytest.fixture(scope="module")
def drafting(toy):
    with Engine(toy, DRAFTING) as engine:
        yield engine


def copied(seed, length=24):
    """A prompt that says everything twice, and begins a third time."""
    part = prompt(length // 2, seed=seed)
    return (*part, *part, *part[:4])


# Drafts.


def test_what_agrees_stays():
    assert agreed([], [5]) == [5]
    assert agreed([1, 2], [1, 2, 3]) == [1, 2, 3]
    assert agreed([1, 2], [1, 9, 3]) == [1, 9]
    assert agreed([1, 2], [7, 2, 3]) == [7]


@pytest.mark.parametrize("seed", range(6))
def test_lookup_is_the_latest_of_the_longest(seed):
    """Against a search from the end, while the text grows."""
    dice = random.Random(seed)
    drafter, tokens = Drafter(3, 0.0), [dice.randrange(4) for _ in range(20)]
    for _ in range(60):
        wanted = None
        for size in SIZES:
            starts = range(len(tokens) - size - 1, -1, -1)
            found = [s for s in starts if tokens[s : s + size] == tokens[-size:]]
            if found and wanted is None:
                wanted = found[0] + size
        assert drafter._after(tokens) == wanted
        tokens += [dice.randrange(4) for _ in range(dice.randint(1, 3))]


def test_drafts_grow_with_success_and_rest_after_failure():
    drafter, tokens = Drafter(7, 0.1), [1, 2, 3] * 9
    assert drafter.propose(tokens, 7) == ([1, 2, 3] * 3)[:3]
    for _ in range(9):
        drafter.learn(3, 3)
    assert drafter.propose(tokens, 7) == [1, 2, 3, 1, 2, 3, 1]
    assert drafter.propose(tokens, 2) == [1, 2]
    for _ in range(30):
        drafter.learn(3, 0)
    assert drafter.propose(tokens, 7) == []
    assert not drafter.active(len(tokens))
    assert drafter.active(len(tokens) + 1)
    tokens += [1]
    assert drafter.propose(tokens, 7) == [2]  # one more try
    drafter.learn(1, 0)
    assert drafter.propose(tokens, 7) == []
    assert not drafter.active(len(tokens) + 1)  # and a longer rest
    dear = Drafter(7, 5.0)
    assert dear.propose(tokens, 7) == []


def test_nothing_that_came_before():
    drafter = Drafter(3, 0.0)
    assert drafter.propose(list(range(9)), 3) == []
    assert drafter.propose([5], 3) == []


# The device's part.


def test_counts_and_acceptance_by_hand():
    """Two rows of three and one places, then padding."""
    ids = jnp.array([5, 6, 7, 4, 0, 0])
    offsets = jnp.array([0, 1, 2, 0, 1, 2])
    used = jnp.array([True] * 4 + [False] * 2)
    places = _Places(jnp.zeros(6, jnp.int32), used, offsets, offsets)
    accepted = lambda *drawn: _accepted(jnp.array(drawn), ids, places, 3).tolist()  # noqa: E731
    assert accepted(6, 7, 1, 0, 0, 0) == [True, True, True, True, False, False]
    assert accepted(6, 8, 1, 0, 0, 0) == [True, True, False, True, False, False]
    assert accepted(1, 7, 1, 0, 0, 0) == [True, False, False, True, False, False]
    counts = _drafted(jnp.ones((6, 9), jnp.int32), ids, offsets, 3)
    wanted = np.ones((4, 9), np.int32)
    for place, fed in enumerate([[5], [5, 6], [5, 6, 7], [4]]):
        wanted[place, fed] += 1
    np.testing.assert_array_equal(counts[:4], wanted)


OPTIONS = Sampling(
    temperature=0.9, top_p=0.85, repetition_penalty=1.2, presence_penalty=0.4, frequency_penalty=0.3
)
VOCAB, ROWS, DRAFTS = 12, 512, 2


def exact(logits, prompt_seen, counts):
    """Probabilities in float64 of the tokens after penalties, temperature and top-p, sorted out."""
    x = logits.astype(np.float64)
    seen = prompt_seen | (counts > 0)
    x = np.where(seen, np.where(x > 0, x / 1.2, x * 1.2), x)
    x = (x - 0.4 * (counts > 0) - 0.3 * counts) / 0.9
    p = np.exp(x - x.max())
    p /= p.sum()
    order = np.argsort(-p)
    kept = order[: int(np.searchsorted(np.cumsum(p[order]), 0.85) + 1)]
    out = np.zeros_like(p)
    out[kept] = p[kept]
    return out / out.sum()


def tail(statistic, degrees):
    """P(chi-square > statistic), by the regularised gamma function."""
    return float(jax.scipy.special.gammaincc(degrees / 2, statistic / 2))


def fitness(found, wanted):
    """The p-value of counts against probabilities; none may be where there is no mass."""
    assert found[wanted == 0].sum() == 0
    mass = wanted > 0
    expected = wanted[mass] * found.sum()
    assert expected.min() > 5
    return tail(((found[mass] - expected) ** 2 / expected).sum(), mass.sum() - 1)


def test_the_distribution_is_that_of_no_drafts():
    """60,000 rows of a fed token and two drafts, top-p and penalties on, by the step's own draw."""
    dice = np.random.default_rng(5)
    logits = dice.normal(size=(DRAFTS + 1, VOCAB)).astype(np.float32) * 1.5
    prompt_seen, counts = dice.random(VOCAB) < 0.3, dice.integers(0, 2, VOCAB)
    fed = int(dice.integers(VOCAB))
    drafts = []
    wanted = []
    for place in range(DRAFTS + 1):  # each draft is likely, so that rows get far
        now = counts + np.bincount([fed, *drafts], minlength=VOCAB)
        wanted.append(exact(logits[place], prompt_seen, now))
        drafts.append(int(np.argmax(wanted[-1])))
    ids = np.tile([fed, *drafts[:DRAFTS]], ROWS).astype(np.int32)
    offsets = np.tile(np.arange(DRAFTS + 1, dtype=np.int32), ROWS)
    slots = np.repeat(np.arange(ROWS, dtype=np.int32), DRAFTS + 1)
    used = np.ones(slots.shape, bool)
    history = History(np.tile(prompt_seen, (ROWS, 1)), np.tile(counts.astype(np.int32), (ROWS, 1)))
    none = np.zeros((ROWS, 1), np.float32)

    @jax.jit
    def draw(seeds):
        rows = dataclasses.replace(OPTIONS.rows(ROWS), seed=seeds)
        options = Options(rows, np.ones(ROWS, bool), np.zeros(ROWS, bool),
                          np.full((ROWS, 1), VOCAB, np.int32), none)  # fmt: skip
        options = jax.tree.map(jnp.asarray, options)
        places = _Places(*map(jnp.asarray, (slots, used, 100 + offsets, offsets)))
        counted = jnp.asarray(history.answer)[slots]
        answer = _drafted(counted, jnp.asarray(ids), jnp.asarray(offsets), DRAFTS + 1)
        seen = lambda: History(jnp.asarray(history.prompt)[slots], answer)  # noqa: E731
        masks = jnp.zeros((len(ids), 1), jnp.int32), jnp.zeros(len(ids), bool)
        tokens = _draw(jnp.tile(logits, (ROWS, 1)), options, places, masks, seen).tokens
        return tokens, _accepted(tokens, jnp.asarray(ids), places, DRAFTS + 1)

    found = np.zeros((DRAFTS + 1, VOCAB), int)
    reached = np.zeros(DRAFTS + 1, int)
    for step in range(120):
        tokens, stays = draw(np.arange(ROWS, dtype=np.uint32) + ROWS * step)
        tokens, stays = (np.asarray(x).reshape(ROWS, -1) for x in (tokens, stays))
        for place in range(DRAFTS + 1):
            found[place] += np.bincount(tokens[stays[:, place], place], minlength=VOCAB)
            reached[place] += stays[:, place].sum()
    assert reached[0] == 120 * ROWS >= 60_000
    for place in range(DRAFTS + 1):
        assert reached[place] > 5_000
        assert fitness(found[place], wanted[place]) > 0.01, place
    # Drafts are kept as often as they are likely; a wrong penalty at a place would show.
    for place, draft in enumerate(drafts[:DRAFTS]):
        share = reached[place + 1] / reached[place]
        assert share == pytest.approx(wanted[place][draft], abs=0.02)
    flat = exact(logits[1], prompt_seen, counts)  # without the tokens before it in the step
    assert np.abs(found[1] / found[1].sum() - flat).sum() > 0.05


# The engine.


@pytest.mark.parametrize("options", [{}, SAMPLED | {"seed": 4}, PENALIZED | {"seed": 8}])
def test_one_request_is_as_if_alone(toy, drafting, options):
    before = drafting.stats()
    for seed in range(3):
        request = ask(copied(seed), 40, **options)
        (choice,) = drafting.generate(request)
        assert choice.token_ids == alone(toy, request)
    assert options or drafting.stats().drafted_tokens > before.drafted_tokens
    settled(drafting)


def guess(monkeypatch, wanted, truth):
    """Let drafters know the answers to prompts, and tell the truth as often as we like."""
    dice = random.Random(1)

    def oracle(self, tokens, most, rows=1):
        ids = next(ids for ids in wanted if tuple(tokens[: len(ids)]) == ids)
        rest = wanted[ids][len(tokens) - len(ids) :][: dice.randint(0, most)]
        return [token if dice.random() < truth else dice.randrange(20) for token in rest]

    monkeypatch.setattr(Drafter, "propose", oracle)
    monkeypatch.setattr(Drafter, "active", lambda self, length: length % 3 > 0)


@pytest.mark.parametrize("truth", [0.0, 0.5, 1.0])
def test_any_drafts_give_the_same(toy, drafting, monkeypatch, truth):
    """Guesses that are right as often as we like, among requests that make none."""
    kinds = [{}, SAMPLED | {"seed": 5}, PENALIZED | {"seed": 6}, {"temperature": 0.7, "seed": 9}]
    requests = [ask(prompt(5 + 4 * i, seed=i), 30, **kinds[i % 4]) for i in range(8)]
    wanted = {request.prompt_ids: alone(toy, request) for request in requests}
    guess(monkeypatch, wanted, truth)
    before = drafting.stats()
    streams = [drafting.submit(request) for request in requests]
    found = [stream.result()[0].token_ids for stream in streams]
    assert found == [wanted[request.prompt_ids] for request in requests]
    drafted, accepted = (
        getattr(drafting.stats(), n) - getattr(before, n)
        for n in ("drafted_tokens", "accepted_tokens")
    )
    assert drafted > 20
    assert (accepted == drafted) if truth == 1 else (accepted < drafted)
    settled(drafting)


def test_fewer_steps_where_text_repeats(toy, drafting):
    """A bias makes one token certain: nearly every draft is right."""
    before = drafting.stats()
    drafting.generate(ask(prompt(6), 60, logit_bias={9: 100.0}))
    after = drafting.stats()
    assert after.drawn_tokens - before.drawn_tokens == 60
    assert after.steps - before.steps < 30


def test_log_probabilities_and_ends_come_with_drafts(toy, drafting, engine):
    request = ask(copied(1), 30, logprobs=3)
    (found,), (wanted,) = drafting.generate(request), engine.generate(request)
    assert found.token_ids == wanted.token_ids
    for one, other in zip(found.logprobs, wanted.logprobs, strict=True):
        assert (one.token, [i for i, _ in one.top]) == (other.token, [i for i, _ in other.top])
        assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
    stop = wanted.token_ids[7]
    (cut,) = drafting.generate(dataclasses.replace(request, stop_ids=(stop,)))
    assert cut.token_ids == wanted.token_ids[: wanted.token_ids.index(stop) + 1]
    assert cut.finish_reason == "stop"
    (last,) = drafting.generate(ask(copied(1, 80), 90, logit_bias={9: 100.0}))
    assert (len(last.token_ids), last.finish_reason) == (CONTEXT - 84, "length")


def test_grammars_and_drafts(drafting, engine):
    for pattern, seed in (("(abc){12}", 0), ("[ab]{30}", 1), ("(ab|cd){3,9}x", 2)):
        request = ask(prompt(8, seed=seed), 50, grammar=grammar.regex(pattern), temperature=1.0)
        (found,), (wanted,) = drafting.generate(request), engine.generate(request)
        assert found.token_ids == wanted.token_ids
        assert re.fullmatch(pattern, found.text)
    settled(drafting)


def test_nothing_compiles_with_drafts(drafting, counts):
    counts.look()
    streams = [
        drafting.submit(ask(copied(i, 6 + 4 * i), 20, **([{}, SAMPLED, PENALIZED][i % 3])))
        for i in range(9)
    ]
    for stream in streams:
        stream.result()
    settled(drafting)
    assert counts.look() == (0, 0)


@pytest.mark.slow
def test_pages_that_run_out(toy):
    config = dataclasses.replace(DRAFTING, cache_tokens=CONTEXT)
    requests = [ask(copied(i, 16), 60, **(SAMPLED if i % 2 else {})) for i in range(6)]
    with Engine(toy, config) as engine:
        found = [s.result()[0].token_ids for s in [engine.submit(r) for r in requests]]
        assert engine.stats().preemptions > 0
        settled(engine)
    assert found == [alone(toy, request) for request in requests]


@pytest.mark.slow
def test_greedy_steps_verify_without_choices(toy, monkeypatch):
    """As on a GPU: programs of their own, for drafts too; a grammar or an option takes others."""
    sizes = {"sequences": 2, "greedy": True}
    monkeypatch.setattr(
        "jaxllm.serve.parts.table",
        lambda *_: (
            *verifying(tokens=8, drafts=3, context=CONTEXT, **sizes),
            *shapes(tokens=16, longest=16, contexts=(CONTEXT,), **sizes),
        ),
    )
    config = dataclasses.replace(DRAFTING, max_sequences=2)
    requests = [ask(copied(0), 40), ask(copied(0), 40, **PENALIZED)]
    bound = ask(prompt(8), 40, grammar=grammar.regex("(abc){12}"))
    with Engine(toy, config) as engine:
        used, choose = [], engine.runner.shape_of
        monkeypatch.setattr(
            engine.runner, "shape_of", lambda turns: used.append(choose(turns)) or used[-1]
        )
        found = [engine.generate(request)[0].token_ids for request in requests]
        assert engine.generate(bound)[0].text == "abc" * 12
        settled(engine)
    assert found == [alone(toy, request) for request in requests]
    assert {(s.greedy, s.every) for s in used} >= {(True, True), (True, False), (False, True)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["latent", "streaming", "capped_gated"])
def test_other_memories(name, monkeypatch):
    model = made(SPECS[name])
    config = EngineConfig(max_sequences=2, max_batch_tokens=16, page_size=4, draft_tokens=3)
    prompts = [tuple(range(3, 9)) * 3, tuple(range(3, 20))]
    wanted = {ids: model.generate(list(ids), max_tokens=14).token_ids for ids in prompts}
    guess(monkeypatch, wanted, 0.7)
    with Engine(model, dataclasses.replace(config, draft_cost=0.01)) as engine:
        streams = [engine.submit(ask(ids, 14)) for ids in prompts]
        found = [stream.result()[0].token_ids for stream in streams]
        settled(engine)
        assert engine.stats().drafted_tokens > engine.stats().accepted_tokens > 0
    assert found == [wanted[ids] for ids in prompts]


def test_models_that_cannot_take_back():
    for name in ("selective", "dual"):
        with pytest.raises(UnsupportedError, match="cannot be taken back"):
            EngineConfig(draft_tokens=2).filled(SPECS[name])
    with pytest.raises(ConfigError, match="at most 31"):
        EngineConfig(draft_tokens=32)
