"""Generation against full forward passes: in batches, in chunks, over growing states."""

import dataclasses
import inspect

import numpy as np
import pytest

import jaxllm
from jaxllm.errors import CapacityError, ConfigError, ShapeError
from jaxllm.infer import generate, programs
from tests.infer.conftest import CONTEXT, SPEC, prompt

LENGTHS = [1, 15, 16, 17, 33]
PROMPTS = [prompt(n) for n in LENGTHS]
NEW = 11


def greedy(toy, ids, count=NEW):
    return toy.generate(ids, max_tokens=count)


def check_greedy(toy, ids, found):
    """Each token is the argmax of a full forward pass over all before it."""
    whole = [*ids, *found]
    logits = toy.logits([whole])[0]
    wanted = logits[len(ids) - 1 : -1].argmax(-1)
    assert found == wanted.tolist()


@pytest.mark.parametrize("ids", PROMPTS, ids=len)
def test_greedy_is_the_argmax_of_full_forwards(toy, ids):
    result = greedy(toy, ids)
    check_greedy(toy, ids, result.token_ids)
    assert len(result.token_ids) == NEW
    assert len(set(result.token_ids)) > 3
    assert (result.prompt_token_ids, result.finish_reason, result.text) == (ids, "length", "")
    total = {"prompt_tokens": len(ids), "completion_tokens": NEW, "total_tokens": len(ids) + NEW}
    assert result.usage == total
    timings = result.timings
    assert (timings.prompt_tokens, timings.decoded_tokens) == (len(ids), NEW - 1)
    assert timings.time_to_first_token_ms > 0
    assert timings.tokens_per_second > 0


def test_a_ragged_batch_is_its_rows_alone(toy):
    both = toy.generate_batch(PROMPTS, max_tokens=NEW)
    for ids, result in zip(PROMPTS, both, strict=True):
        assert result.token_ids == greedy(toy, ids).token_ids
        assert result.prompt_token_ids == ids


SAMPLED = {"temperature": 1.5, "top_k": 40, "top_p": 0.95, "seed": 11}
PENALIZED = SAMPLED | {
    "repetition_penalty": 1.3,
    "presence_penalty": 0.8,
    "frequency_penalty": 0.6,
}


@pytest.mark.parametrize("options", [SAMPLED, PENALIZED], ids=["sample", "penalize"])
def test_a_sampled_batch_is_its_rows_alone(toy, options):
    """Row i draws with seed + i, whatever the others do."""
    prompts = PROMPTS[:3]
    both = toy.generate_batch(prompts, max_tokens=NEW, **options)
    for row, (ids, result) in enumerate(zip(prompts, both, strict=True)):
        alone = toy.generate(ids, max_tokens=NEW, **(options | {"seed": 11 + row}))
        assert result.token_ids == alone.token_ids
    again = toy.generate_batch(prompts, max_tokens=NEW, **options)
    assert [r.token_ids for r in again] == [r.token_ids for r in both]
    other = toy.generate_batch(prompts, max_tokens=NEW, **(options | {"seed": 99}))
    assert all(a.token_ids != b.token_ids for a, b in zip(both, other, strict=True))


@pytest.fixture
def small(monkeypatch):
    """States begin with 16 slots and double."""
    monkeypatch.setattr(
        generate, "bucket", lambda n, least=16: 16 if least > 16 else programs.bucket(n, least)
    )


def test_states_grow_without_a_trace(toy, small):
    for ids in (PROMPTS[0], PROMPTS[3]):
        found = greedy(toy, ids, 40)
        check_greedy(toy, ids, found.token_ids)
    grown = {name for name in toy.generator.loaded if "grow-b1" in name}
    assert {"model-grow-b1-s16-to32", "model-grow-b1-s32-to64"} <= grown
    both = toy.generate_batch([PROMPTS[3], PROMPTS[0]], max_tokens=40)
    assert both[0].token_ids == found.token_ids


@pytest.mark.parametrize("options", [{}, PENALIZED], ids=["greedy", "penalize"])
def test_long_prompts_come_in_chunks(toy, monkeypatch, options):
    """33 tokens in chunks of 16; rows that end before the last chunk keep their own token."""
    prompts = [PROMPTS[0], PROMPTS[2], PROMPTS[4]]
    wanted = [
        toy.generate(ids, max_tokens=NEW, **(options and options | {"seed": 11 + row})).token_ids
        for row, ids in enumerate(prompts)
    ]
    monkeypatch.setattr(generate, "PREFILL_TOKENS", 16)
    both = toy.generate_batch(prompts, max_tokens=NEW, **options)
    assert [r.token_ids for r in both] == wanted
    assert any("prefill-chunk" in name for name in toy.generator.loaded)


@pytest.mark.parametrize(("per_call", "ahead"), [(3, 1), (1, 2), (8, 0)])
def test_tokens_a_call_and_calls_ahead_change_nothing(toy, monkeypatch, per_call, ahead):
    wanted = greedy(toy, PROMPTS[3]).token_ids
    monkeypatch.setattr(toy.generator, "tokens_per_call", per_call)
    monkeypatch.setattr(toy.generator, "ahead", ahead)
    assert greedy(toy, PROMPTS[3]).token_ids == wanted


@pytest.mark.parametrize("count", [1, 2, 5])
def test_exactly_as_many_tokens_as_asked(toy, count):
    wanted = greedy(toy, PROMPTS[1]).token_ids
    result = greedy(toy, PROMPTS[1], count)
    assert result.token_ids == wanted[:count]
    assert result.finish_reason == "length"


def test_the_end_token_ends_and_is_included(toy):
    wanted = [greedy(toy, ids).token_ids for ids in PROMPTS]
    end = wanted[2][4]
    ending = dataclasses.replace(toy, eos_ids=(end, 271))
    for ids, tokens in zip(PROMPTS, wanted, strict=True):
        cut = tokens.index(end) + 1 if end in tokens else len(tokens)
        result = greedy(ending, ids)
        assert result.token_ids == tokens[:cut]
        assert result.finish_reason == ("stop" if end in tokens else "length")
    both = ending.generate_batch(PROMPTS, max_tokens=NEW)
    alone = [greedy(ending, ids) for ids in PROMPTS]
    assert [(r.token_ids, r.finish_reason) for r in both] == [
        (r.token_ids, r.finish_reason) for r in alone
    ]
    assert "stop" in {r.finish_reason for r in both}


def test_the_context_ends_an_answer(toy):
    ids = prompt(CONTEXT - 3)
    result = toy.generate(ids, max_tokens=50)
    assert (len(result.token_ids), result.finish_reason) == (3, "length")
    check_greedy(toy, ids, result.token_ids)
    assert len(toy.generate(prompt(CONTEXT - 1), max_tokens=50).token_ids) == 1


@pytest.mark.parametrize("length", [CONTEXT, CONTEXT + 1, 10 * CONTEXT])
def test_a_prompt_beyond_the_context_is_an_error(toy, length):
    with pytest.raises(CapacityError, match=f"{length} tokens.*context of {CONTEXT}"):
        toy.generate(prompt(length))
    with pytest.raises(CapacityError, match=str(CONTEXT)):
        toy.generate_batch([[1], prompt(length)])


@pytest.mark.parametrize("call", [
    lambda m: m.generate([]),
    lambda m: m.generate(np.zeros((0,), np.int32)),
    lambda m: m.generate_batch([]),
    lambda m: m.generate_batch([[1], []]),
])  # fmt: skip
def test_an_empty_prompt_is_an_error(toy, call):
    with pytest.raises(ConfigError, match="empty"):
        call(toy)


def test_ids_outside_of_the_vocabulary_are_an_error(toy):
    for wrong in ([SPEC.vocab], [-1, 3]):
        with pytest.raises(ShapeError, match=f"0..{SPEC.vocab - 1}"):
            toy.generate(wrong)


BAD = {
    "temperature": [-0.1, float("nan"), float("inf"), 101.0],
    "top_k": [-1, 2**31],
    "top_p": [0.0, -1.0, 1.01, float("nan")],
    "min_p": [-0.1, 1.0],
    "typical_p": [0.0, 1.1],
    "repetition_penalty": [0.0, -1.0, 101.0],
    "presence_penalty": [-2.1, 2.1],
    "frequency_penalty": [-3.0, float("inf")],
    "seed": [-1, 2**32],
    "max_tokens": [0, -1],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in BAD.items() for v in vs])
def test_a_bad_option_is_named(toy, name, value):
    for call in (toy.generate, lambda p, **o: toy.generate_batch([p], **o)):
        with pytest.raises(ConfigError) as caught:
            call([1, 2], **{name: value})
        assert str(caught.value).startswith(f"{name} is ")
        assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", v) for v in ("hot", True, None)]
    + [("top_k", v) for v in (1.5, "3", None)]
    + [("seed", 0.5), ("top_p", [0.5])],
)
def test_a_value_of_the_wrong_type_is_named(name, value):
    """The check of the class itself: the suite's type checker would be quicker."""
    sampling = jaxllm.Sampling()
    object.__setattr__(sampling, name, value)
    with pytest.raises(ConfigError, match=f"{name} is (an integer|a finite number), found"):
        sampling.__post_init__()


@pytest.mark.parametrize("value", [2.5, "many", True, None])
def test_a_number_of_tokens_is_an_integer(toy, value):
    check = inspect.unwrap(generate.Generator.check)
    with pytest.raises(ConfigError, match="max_tokens is an integer"):
        check(toy.generator, [2], value)


@pytest.mark.parametrize(
    ("name", "near"),
    [("temprature", "temperature"), ("max_token", "max_tokens"), ("stops", "stop")],
)
def test_an_unknown_option_names_the_nearest(toy, name, near):
    with pytest.raises(ConfigError, match=f"{name}.*did you mean '{near}'"):
        toy.generate([1], **{name: 1})


def test_nothing_is_compiled_for_other_options(toy, counts):
    """After one call of a mode, any mix of its options runs the same programs."""
    mixes = {
        "greedy": [{}, {"top_k": 3}, {"seed": 5, "min_p": 0.5}],
        "sample": [
            {"temperature": 0.7},
            {"temperature": 1.0, "top_k": 5},
            {"temperature": 2.0, "top_p": 0.5, "seed": 2**32 - 1},
            {"temperature": 0.1, "min_p": 0.3, "top_k": 2, "top_p": 0.9},
        ],
        "penalize": [
            {"repetition_penalty": 1.1},
            {"presence_penalty": 1.0, "temperature": 1.0},
            {"frequency_penalty": -2.0, "repetition_penalty": 2.0, "top_k": 7, "temperature": 3.0},
        ],
    }
    for mode, options in mixes.items():
        assert {jaxllm.Sampling(**o).mode for o in options} == {mode}
        toy.generate(PROMPTS[1], max_tokens=6, **options[0])
        counts.look()
        for mix in options:
            for ids, count in ((PROMPTS[1], 6), (PROMPTS[0], 9), (PROMPTS[2], 2)):
                toy.generate(ids, max_tokens=count, **mix)
        assert counts.look() == (0, 0)


def test_penalties_change_the_answer(toy):
    """A harsh frequency penalty never says a token twice."""
    ids = PROMPTS[1]
    plain = greedy(toy, ids, 30).token_ids
    once = toy.generate(ids, max_tokens=30, frequency_penalty=2.0, repetition_penalty=100.0)
    assert len(set(once.token_ids)) == 30
    assert not set(once.token_ids) & set(ids)
    assert len(set(plain)) < 30


def test_padding_is_no_part_of_the_history(toy):
    """Prompts without token 0 in a bucket that is padded with it."""
    prompts = [[5, 9, 5], [7]]
    ids = np.zeros((2, 16), np.int32)
    for row, tokens in enumerate(prompts):
        ids[row, : len(tokens)] = tokens
    shape = {"batch": 2, "length": 16, "capacity": 16, "mode": "penalize", "fresh": True}
    run = toy.generator.executable(programs.prefill(toy.generator.setup, **shape))
    rows = jaxllm.Sampling(repetition_penalty=1.5).rows(2)
    _, tail = run(toy.params, ids, np.array([3, 1], np.int32), rows)
    for row, tokens in enumerate(prompts):
        assert set(np.flatnonzero(tail.history.prompt[row])) == set(tokens)
        answer = np.zeros(SPEC.vocab)
        answer[tail.tokens[row]] = 1
        assert np.array_equal(tail.history.answer[row], answer)


def test_each_row_of_a_batch_has_the_context_to_itself(toy):
    """A short prompt beside one that almost fills the context goes on to its own end."""
    long, short = prompt(CONTEXT - 3), prompt(CONTEXT - 20)
    together = toy.generate_batch([long, short], max_tokens=50)
    alone = [toy.generate(p, max_tokens=50) for p in (long, short)]
    assert [len(a.token_ids) for a in alone] == [3, 20]
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]
    assert [a.finish_reason for a in together] == ["length", "length"]
