"""Pages that go to the host and come back: the right ones, with what they held."""

import dataclasses
import random

import jax
import numpy as np
import pytest

from jaxllm.errors import ConfigError, UnsupportedError
from jaxllm.serve.config import EngineConfig
from jaxllm.serve.engine import Engine
from jaxllm.serve.programs import Memory, abstract_state
from jaxllm.serve.scheduler import Limits, Scheduler
from jaxllm.serve.sequence import Sequence
from jaxllm.serve.spill import HostPages, Kept, accounts
from jaxllm.serve.transfer import Transfer
from jaxllm.state.paged import groups, page_axes
from tests.contracts.specs import SPECS
from tests.serve.conftest import CONFIG, CONTEXT, ask, made, prompt
from tests.serve.test_engine import PENALIZED, SAMPLED, alone, settled
from tests.serve.test_mesh import on

SIZE = 4
KIB = 1 / 2**20
"""Of a GiB."""
TIGHT = dataclasses.replace(CONFIG, max_sequences=2, cache_tokens=CONTEXT, spill_gib=256 * KIB)


class Device:
    """What lies in the pages of a pretended device, by place: all tokens up to one."""

    def __init__(self, windows):
        self.windows = windows
        self.places = {}

    def step(self, turns, moves):
        """Copy, look at what every turn sees, and write what it computes."""
        for group, page, kept in moves[0]:
            kept.data = [self.places.get((group, page, i)) for i in range(SIZE)]
        for group, page, kept in moves[1]:
            for i, held in enumerate(kept.data):
                self.places[group, page, i] = held
        for write in (True, False):
            for turn in turns:
                for group, left in self.windows.items():
                    self._turn(turn, group, left, write=write)

    def _turn(self, turn, group, left, *, write):
        holding, end = turn.sequence.holdings[group], turn.start + turn.count
        first = turn.start if write else 0 if left is None else max(0, turn.start - left)
        for place in range(first, end):
            page = holding.pages[place // SIZE - holding.first]
            wanted = tuple(turn.sequence.tokens[: place + 1])
            if write:
                self.places[group, page, place % SIZE] = wanted
            else:
                assert self.places[group, page, place % SIZE] == wanted


@pytest.mark.parametrize("seed", range(6))
def test_every_sequence_sees_its_own_tokens(seed):
    """Few pages on the device and on the host, beginnings in common, cancellations."""
    dice = random.Random(seed)
    windows = {"all": None, "window5": 5} if seed % 2 else {"all": None}
    host = HostPages(70 if seed % 3 else 1000, {"all": 10, "window5": 5})
    limits = Limits(tokens=16, sequences=3, longest=16, page_size=SIZE)
    sched = Scheduler(limits, accounts(dict.fromkeys(windows, 14), host), windows, host)
    device, everyone = Device(windows), []
    for turn_number in range(900):
        if turn_number < 250 and dice.random() < 0.3:
            start, length = 100 * dice.randint(0, 3), dice.randint(1, 40)
            everyone.append(
                Sequence(
                    tokens=[*range(start, start + length)],
                    prompt_length=length,
                    limit=length + dice.randint(1, 15),
                    tenant=dice.choice("ab"),
                    priority=dice.randint(0, 1),
                )
            )
            sched.add(everyone[-1])
        turns = sched.plan()
        device.step(turns, host.moves())
        for turn in turns:
            one = turn.sequence
            if sched.drawn(turn, [dice.randint(0, 2)]) and len(one.tokens) >= one.limit:
                sched.finish(one)
        if dice.random() < 0.03 and everyone:
            sched.finish(dice.choice(everyone))
        for pages in sched.pages.values():
            pages.check()
        host.check()
    assert all(one.done for one in everyone)
    assert [pages.held for pages in sched.pages.values()] == [0] * len(windows)
    assert host.spilled > 20 and host.restored > 20 and sched.preemptions > 0


def checked(engine):
    """The account of the host's pages is right."""
    assert engine.host is not None
    engine.host.check()


def page_bytes(engine):
    """Of every group."""
    assert engine.runner.transfer is not None
    return engine.runner.transfer.page_bytes


def test_answers_are_those_of_an_endless_cache(toy, counts):
    """Conversations that go on in turn, each longer than the device keeps of the others."""
    kinds = [{}, SAMPLED | {"seed": 5}, {"temperature": 0.7, "seed": 9}, PENALIZED | {"seed": 6}]
    answers = []
    with Engine(toy, TIGHT) as engine:
        counts.look()
        said = [prompt(36, seed=i) for i in range(4)]
        for turn in range(3):
            requests = [ask(ids, 6, **kind) for ids, kind in zip(said, kinds, strict=True)]
            streams = [engine.submit(request) for request in requests]
            found = [stream.result()[0] for stream in streams]
            answers += [(r, c.token_ids) for r, c in zip(requests, found, strict=True)]
            least = (len(said[0]) - 9) // SIZE * SIZE  # all before the last answer and question
            assert turn == 0 or all(c.cached_tokens >= least for c in found[:3])
            assert found[3].cached_tokens == 0  # penalties need every token
            said = [(*ids, *c.token_ids, 1, 2) for ids, c in zip(said, found, strict=True)]
        settled(engine)
        stats = engine.stats()
        checked(engine)
        assert stats.spilled_pages > 20 and stats.restored_pages > 20
        assert 0 < stats.host_page_bytes <= 256 * 1024
        assert counts.look() == (0, 0)
    assert all(ids == alone(toy, request) for request, ids in answers)


def test_a_host_with_little_room(toy):
    """Ten pages; those that do not fit any more are computed again."""
    config = dataclasses.replace(TIGHT, spill_gib=10 * KIB)
    requests = [ask(prompt(60, seed=i % 3), 8) for i in range(9)]
    with Engine(toy, config) as engine:
        found = [engine.generate(request)[0].token_ids for request in requests]
        assert engine.stats().host_page_bytes <= 10 * 1024
        assert engine.stats().spilled_pages > 0
        checked(engine)
    assert found == [alone(toy, request) for request in requests]


def _random(x, dice):
    values = dice.standard_normal(x.shape).astype(x.dtype)
    return jax.device_put(values, x.sharding)


@pytest.mark.parametrize("name", ["latent", "gqa", "windows", "mesh", "draft"])
def test_every_bit_comes_back(name, toy):
    """Eleven pages of each group leave, in parts still on their way, and come into others."""
    model = on(tensor=2) if name == "mesh" else made(SPECS[name]) if name in SPECS else toy
    setup, windows = model.generator.setup, groups(model.spec)
    draft = made(SPECS["gqa"]).generator.setup if name == "draft" else None
    windows |= {} if draft is None else groups(draft.spec)
    memory = Memory(page_size=4, pages=dict.fromkeys(windows, 30), windows=windows, slots=1)
    transfer = Transfer(setup, memory, draft, None)
    dice = np.random.default_rng(3)
    state = jax.tree.map(lambda x: _random(x, dice), abstract_state(setup, memory, draft)[0])
    before = jax.tree.map(np.array, state)
    pages = {group: dice.permutation(30) for group in windows}
    kept = {group: [Kept(1) for _ in range(11)] for group in windows}
    out = [(g, int(pages[g][i]), kept[g][i]) for i in range(11) for g in windows]
    back = [(g, int(pages[g][29 - i]), kept[g][i]) for i in range(11) for g in windows]
    state = transfer.run(state, out[:5], [])
    state = transfer.run(state, out[5:], back[:3])
    state = transfer.run(state, [], back[3:])
    total = 0
    for part, one in zip((0, 1), (setup, draft), strict=True):
        if one is None:
            continue
        marks = page_axes(one.spec, one.segments)

        def check(mark, was, now):
            nonlocal total
            (group, axis), expected = (
                mark,
                [np.moveaxis(x, mark[1], 0) for x in jax.tree.leaves(was)],
            )
            for x, y in zip(expected, jax.tree.leaves(now), strict=True):
                x = x.copy()
                x[pages[group][29 - np.arange(11)]] = x[pages[group][:11]]
                np.testing.assert_array_equal(np.moveaxis(np.asarray(y), axis, 0), x)
                total += x.nbytes // len(x)

        is_mark = lambda m: isinstance(m, tuple)  # noqa: E731
        jax.tree.map(check, marks, before[part], state[part], is_leaf=is_mark)
    assert total == sum(transfer.page_bytes.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["latent", "gqa"])
def test_other_pages(name):
    """Vectors of latent attention; layers that are stacked."""
    model = made(SPECS[name])
    config = EngineConfig(max_sequences=2, max_batch_tokens=16, page_size=4, cache_tokens=64)
    prompts = [prompt(40, seed=i % 3) for i in range(6)]
    prompts = [[i % model.spec.vocab for i in ids] for ids in prompts]
    with Engine(model, dataclasses.replace(config, spill_gib=1024 * KIB)) as engine:
        found = [engine.generate(ask(ids, 6))[0] for ids in prompts]
        assert engine.stats().restored_pages > 0
    assert [c.cached_tokens for c in found] == [0] * 3 + [36] * 3
    assert [c.token_ids for c in found] == [
        model.generate(ids, max_tokens=6).token_ids for ids in prompts
    ]


@pytest.mark.slow
def test_a_draft_model_s_pages_go_along(toy):
    """A draft that forgot its part of a page would agree less."""
    config = dataclasses.replace(TIGHT, draft_tokens=3, draft_cost=0.01)
    requests = [ask(prompt(50, seed=i % 3), 12) for i in range(6)]
    with Engine(toy, config, draft=toy) as engine:
        sizes = page_bytes(engine)
        found = [engine.generate(request)[0] for request in requests]
        stats = engine.stats()
    with Engine(toy, TIGHT) as engine:
        assert sizes == {g: 2 * size for g, size in page_bytes(engine).items()}
    assert [c.token_ids for c in found] == [alone(toy, request) for request in requests]
    assert [c.cached_tokens for c in found] == [0] * 3 + [48] * 3
    assert stats.restored_pages > 0 and stats.accepted_tokens == stats.drafted_tokens > 0


def test_what_cannot_be_spilled(toy):
    with pytest.raises(ConfigError, match="needs the prefix cache"):
        EngineConfig(spill_gib=1.0, prefix_cache=False)
    with pytest.raises(ConfigError, match="spill_gib is at least 0"):
        EngineConfig(spill_gib=-1.0)
    with pytest.raises(ConfigError, match=r"more than this machine's \d+ GiB"):
        EngineConfig(spill_gib=float("inf"))
    with pytest.raises(ConfigError, match="spill_gib: 1 bytes hold no page, which has 512"):
        Engine(toy, dataclasses.replace(TIGHT, spill_gib=1 / 2**30))
    with pytest.raises(UnsupportedError, match=r"spill_gib: .* no prefix cache to spill"):
        Engine(made(SPECS["selective"]), dataclasses.replace(CONFIG, spill_gib=1.0))
