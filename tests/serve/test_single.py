"""`Model.generate(..., draft=…)`: the tokens of no draft, in fewer steps."""

import itertools

import pytest

from jaxllm.errors import CapacityError, ConfigError, UnsupportedError
from tests.contracts.specs import SPECS
from tests.serve.conftest import CONTEXT, made, prompt
from tests.serve.test_draft import small
from tests.serve.test_engine import PENALIZED, SAMPLED

KINDS = [{}, SAMPLED | {"seed": 5}, PENALIZED | {"seed": 6}, {"temperature": 0.7, "seed": 9}]
COPIED = [*prompt(9, seed=4)] * 3


@pytest.fixture(scope="module")
def rounded(toy):
    return toy.quantize("int8")


@pytest.mark.parametrize("options", KINDS)
def test_prompt_lookup_changes_no_token(toy, options):
    alone = toy.generate(COPIED, max_tokens=40, **options)
    found = toy.generate(COPIED, max_tokens=40, draft=3, **options)
    assert (found.token_ids, found.text) == (alone.token_ids, alone.text)
    assert found.finish_reason == alone.finish_reason
    timings = found.timings
    assert (timings.prompt_tokens, timings.decoded_tokens) == (27, 39)
    assert 0 <= timings.accepted_tokens <= timings.drafted_tokens
    if not options:
        assert timings.drafted_tokens > 0
    assert alone.timings.drafted_tokens == 0


@pytest.mark.slow
@pytest.mark.parametrize("options", KINDS)
def test_a_draft_model_changes_no_token(toy, rounded, options):
    ids = list(prompt(11, seed=2))
    found = toy.generate(ids, max_tokens=40, draft=rounded, **options)
    assert found.token_ids == toy.generate(ids, max_tokens=40, **options).token_ids
    assert 0 < found.timings.accepted_tokens <= found.timings.drafted_tokens


def test_what_is_built_stays_and_compiles_no_more(toy, counts):
    """Other options, lengths and stops; an answer that was left in the middle; two at once."""
    ids = [list(prompt(n, seed=n)) for n in (5, 30, 60)]
    alone = [toy.generate(one, max_tokens=12, stop="e").token_ids for one in ids]
    toy.generate(ids[0], max_tokens=2, draft=3)
    counts.look()
    left = toy.stream(ids[1], max_tokens=30, draft=3)
    next(left)
    left.close()
    found = [toy.generate(one, max_tokens=12, stop="e", draft=3) for one in ids]
    assert counts.look() == (0, 0)
    assert [one.token_ids for one in found] == alone
    pages = toy.generator.kept["single"].parts.scheduler.pages.values()
    assert [one.held for one in pages] == [0, 0]
    first, second = (toy.stream(one, max_tokens=9, draft=3) for one in ids[:2])
    pairs = list(itertools.zip_longest(first, second, fillvalue=""))
    for i in (0, 1):
        assert "".join(pair[i] for pair in pairs) == toy.generate(ids[i], max_tokens=9).text


def test_the_context_ends_an_answer(toy):
    ids = list(prompt(90))
    found = toy.generate(ids, max_tokens=40, draft=3)
    assert len(found.token_ids) == CONTEXT - 90
    assert found.token_ids == toy.generate(ids, max_tokens=40).token_ids


def test_drafts_that_cannot_be(toy):
    for wrong in (True, "ngram", (toy, True), (None, 3), 2.0, (toy, 2, 3)):
        with pytest.raises(ConfigError, match="a model, a number of tokens for prompt lookup"):
            toy.generate([1], draft=wrong)
    for tokens in (0, 32):
        with pytest.raises(ConfigError, match=f"1 to 31 tokens are guessed .* found {tokens}"):
            toy.generate([1], draft=tokens)
    with pytest.raises(UnsupportedError, match="same vocabulary"):
        toy.generate([1], draft=small(vocab=300))
    with pytest.raises(UnsupportedError, match="context is 50 tokens, prompt and answer are up to"):
        toy.generate([1], draft=small(context=50))
    with pytest.raises(UnsupportedError, match="cannot be taken back"):
        made(SPECS["selective"]).generate([1], draft=3)
    with pytest.raises(CapacityError, match="must hold the prompt and at least one more"):
        toy.generate([1] * CONTEXT, draft=3)
    with pytest.raises(ConfigError, match="max_tokens is an integer of at least 1"):
        toy.generate([1], draft=3, max_tokens=0)
    with pytest.raises(ConfigError, match=r"unknown option 'drafts'.*draft"):
        toy.generate([1], drafts=3)
