"""Scheduling without a device: who is fed when, and that nothing is lost."""

import random

import pytest

from jaxllm.errors import CapacityError, ConfigError
from jaxllm.serve.pages import Pages
from jaxllm.serve.scheduler import Limits, Scheduler
from jaxllm.serve.sequence import Sequence

SIZE = 4


class Guesses:
    """A drafter that is active as it likes and guesses whatever."""

    def __init__(self, dice):
        self.dice = dice

    def active(self, length):
        return length % 4 > 0

    def propose(self, tokens, most, rows):
        return [self.dice.randint(0, 2) for _ in range(self.dice.randint(0, most))]

    def learn(self, drafted, accepted):
        assert 0 <= accepted <= drafted > 0


def scheduler(pages=64, *, tokens=16, sequences=4, windows=None, **more):
    windows = windows or {"all": None}
    limits = Limits(tokens=tokens, sequences=sequences, longest=tokens, page_size=SIZE, **more)
    return Scheduler(limits, {g: Pages(pages) for g in windows}, windows)


def sequence(length, new=4, *, first=0, **more):
    tokens = list(range(first, first + length))
    return Sequence(tokens=tokens, prompt_length=length, limit=length + new, **more)


def step(sched, token=500):
    """Plan, and read what was drawn at once."""
    turns = sched.plan()
    for turn in turns:
        if sched.drawn(turn, [token]) and len(turn.sequence.tokens) >= turn.sequence.limit:
            sched.finish(turn.sequence)
    return [(turn.sequence, turn.start, turn.count, turn.draws) for turn in turns]


def test_prompts_come_in_chunks_and_then_one_by_one():
    sched, one = scheduler(), sequence(35, 3)
    sched.add(one)
    found = []
    while not one.done:
        found += [turn[1:] for turn in step(sched)]
    chunks = [(0, 16, False), (16, 16, False), (32, 3, True)]
    assert found == [*chunks, (35, 1, True), (36, 1, True)]
    assert sched.pages["all"].held == 0


@pytest.mark.parametrize("first", [True, False])
def test_decoding_goes_on_while_long_prompts_come(first):
    """Also past a prompt that was there before, whose chunks would fill every step."""
    sched, short = scheduler(pages=200), sequence(4, 30)
    long = [sequence(15 if i == 0 else 60, 200, first=100 * (i + 1)) for i in range(3)]
    order = [short, *long] if first else [long[0], short, *long[1:]]
    sched.add(order[0])
    sched.add(order[1])
    while short.length == short.prompt_length:
        step(sched)
    for one in order[2:]:
        one.arrival = -1
        sched.add(one)
        one.arrival = -1  # the most senior of all
    for _ in range(10):
        turns = step(sched)
        assert short in [turn[0] for turn in turns]
        assert sum(turn[2] for turn in turns) <= 16


def test_the_urgent_and_then_tenants_in_turn():
    sched = scheduler(sequences=1)
    greedy = [sequence(8, 1, tenant="a", first=10 * i) for i in range(3)]
    other = sequence(8, 1, tenant="b", first=70)
    urgent = sequence(8, 1, tenant="a", priority=-1, first=90)
    for one in (*greedy, other, urgent):
        sched.add(one)
    order = []
    while not all(one.done for one in (*greedy, other, urgent)):
        order += [turn[0] for turn in step(sched)]
    assert order == [urgent, other, *greedy]


def test_a_newcomer_has_no_claim_on_the_past():
    sched = scheduler(sequences=1)
    for i in range(3):
        sched.add(sequence(8, 1, tenant="a", first=10 * i))
        step(sched)
    sched.add(sequence(8, 9, tenant="a"))
    step(sched)
    late, same = sequence(8, 1, tenant="b", first=50), sequence(8, 1, tenant="a", first=60)
    sched.add(late)
    sched.add(same)
    assert sched._served["b"] == sched._served["a"]


@pytest.mark.parametrize("unread", [False, True])
def test_the_least_urgent_gives_up_its_pages(unread):
    """Two sequences grow beyond what there is; the later one is computed again, from the start."""
    sched = scheduler(pages=6, sequences=2)
    first, second = sequence(8, 12), sequence(8, 12, first=50)
    sched.add(first)
    sched.add(second)
    waiting = []
    for _ in range(60):
        turns = sched.plan()
        waiting.append(turns)
        if unread and len(waiting) < 2:
            continue
        for turn in waiting.pop(0):
            if sched.drawn(turn, [7]) and len(turn.sequence.tokens) >= turn.sequence.limit:
                sched.finish(turn.sequence)
    assert sched.preemptions >= 1
    assert (first.done, second.done) == (True, True)
    assert second.tokens == [*range(50, 58), *[7] * 12]
    sched.pages["all"].check()
    assert sched.pages["all"].held == 0


def test_windows_leave_pages_behind():
    sched = scheduler(windows={"all": None, "window6": 6}, tokens=8)
    one = sequence(40, 20)
    sched.add(one)
    most = 0
    for _ in range(12):
        single = step(sched)[0][2] == 1
        most = max(most, sched.pages["window6"].held)
        kept = one.holdings["window6"]
        assert not single or len(kept.pages) <= (6 + 1) // SIZE + 2  # what its table can say
        assert kept.first <= max(0, one.computed - 6) // SIZE
        assert kept.end * SIZE >= one.computed
    assert most <= (6 + 8) // SIZE + 2
    assert sched.pages["all"].held == -(-one.computed // SIZE)


def test_a_prefix_needs_of_a_window_its_last_pages_alone():
    sched = scheduler(windows={"all": None, "window6": 6})
    one = sequence(40, 1)
    sched.add(one)
    while not one.done:
        step(sched)
    again = sequence(40, 1)
    sched.add(again)
    turns = step(sched)
    assert (again.cached, turns[0][1:]) == (36, (36, 4, True))
    for key in [k for k, p in sched.pages["window6"]._page_of.items()]:
        del sched.pages["window6"]._page_of[key]
    sched.pages["window6"]._hash_of.clear()
    third = sequence(40, 1)
    sched.add(third)
    step(sched)
    assert third.cached == 0


def test_shared_prefixes_are_held_once():
    sched = scheduler(sequences=3)
    one = sequence(16, 20)
    sched.add(one)
    step(sched)
    for _ in range(2):
        sched.add(sequence(16, 20))
    step(sched)
    assert [s.cached for s in sched.running] == [0, 12, 12]
    # Four of the first with its answer's, one more for each of the others.
    assert sched.pages["all"].held == 5 + 2


def test_what_can_never_run_is_refused():
    with pytest.raises(CapacityError, match="exceed the 4 pages"):
        scheduler(pages=4).add(sequence(15, 4))
    with pytest.raises(ConfigError, match="must hold one"):
        scheduler(tokens=2, sequences=4)


@pytest.mark.parametrize("seed", range(8))
def test_any_mix_ends_and_gives_everything_back(seed):
    """Random lengths, tenants, cancellations, few pages, answers read late; guesses in half, and
    in a quarter steps that the device takes by itself."""
    dice = random.Random(seed)
    windows = {"all": None, "window5": 5} if seed % 2 else {"all": None}
    drafts = {"drafts": 3, "verified": 9} if seed > 3 else {"steps": 1 + 2 * (seed // 2)}
    several = 0
    sched = scheduler(pages=14, windows=windows, sequences=3, prefix_cache=seed % 3 > 0, **drafts)
    everyone, waiting = [], []
    for turn_number in range(600):
        if turn_number < 200 and dice.random() < 0.3:
            one = sequence(
                dice.randint(1, 40),
                dice.randint(1, 15),
                first=100 * dice.randint(0, 2),
                tenant=dice.choice("ab"),
                priority=dice.randint(0, 1),
                drafter=Guesses(dice) if seed > 3 and dice.random() < 0.7 else None,
                plain=seed <= 3 and dice.random() < 0.8,
            )
            everyone.append(one)
            sched.add(one)
        most = 0 if sched.held_up else 2
        if not sched.held_up:
            waiting.append(sched.plan())
        slots = [s.slot for s in sched.running]
        assert len(set(slots)) == len(slots) <= 3
        if waiting and any(turn.drafts for turn in waiting[-1]):
            assert sum(turn.count for turn in waiting[-1]) <= 9
            assert max(turn.count for turn in waiting[-1]) <= 4
        if waiting and waiting[-1] and waiting[-1][0].steps > 1:
            several += 1
            counts = [turn.count for turn in waiting[-1]]
            assert counts == sorted(counts, reverse=True) and 1 <= counts[-1] <= counts[0] <= 3
        while len(waiting) > dice.randint(0, most):
            for turn in waiting.pop(0):
                one = turn.sequence
                drawn = [dice.randint(0, 2) for _ in range(turn.places)]
                fresh = sched.drawn(turn, drawn)
                assert one.computed <= len(one.tokens) + one.unread <= one.limit or not fresh
                if fresh and (len(one.tokens) >= one.limit or dice.random() < 0.02):
                    sched.finish(one)
        if dice.random() < 0.03 and everyone:
            sched.finish(dice.choice(everyone))
        for pages in sched.pages.values():
            pages.check()
    assert everyone
    assert (sched.accepted_tokens > 0) == (seed > 3)
    assert (several > 0) == (seed in (2, 3))
    assert sched.accepted_tokens <= sched.drafted_tokens
    assert all(one.done for one in everyone)
    assert [pages.held for pages in sched.pages.values()] == [0] * len(windows)


def test_a_pinned_prefix_stays_and_is_everybodys():
    """Other prompts need all pages there are; what follows the prefix is still each tenant's."""
    sched = scheduler(pages=20, sequences=2, windows={"all": None, "window6": 6})
    prefix = list(range(18))

    def run(tokens, tenant=""):
        count = len(tokens)
        one = Sequence(tokens=tokens, prompt_length=count, limit=count + 1, tenant=tenant)
        sched.add(one)
        while not one.done:
            step(sched)
        return one.cached

    assert run(prefix) == 0
    assert sched.prefixes.pin(prefix) == 16
    held = [pages.held for pages in sched.pages.values()]
    assert held == [4, 2]  # of the window, what a token after the prefix sees
    for i in range(5):
        run([100 + i, *range(200, 245)], "a")
    long = [*prefix, *range(50, 58)]
    assert [run(long, "a"), run(long, "b"), run(long, "a")] == [16, 16, 24]
    assert run([*prefix[:9], 99, 98, 97, 96], "c") in (0, 8)
    assert [pages.held for pages in sched.pages.values()] == held
    with pytest.raises(CapacityError, match="exceed the 16 pages"):
        sched.check_fits(65)
    with pytest.raises(CapacityError, match="cannot be pinned"):
        sched.prefixes.pin(list(range(500, 520)))
    for pages in sched.pages.values():
        pages.check()


def test_no_more_than_half_is_pinned():
    sched = scheduler(pages=12)
    sched.add(sequence(30, 1))
    while sched.running or sched.waiting:
        step(sched)
    with pytest.raises(CapacityError, match="at most half"):
        sched.prefixes.pin(list(range(30)))
    assert sched.pages["all"].held == 0


def test_prompts_come_in_small_parts_while_others_decode():
    sched, short, long = scheduler(mixed=5), sequence(4, 30), sequence(40, 2, first=100)
    sched.add(short)
    step(sched)
    sched.add(long)
    counts = []
    while not long.done:
        turns = step(sched)
        counts.append(tuple(turn[2] for turn in turns))
    assert counts[:10] == [(1, 4)] * 10  # one that decodes, four of the prompt
    assert not short.done or counts[-1]
    alone = sequence(40, 1, first=300)
    while not short.done:
        step(sched)
    sched.add(alone)
    assert step(sched)[0][2] == 16
