"""The search and the advice: order, bound on compilations, reasons; the page holds all of it."""

import dataclasses
import functools
import re

import pytest

from jaxllm.errors import ConfigError
from jaxllm.plan.explain import explain
from jaxllm.plan.html import page
from jaxllm.plan.model import guess
from jaxllm.plan.place import find_place
from jaxllm.plan.search import candidates, search
from jaxllm.plan.source import run_of, spec_of
from jaxllm.plan.train import present
from tests.plan.models import write
from tests.train.runs import config_of

GPUS = "h100:4"


@functools.cache
def run():
    return config_of(dtype="bfloat16", batch=16, length=32)


@pytest.fixture(scope="module")
def found():
    return search(run(), find_place(GPUS), batch=16, tries=2)


def with_step(plan, **memory):
    """The plan with other bytes of memory."""
    (step,) = plan.programs
    changed = dataclasses.replace(step.memory, **memory)
    fits = changed.limit is None or changed.total <= changed.limit
    return dataclasses.replace(
        plan, programs=(dataclasses.replace(step, memory=changed, fits=fits),)
    )


def test_every_layout_is_tried_and_only_allowed_ones():
    trials = candidates(run(), find_place(GPUS), batch=16)
    meshes = {t.config.mesh for t in trials}
    assert {"data=4", "fsdp=4", "data=2,fsdp=2", "fsdp=2,tensor=2", "data=2,tensor=2"} <= meshes
    assert not any("tensor=4" in mesh for mesh in meshes)  # two heads
    assert {t.config.remat for t in trials} == {"none", "save_dots", "save_attention", "full"}
    rates = [t.guess.tokens_per_s for t in trials]
    assert rates == sorted(rates, reverse=True)


def test_it_compiles_so_many_and_says_why_the_others_lost(found):
    compiled = [t for t in found.trials if t.step is not None]
    assert len(compiled) == 2
    assert found.best is not None and found.best.verdict == "the fastest that fits"
    fastest = max(t.step.tokens_per_s for t in compiled)
    assert found.best.step.tokens_per_s == pytest.approx(fastest, rel=0.01)
    assert found.shown == (found.best.config, found.best.step)
    assert all(t.verdict for t in found.trials)
    assert all(t.verdict.startswith("not compiled") for t in found.trials if t.step is None)


def test_what_turns_out_too_large_scales_the_model(monkeypatch, found):
    """Steps take four times what the model says: the second try is the fastest below a quarter."""
    tried = []

    def compiled(config, place):
        guessed = guess(config, place).memory_bytes
        tried.append(guessed)
        plan = present(*found.shown, place, source="toy")
        none = ("optimizer", "other_arguments", "outputs", "temporaries", "activations", "code")
        sizes = dict.fromkeys(none, 0)
        limit = int(2.5 * tried[0])
        return with_step(plan, parameters=int(4 * guessed), limit=limit, **sizes).programs[0]

    monkeypatch.setattr("jaxllm.plan.search.plan_step", compiled)
    place = find_place(GPUS)
    limits = dataclasses.replace(place.limits, memory_bytes=int(2.5 * first_guess()))
    monkeypatch.setattr(type(place), "limits", property(lambda self: limits))
    result = search(run(), place, batch=16, tries=2)
    assert 4 * tried[0] > limits.memory_bytes >= 4 * tried[1]
    assert result.best is not None and result.best.guess.memory_bytes == tried[1]
    assert result.trials[0].verdict.startswith("needs ")


def first_guess():
    return candidates(run(), find_place(GPUS), batch=16)[0].guess.memory_bytes


def test_batches_are_varied_unless_given():
    free = candidates(run(), find_place(GPUS), batch=None)
    assert {t.config.batch for t in free} >= {4, 8, 16, 32, 64}
    assert {t.config.batch for t in candidates(run(), find_place(GPUS), batch=16)} == {16}


def test_what_cannot_fit_comes_last(tmp_path):
    config = run_of(spec_of(str(write(tmp_path, "llama-3.1-8b"))))
    trials = candidates(config, find_place("h100:8"), batch=None)
    room = 1.5 * 80e9
    large = [t.guess.memory_bytes > room for t in trials]
    assert True in large and large == sorted(large)
    # 8 billion parameters with float32 state: 16 bytes each, an eighth on every device.
    split = dataclasses.replace(config, mesh="fsdp=8", batch=8, remat="full")
    state = 16 * 8_030_261_248 / 8
    assert state < guess(split, find_place("h100:8")).memory_bytes < 2 * state


def test_bad_searches():
    with pytest.raises(ConfigError, match="--search: peak and bandwidths of cpu in float32"):
        search(config_of(), find_place("cpu:8"), batch=None, tries=1)
    with pytest.raises(ConfigError, match="--tries is at least 1"):
        search(run(), find_place(GPUS), batch=None, tries=0)
    with pytest.raises(ConfigError, match="no mesh of 4 devices fits this model and batch"):
        search(run(), find_place(GPUS), batch=3, tries=1)


def test_advice_when_it_fits_and_when_not(found):
    plan = present(*found.shown, find_place(GPUS), source="toy")
    text = "\n".join(explain(plan))
    assert re.search(r"step leaves \d+\.\d+ GiB of 74\.51 GiB free", text)
    assert "bound by" in text
    wide = with_step(plan, temporaries=200 * 2**30)
    text = "\n".join(explain(wide))
    assert "step needs 200." in text and "too much" in text
    assert "--set accumulate=3" in text
    assert "3 times as many devices" in text
    heavy = with_step(plan, parameters=100 * 2**30)
    assert "shard them over more devices" in "\n".join(explain(heavy))


def test_advice_names_a_policy_that_fits(found):
    plan = present(*found.shown, find_place(GPUS), source="toy")
    wide = with_step(plan, temporaries=200 * 2**30)
    other = dataclasses.replace(wide, remat=(*wide.remat, ("save_attention", 2**30, 1.2, 0.1)))
    other = dataclasses.replace(other, settings={**other.settings, "remat": "none"})
    text = "\n".join(explain(other))
    assert "another remat policy fits" in text and "save_attention takes 1.00 GiB" in text


def test_the_page_is_whole_and_stands_alone(found):
    plan = present(*found.shown, find_place(GPUS), source="<toy> & co")
    text = page(plan, explain(plan), found)
    assert text.startswith("<!doctype html>") and text.rstrip().endswith("</html>")
    assert "&lt;toy&gt; &amp; co" in text and "<toy>" not in text
    assert not re.search(r"(src|href)=|https?://|<script", text)
    assert text.count("<svg") >= 4
    assert "the fastest that fits" in text and "What to change" in text
    assert "estimated" in text
