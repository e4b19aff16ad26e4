"""The account of pages: nothing is lost, nothing is given twice, kept pages hold what they held."""

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jaxllm.errors import CapacityError, ConfigError
from jaxllm.serve.pages import Pages, chain
from jaxllm.serve.spill import HostPages, accounts

COUNT = 5


class Account(RuleBasedStateMachine):
    """Holders by page, and what each page is full of, beside the real account; pages that are given
    up go to a host with room for two."""

    def __init__(self):
        super().__init__()
        self.host = HostPages(25, {"all": 10})
        self.pages = accounts({"all": COUNT}, self.host)["all"]
        self.holders = dict.fromkeys(range(COUNT), 0)
        self.named: dict[bytes, int] = {}
        self.kept: list[int] = []
        self.on_host: list[bytes] = []
        self.full_of: dict[int, bytes | None] = dict.fromkeys(range(COUNT))
        self.overwritten: list[int] = []

    @property
    def held(self):
        return [page for page, count in self.holders.items() if count]

    def taken(self):
        """A page that is taken, and what this costs."""
        free = COUNT - len(self.held) - len(self.kept)
        page = self.pages.take()
        assert self.holders[page] == 0
        if free:
            assert page not in self.kept
        else:  # the least recently used one
            assert page == self.kept.pop(0)
            (key,) = (key for key, p in self.named.items() if p == page)
            del self.named[key]
            self.on_host = [*(other for other in self.on_host if other != key), key][-2:]
        self.holders[page] = 1
        return page

    @rule()
    def take(self):
        if len(self.held) == COUNT:
            with pytest.raises(CapacityError, match="all 5 pages are held"):
                self.pages.take()
            return
        self.overwritten.append(self.taken())

    @rule()
    def step(self):
        """Copies go to the host and come back, and then the step writes."""
        leaving, coming = self.host.moves()
        for group, page, kept in leaving:
            assert (group, kept.data) == ("all", None)
            kept.data = self.full_of[page]
        for page in self.overwritten:
            self.full_of[page] = None
        for _, page, kept in coming:
            assert kept.data is not None
            self.full_of[page] = kept.data
        self.overwritten = []

    @precondition(lambda self: self.held)
    @rule(data=st.data(), key=st.sampled_from([b"a", b"b", b"c", b"d"]))
    def name(self, data, key):
        page = data.draw(st.sampled_from(self.held))
        self.step()
        self.pages.name(page, key)
        if key not in self.named and page not in self.named.values():
            self.named[key] = page
            self.full_of[page] = key

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data):
        page = data.draw(st.sampled_from(self.held))
        self.step()
        self.pages.release(page)
        self.holders[page] -= 1
        if not self.holders[page] and page in self.named.values():
            self.kept.append(page)

    @rule(key=st.sampled_from([b"a", b"b", b"c", b"d"]))
    def share(self, key):
        page = self.pages.find(key)
        assert page == self.named.get(key)
        if page is not None:
            assert self.pages.is_kept(page) == (self.holders[page] == 0)
            self.pages.share(page)
            self.holders[page] += 1
            self.kept = [other for other in self.kept if other != page]
            return
        kept = self.host.find("all", key)
        assert (kept is not None) == (key in self.on_host)
        if kept is not None and len(self.held) < COUNT:
            page = self.taken()
            self.pages.name(page, key)
            self.host.come("all", key, page, kept)
            self.named[key] = page
            if key in self.on_host:
                self.on_host = [*(other for other in self.on_host if other != key), key]

    @invariant()
    def nothing_is_lost(self):
        self.pages.check()
        self.host.check()
        assert self.pages.held == len(self.held)
        assert self.pages.available == COUNT - len(self.held)
        assert self.pages.kept == len(self.kept)
        assert self.host.bytes == 10 * len(self.on_host)

    @invariant()
    def pages_hold_what_they_say(self):
        self.step()
        assert all(self.full_of[page] == key for key, page in self.named.items())


Account.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
test_the_account = Account.TestCase


def test_chains_depend_on_all_before_and_on_the_tenant():
    tokens = list(range(10))
    keys = chain(tokens, 4)
    assert len(keys) == len(set(keys)) == 2
    assert chain(tokens, 4, known=keys[:1]) == keys
    assert chain([*tokens[:8], 77, 78, 79, 80], 4)[:2] == keys
    assert chain([99, *tokens[1:]], 4)[1] != keys[1]
    assert not set(chain(tokens, 4, salt="b")) & set(keys)
    assert chain(tokens[:3], 4) == []


def test_wrong_use_is_an_error():
    pages = Pages(2)
    for call in (pages.share, pages.release, lambda page: pages.name(page, b"a")):
        with pytest.raises(ConfigError):
            call(0)
    with pytest.raises(ConfigError, match="at least one"):
        Pages(0)
