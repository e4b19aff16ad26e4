"""Paged = dense = the full forward: flat batches of prefill chunks and single tokens together."""

import functools

import jax
import numpy as np
import pytest

from jaxllm.core.policy import Policy
from jaxllm.core.tree import map_leaves, single_segments
from jaxllm.errors import ConfigError, UnsupportedError
from jaxllm.nn import api
from jaxllm.ops import paged
from jaxllm.ops.flat import Flat
from jaxllm.ops.pages import PageTable
from jaxllm.spec.mask import And, Causal, Full, Window
from jaxllm.spec.table import model_table
from jaxllm.state.paged import groups, page_axes, page_bytes, paged_state
from jaxllm.state.step import dense_step, flat_step
from tests.contracts.specs import (
    DECODERS,
    SPECS,
    assert_close,
    full,
    heads,
    model,
    params,
    pre,
    quick,
    single,
    tokens,
)
from tests.contracts.specs import MLP48 as MLP

SIZE, WIDTH, SLOTS, ROWS = 2, 7, 6, 5
# Tokens of each of four sequences in each step: chunks, single tokens, none, then singles only.
PLAN = [(7, 0, 3, 1), (2, 5, 1, 1), (0, 1, 4, 0), (1, 1, 1, 1), (1, 0, 1, 1), (1, 1, 1, 1)]
ORDER = [2, 0, 3, 1]  # rows are not in the order of slots
SLOT = [4, 0, 5, 2]


def worst(x: np.ndarray) -> float:
    """What a page must not hold where it is read."""
    return 127 if x.dtype == np.int8 else np.nan


def poisoned(name: str, *, apart: bool = False, kv_dtype: str = "auto", spare: bool = False):
    """A state in which every page and slot holds NaN, or what comes next to it in whole numbers."""
    number, spec = dict.fromkeys(groups(SPECS[name]), 4 * WIDTH + spare), SPECS[name]
    segments = single_segments(spec.num_layers) if apart else None
    how = {"page_size": SIZE, "dtype": np.float32, "segments": segments, "kv_dtype": kv_dtype}
    shapes = paged_state(spec, number, SLOTS, **how)
    return jax.tree.map(lambda x: np.full(x.shape, worst(x), x.dtype), shapes)


def tables(name: str, starts: np.ndarray, rows: list[int]) -> dict[str, PageTable]:
    """Scattered pages of each row; those behind a window have been given away."""
    out = {}
    for group, left in groups(SPECS[name]).items():
        pages = np.random.default_rng(3).permutation(4 * WIDTH).reshape(4, WIDTH).astype(np.int32)
        held = np.full((ROWS, WIDTH), 4 * WIDTH, np.int32)
        firsts = np.zeros((ROWS,), np.int32)
        for place, row in enumerate(rows):
            gone = 0 if left is None else max(0, starts[row] - left) // SIZE
            held[place, : WIDTH - gone], firsts[place] = pages[row, gone:], gone
        out[group] = PageTable(held, firsts)
    return out


@functools.cache
def program(name: str, length: int, longest: int, implementation: str):
    """(params, state, ids [1, T], counts, starts, slots, tables) -> (logits, state)."""
    spec, policy = SPECS[name], Policy()

    def run(weights, state, ids, counts, starts, slots, table):
        step = flat_step(Flat(counts, starts, slots, longest), length, table)
        hidden, state, _ = api.apply(spec, weights, ids, step, state, policy=policy)
        return api.unembed(spec, weights, hidden, policy=policy), state

    del implementation  # a part of the key alone
    return quick(run)


def replies(name: str, implementation: str, weights, state):
    """(sequence, first token, logits) of what every step of the plan gives of it."""
    ids = tokens(name)
    starts = np.zeros(4, np.int32)
    for plan in PLAN:
        rows = [row for row in ORDER if plan[row]]
        alone = max(plan) == 1
        length = ROWS if alone else 14
        fed, counts = np.full((1, length), 63, np.int32), np.zeros(ROWS, np.int32)
        slots, begun = np.full(ROWS, SLOTS, np.int32), np.zeros(ROWS, np.int32)
        place = 0
        for i, row in enumerate(rows):
            new = ids[row, starts[row] : starts[row] + plan[row]]
            fed[0, place : place + len(new)] = new
            counts[i], slots[i], begun[i] = plan[row], SLOT[row], starts[row]
            place += len(new)
        run = program(name, length, 1 if alone else 7, implementation)
        table = tables(name, starts, rows)
        logits, state = run(weights, state, fed, counts, begun, slots, table)
        place = 0
        for row in rows:
            found = np.asarray(logits)[0, place : place + plan[row]]
            yield row, starts[row], found
            place += plan[row]
            starts[row] += plan[row]
    assert starts.tolist() == [12, 8, 11, 5]


CASES = [(name, "loop") for name in DECODERS] + [("gqa", "gather"), ("latent", "gather")]
APART = [("gqa", "apart")]
APART += [pytest.param(n, "apart", marks=pytest.mark.slow) for n in DECODERS if n != "gqa"]


@pytest.mark.parametrize(("name", "implementation"), [*CASES, *APART])
def test_mixed_batches_are_the_full_forward(name, implementation, monkeypatch):
    """Layers stacked as the spec says, or `apart`: one by one, traced once for all alike."""
    apart = implementation == "apart"
    implementation = "loop" if apart else implementation
    weights = single(params(name), SPECS[name].num_layers) if apart else params(name)
    monkeypatch.setattr(paged, "STRIDE", 4)
    monkeypatch.setattr(paged, "_choose", lambda *_: implementation)
    monkeypatch.setattr("jaxllm.ops.flat.BLOCK", 3)
    wanted = full(name)
    state = poisoned(name, apart=apart)
    for row, start, found in replies(name, implementation, weights, state):
        assert_close(found, wanted[row, start : start + len(found)])


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
@pytest.mark.parametrize("name", ["gqa", "selective"])
def test_pages_of_8_bits_are_nearly_the_full_forward(name, kv_dtype, monkeypatch):
    """Bounds on the logits' root mean square error, as a share of their own; what is off by more is
    a mistake, not rounding."""
    monkeypatch.setattr(paged, "STRIDE", 4)
    monkeypatch.setattr(paged, "_choose", lambda *_: "loop")
    monkeypatch.setattr("jaxllm.ops.flat.BLOCK", 3)
    wanted, errors = full(name), []
    state = poisoned(name, kv_dtype=kv_dtype)
    for row, start, found in replies(name, f"loop, {kv_dtype}", params(name), state):
        errors.append(found - wanted[row, start : start + len(found)])
    error = np.sqrt(np.mean(np.concatenate(errors) ** 2) / np.mean(wanted**2))
    assert 1e-5 < error < {"int8": 0.02, "fp8": 0.08}[kv_dtype]


CODED = [("gqa", "auto"), ("latent", "auto"), ("gqa", "int8")]


@pytest.mark.parametrize(("name", "kv_dtype"), CODED)
def test_a_spare_page_changes_no_bit(name, kv_dtype):
    """One sequence token by token, with steps of padding: what has no place is written to a page
    that nobody reads, and everything else is as where it is dropped."""
    ids, found = tokens(name)[0], {}
    for spare in (False, True):
        run = program(name, 1, 1, f"{kv_dtype}, spare {spare}")
        state, found[spare] = poisoned(name, kv_dtype=kv_dtype, spare=spare), []
        for place, token in enumerate(ids):
            starts, one = np.full(1, place, np.int32), np.ones(1, np.int32)
            table = {
                group: PageTable(whole.pages[:1], whole.firsts[:1], spare)
                for group, whole in tables(name, starts, [0]).items()
            }
            for count in (0, 1):
                fed = np.array([[token if count else 63]], np.int32)
                logits, state = run(
                    params(name), state, fed, count * one, starts, SLOT[0] * one, table
                )
            found[spare].append(np.asarray(logits)[0, 0])
        if kv_dtype == "auto":
            assert_close(np.stack(found[spare]), full(name)[0, : len(ids)])
        found[spare] = np.stack(found[spare]), jax.tree.map(np.asarray, state)
    assert found[True][0].tobytes() == found[False][0].tobytes()

    def same(mark, dropped, wasted):
        for old, new in zip(jax.tree.leaves(dropped), jax.tree.leaves(wasted), strict=True):
            held, nobodys = np.split(np.moveaxis(new, mark[1], 0), [4 * WIDTH])
            assert held.tobytes() == np.moveaxis(old, mark[1], 0).tobytes()
            assert len(nobodys) == 1 and np.isfinite(nobodys).any()  # padding went there

    is_mark = lambda m: isinstance(m, tuple)  # noqa: E731
    jax.tree.map(same, page_axes(SPECS[name]), found[False][1], found[True][1], is_leaf=is_mark)


def test_layers_alike_are_traced_once():
    """Twelve layers of a block lower to no more products than three do."""

    def products(layers: int) -> int:
        spec = model(pre("G", heads(4, 2), MLP), layers=f"G*{layers}")
        segments, pages = single_segments(layers), {"all": 4}
        table = model_table(spec, segments)
        weights = map_leaves(lambda _, d: jax.ShapeDtypeStruct(d.shape, np.float32), table)
        state = paged_state(spec, pages, 2, page_size=4, dtype=np.float32, segments=segments)
        one, ids = np.ones(2, np.int32), np.zeros((1, 2), np.int32)
        flat = Flat(one, one, one, 1)
        where = {"all": PageTable(np.zeros((2, 3), np.int32), np.zeros(2, np.int32))}

        def run(weights, state):
            step = flat_step(flat, 2, where)
            return api.apply(spec, weights, ids, step, state, policy=Policy())[:2]

        return jax.jit(run).lower(weights, state).as_text().count("dot_general")

    assert products(3) == products(12) > 6


def test_groups_are_what_masks_reach():
    assert groups(SPECS["gqa"]) == {"all": None, "window2": 2}
    assert groups(SPECS["selective"]) == {"all": None}
    sizes = page_bytes(SPECS["gqa"], page_size=4, dtype=np.float32)
    # Layers A and two of G have 4 x 8 + 2 (2 x 8) numbers for keys, as many for values.
    assert sizes == {"all": 4 * 4 * 2 * (32 + 2 * 16), "window2": 4 * 4 * 2 * 3 * 16}
    for kv_dtype in ("auto", "int8", "fp8"):
        how = {"page_size": 4, "dtype": np.float32, "kv_dtype": kv_dtype}
        sizes = page_bytes(SPECS["gqa"], **how)
        layers = jax.tree.leaves(paged_state(SPECS["gqa"], {"all": 5, "window2": 3}, 2, **how))
        held = sum(x.size * x.dtype.itemsize for x in layers)
        assert held == 5 * sizes["all"] + 3 * sizes["window2"]
    # A byte for each number, and two scales of four bytes for each head.
    assert sizes == {
        "all": 4 * 2 * (32 + 4 * 4 + 2 * (16 + 2 * 4)),
        "window2": 4 * 2 * 3 * (16 + 8),
    }


@pytest.mark.parametrize("mask", [Full(), And(first=Full(), second=Window(left=2, right=1))])
def test_masks_that_look_ahead_are_refused(mask):
    spec = model(pre("G", heads(4, 2, mask=mask), MLP), layers="G")
    with pytest.raises(UnsupportedError, match="pages hold parts"):
        groups(spec)
    assert groups(model(pre("G", heads(4, 2, mask=Causal()), MLP), layers="G")) == {"all": None}


def test_a_paged_state_needs_a_flat_step():
    state = poisoned("mha")
    with pytest.raises(UnsupportedError, match="flat step"):
        api.apply(
            SPECS["mha"], params("mha"), tokens("mha"), dense_step(np.zeros(4, np.int32), 12),
            state, policy=Policy(),
        )  # fmt: skip


def test_8_bits_are_for_keys_and_values_of_heads():
    how = {"page_size": 4, "dtype": np.float32}
    with pytest.raises(UnsupportedError, match="latent attention are shared by all heads"):
        page_bytes(SPECS["latent"], kv_dtype="int8", **how)
    with pytest.raises(UnsupportedError, match="no attention and so no pages"):
        paged_state(SPECS["delta"], {}, 2, kv_dtype="fp8", **how)
    with pytest.raises(ConfigError, match="kv_dtype 'int4' is unknown; did you mean 'int8'"):
        page_bytes(SPECS["gqa"], kv_dtype="int4", **how)
