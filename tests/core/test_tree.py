"""Paths, segments, selection and partition of parameter trees."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.core.tree import (
    Segment,
    flatten,
    map_leaves,
    merge,
    partition,
    restack,
    runs,
    segments_of,
    select,
    stack_equal,
    unflatten,
    unstack,
    unstacked_paths,
)
from jaxllm.core.weights import quantize
from jaxllm.errors import ConfigError, WeightsError

KEYS = {
    "7": Segment(7, 8, 1, stacked=False),
    "0:30": Segment(0, 30),
    "0:48:6": Segment(0, 48, 6),
}


def params(layers=6):
    """One array a layer that says which it is."""
    tree = {str(i): {"mlp": {"up": np.full((2,), i)}} for i in range(layers)}
    return {"embed": {"table": np.zeros(3)}, "layers": tree}


@pytest.mark.parametrize("key", KEYS)
def test_keys_name_segments(key):
    assert Segment.parse(key) == KEYS[key]
    assert KEYS[key].key == key


@pytest.mark.parametrize("key", ["", "a", "1:2:3:4", "-1", "1:", "0:5:2", "3:3", "5:3", "0:4:0"])
def test_wrong_keys_are_errors(key):
    with pytest.raises((WeightsError, ConfigError)):
        Segment.parse(key)


def test_segments_must_tile():
    assert [s.key for s in segments_of({"2:6:2": 0, "0": 0, "1": 0})] == ["0", "1", "2:6:2"]
    for layers in ({"1": 0}, {"0": 0, "2": 0}, {"0:2": 0, "1": 0}):
        with pytest.raises(WeightsError, match="missing or held twice"):
            segments_of(layers)


@st.composite
def tilings(draw):
    """Segments that tile 0..6."""
    out, start = [], 0
    while start < 6:
        unit = draw(st.integers(1, min(3, 6 - start)))
        repeats = draw(st.integers(1, (6 - start) // unit))
        single = unit == 1 and repeats == 1 and draw(st.booleans())
        out.append(Segment(start, start + unit * repeats, unit, stacked=not single))
        start = out[-1].stop
    return tuple(out)


@settings(max_examples=50, deadline=None)
@given(tilings(), tilings())
def test_restacking_goes_anywhere_and_back(first, second):
    one = restack(params(), first)
    two = restack(one, second)
    assert segments_of(two["layers"]) == second
    back = unstack(two)
    for (path, a), (wanted, b) in zip(flatten(back), flatten(params()), strict=True):
        assert path == wanted
        assert np.array_equal(a, b)
    for path, leaf in flatten(two["layers"]):
        assert len(unstacked_paths(f"layers.{path}")) == leaf.size // 2


def test_units_hold_their_places():
    tree = restack(params(), (Segment(0, 6, 2),))["layers"]["0:6:2"]
    assert np.array_equal(tree["0"]["mlp"]["up"][:, 0], [0, 2, 4])
    assert np.array_equal(tree["1"]["mlp"]["up"][:, 0], [1, 3, 5])
    assert unstacked_paths("layers.0:6:2.1.mlp.up") == [f"layers.{i}.mlp.up" for i in (1, 3, 5)]
    assert unstacked_paths("layers.3.mlp.up") == ["layers.3.mlp.up"]
    assert unstacked_paths("embed.table") == ["embed.table"]


@pytest.mark.parametrize("change", ["shape", "dtype", "kind", "names"])
def test_layers_that_differ_are_not_stacked(change):
    tree = params()
    other = {
        "shape": {"mlp": {"up": np.zeros(3, int)}},
        "dtype": {"mlp": {"up": np.zeros(2, np.int8)}},
        "kind": {"mlp": {"up": quantize(jnp.ones((2, 2)), "int8")}},
        "names": {"mlp": {"down": np.zeros(2, int)}},
    }
    tree["layers"]["3"] = other[change]
    with pytest.raises(WeightsError, match="differ in their leaves"):
        restack(tree, (Segment(0, 6),))
    assert [s.key for s in runs(tree)] == ["0:3", "3", "4:6"]


def test_equal_neighbours():
    assert [s.key for s in stack_equal("aabaaa")] == ["0:2", "2", "3:6"]
    assert [s.key for s in stack_equal("a")] == ["0"]


def test_select_takes_globs_over_unstacked_paths():
    assert select("layers.3.mlp.up", ("layers.*.mlp.*",))
    assert not select("layers.3.mlp.up", ("layers.*.attn.*", "embed.*"))
    assert select("layers.0:6:2.1.mlp.up", ("layers.[135].mlp.up",))
    assert not select("layers.0:6:2.0.mlp.up", ("layers.[135].mlp.up",))
    assert select("embed.table", ("*",))


def test_a_part_of_a_stack_cannot_be_selected():
    with pytest.raises(ConfigError, match="unstack first"):
        select("layers.0:6.mlp.up", ("layers.3.*",))


@pytest.mark.parametrize(
    ("rule", "chosen"),
    [
        (("layers.2.*", "embed.*"), {"layers.2.mlp.up", "embed.table"}),
        (lambda path: path.startswith("embed"), {"embed.table"}),
        (("nothing",), set()),
        (("*",), {p for p, _ in flatten(params())}),
    ],
)
def test_partition_and_merge(rule, chosen):
    tree = params()
    part, rest = partition(tree, rule)
    assert {p for p, _ in flatten(part) if p} == chosen
    assert {p for p, _ in flatten(rest) if p} == {p for p, _ in flatten(tree)} - chosen
    for whole in (merge(part, rest), merge(rest, part)):
        assert dict(flatten(whole)).keys() == dict(flatten(tree)).keys()
        for path, leaf in flatten(whole):
            assert leaf is dict(flatten(tree))[path]


def test_merge_prefers_the_first():
    assert merge({"a": {"b": 1}}, {"a": {"b": 2, "c": 3}}) == {"a": {"b": 1, "c": 3}}


def test_flatten_and_unflatten():
    tree = params()
    assert unflatten(dict(flatten(tree))) == tree
    named = map_leaves(lambda path, _: path, tree)
    assert named["layers"]["4"]["mlp"]["up"] == "layers.4.mlp.up"
