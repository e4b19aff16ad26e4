"""Initialisation, logical axes and dtypes of the verb."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.policy import Policy
from jaxllm.core.tree import Segment, flatten, restack, unstack
from jaxllm.core.weights import AdaptedWeight, OutputsFirst, QArray, is_leaf, logical_shape
from jaxllm.errors import ConfigError
from jaxllm.nn import api
from jaxllm.spec.table import layer_paths, model_table
from jaxllm.state.step import training_step
from tests.contracts.leaves import adapted, quantized
from tests.contracts.specs import (
    SMALL,
    SPECS,
    assert_equal,
    held,
    params,
    quick,
    single,
    tokens,
)

ALONE = tuple(Segment(i, i + 1, 1, stacked=False) for i in range(5))


@functools.cache
def fresh(segments=None, seed=0, dtype="float32"):
    make = functools.partial(api.init, SMALL, dtype=dtype, segments=segments)
    return quick(make)(jax.random.key(seed))


def test_init_does_not_depend_on_the_layout():
    wanted = unstack(fresh())
    mixed = (Segment(0, 1, 1, False), Segment(1, 5, 1, True))
    for segments in (ALONE, mixed):
        found = fresh(segments)
        assert [s.key for s in segments] == list(found["layers"])
        assert_equal(unstack(found), wanted)


def test_many_layers_are_drawn_in_a_loop_each_as_by_itself():
    spec = dataclasses.replace(SMALL, layers=f"{SMALL.blocks[0].name}*12")
    make = quick(lambda key: api.init(spec, key))
    stacked = make(jax.random.key(3))
    assert list(stacked["layers"]) == ["0:12"]
    assert "while" in jax.jit(lambda key: api.init(spec, key)).lower(jax.random.key(3)).as_text()
    alone = tuple(Segment(i, i + 1, 1, False) for i in range(12))
    wanted = quick(lambda key: api.init(spec, key, segments=alone))(jax.random.key(3))
    assert_equal(unstack(stacked), unstack(wanted))


def test_init_draws_as_the_table_says():
    """Matrices with std 1/sqrt(fan in), norms at 1, biases at 0; no two leaves alike."""
    seen = set()
    table = layer_paths(SMALL)
    for path, leaf in flatten(fresh(ALONE)):
        d = table[path]
        if not d.std:
            assert (np.asarray(leaf) == d.fill).all(), path
            continue
        fan_in = int(np.prod(d.shape[: d.inputs])) if d.inputs else d.shape[-1]
        spread = float(np.asarray(leaf).std() * fan_in**0.5)
        assert abs(spread - 1) < 5 / (2 * leaf.size) ** 0.5 + 0.02, path
        seen.add(np.asarray(leaf).ravel()[0].item())
    assert len(seen) == sum(d.std > 0 for d in table.values())
    assert not np.array_equal(fresh()["embed"]["table"], fresh(None, 1)["embed"]["table"])
    assert {str(x.dtype) for _, x in flatten(fresh(None, 0, "bfloat16"))} == {"bfloat16"}


def test_fused_init_has_the_fused_shapes():
    spec = SPECS["mha"]
    made = jax.eval_shape(lambda: api.init(spec, jax.random.key(0), fused=True))
    wanted = dict(flatten(model_table(spec, None, True)))
    assert {p: x.shape for p, x in flatten(made)} == {p: d.shape for p, d in wanted.items()}
    assert made["layers"]["0:3"]["attn"]["qkv"].shape == (3, 32, 12, 8)


def variants(name):
    alone = single(params(name), SPECS[name].num_layers)
    yield "plain", params(name)
    yield "unrolled", alone
    yield "quantized", restack(quantized(alone), SPECS[name].segments)
    yield "adapted", restack(adapted(quantized(alone)), SPECS[name].segments)
    yield "held", held(SPECS[name], params(name))
    yield "adapted held", adapted(held(SPECS[name], alone))
    yield "tied as a head", held(SPECS[name], alone, "in_out")


@pytest.mark.parametrize("name", ["gqa", "post_layernorm"])
def test_logical_axes_match_the_arrays(name):
    """One tuple of names for each array, with as many names as it has dims."""
    for kind, weights in variants(name):
        axes = api.logical_axes(SPECS[name], weights)
        is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
        names, structure = jax.tree.flatten(axes, is_leaf=is_axes)
        arrays = jax.tree.leaves(weights)
        assert structure == jax.tree.structure(weights), kind
        for tuple_, array in zip(names, arrays, strict=True):
            assert len(tuple_) == array.ndim, kind
        for (path, leaf), (other, named) in zip(flatten(weights), flatten(axes), strict=True):
            assert path == other
            stacked = ":" in path
            for one, array in zip(
                jax.tree.leaves(named, is_leaf=is_axes), jax.tree.leaves(leaf), strict=True
            ):
                assert (one[0] == "layers") == stacked, path
                assert array.shape[0] == logical_layers(weights, path) or not stacked
    canonical = api.logical_axes(SPECS[name])
    assert canonical == api.logical_axes(SPECS[name], params(name))


def logical_layers(weights, path):
    return Segment.parse(path.split(".")[1]).repeats if path.startswith("layers") else None


def test_axes_of_leaves_follow_their_values():
    spec, weights = SPECS["gqa"], dict(variants("gqa"))
    where = lambda tree: tree["layers"]["1:5:2"]["0"]["attn"]["o"]  # noqa: E731
    plain = ("layers", "heads", "head_dim", "width")
    assert where(api.logical_axes(spec)) == plain
    q = where(api.logical_axes(spec, weights["quantized"]))
    assert isinstance(q, QArray)
    assert q.values == q.scale == ("layers", "width", "heads")
    a = where(api.logical_axes(spec, weights["adapted"]))
    assert isinstance(a, AdaptedWeight)
    assert a.base.values == q.values
    assert (a.a, a.b) == (("layers", *[None] * 4), ("layers", *[None] * 3))
    turned = where(api.logical_axes(spec, weights["held"]))
    assert isinstance(turned, OutputsFirst)
    assert turned.values == ("layers", "width", "heads", "head_dim")
    assert api.logical_axes(spec, weights["held"])["embed"]["table"] == ("vocab", "width")
    tied = api.logical_axes(spec, weights["tied as a head"])
    assert tied["embed"]["table"].values == ("width", "vocab")


def test_held_parameters_are_transposed_once():
    weights = single(params("gqa"), 6)
    turned = held(SPECS["gqa"], weights)
    leaf, plain = turned["layers"]["1"]["attn"]["o"], weights["layers"]["1"]["attn"]["o"]
    assert np.array_equal(leaf.values, plain.transpose(2, 0, 1))
    assert logical_shape(leaf) == plain.shape
    assert not is_leaf(turned["embed"]["table"])
    assert not is_leaf(turned["final_norm"]["scale"])
    assert api.hold(SPECS["gqa"], weights, Policy()) is weights


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_dtypes_are_those_of_the_policy(compute):
    spec = SPECS["mqa_sandwich"]
    policy = Policy(param_dtype="bfloat16", compute_dtype=compute, logit_dtype="float32")
    weights = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params("mqa_sandwich"))

    def run(weights, ids):
        hidden, _, _ = api.apply(spec, weights, ids, training_step(*ids.shape), policy=policy)
        return hidden, api.unembed(spec, weights, hidden, policy=policy)

    hidden, logits = quick(run)(weights, tokens("mqa_sandwich"))
    assert (hidden.dtype, logits.dtype) == (compute, "float32")
    assert np.isfinite(logits).all()
    assert np.abs(logits).max() <= 3.0  # the soft-cap


@pytest.mark.parametrize("rate", [1.0, -0.1])
def test_wrong_policies_are_errors(rate):
    with pytest.raises(ConfigError, match="dropout"):
        Policy(dropout=rate)
