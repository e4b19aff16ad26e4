"""Leaves other than plain arrays through the whole model: quantized, adapted, mixed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.tree import flatten, map_leaves, restack, runs, segments_of, unstack
from jaxllm.core.weights import AdaptedWeight, QArray, is_leaf
from jaxllm.errors import WeightsError
from jaxllm.state.step import training_step
from tests.contracts.leaves import (
    INPUTS,
    adapted,
    dequantized,
    fresh_adapters,
    matrix,
    merged,
    quantized,
)
from tests.contracts.specs import (
    SPECS,
    assert_close,
    assert_equal,
    forward,
    full,
    held,
    params,
    quick,
    runner,
    single,
    tokens,
)

NAME = "gqa"
SPEC = SPECS[NAME]
ALONE = functools.cache(lambda: single(params(NAME), SPEC.num_layers))
RUN = runner(NAME)


def logits(weights, ids=None, step=None):
    return np.asarray(RUN(weights, tokens(NAME) if ids is None else ids, step)[0])


def test_quantized_is_the_dequantized():
    weights = quantized(ALONE())
    wanted = logits(restack(dequantized(weights), SPEC.segments))
    assert_close(logits(restack(weights, SPEC.segments)), wanted)
    assert np.abs(wanted - full(NAME)).max() > 0.05  # the rounding is felt


@pytest.mark.parametrize("format", ["int8", "nf4", "fp8"])
def test_formats_run_stacked_and_exported(format):
    """In a scan over layers, and through a serialized program that takes the packed arrays."""
    weights = restack(quantized(ALONE(), format=format), SPEC.segments)
    wanted = logits(restack(dequantized(quantized(ALONE(), format=format)), SPEC.segments))
    assert_close(logits(weights), wanted)
    arrays, structure = jax.tree.flatten(weights)
    run = jax.jit(lambda arrays, ids: forward(SPEC)(jax.tree.unflatten(structure, arrays), ids)[0])
    blob = jax.export.export(run)(arrays, tokens(NAME)).serialize()
    assert_close(jax.export.deserialize(blob).call(arrays, tokens(NAME)), wanted)


def test_mixed_leaves_run_unrolled_and_in_runs():
    """Two layers plain among int4 ones: neighbours of one block and leaf type make one stack."""
    spec = SPECS["mha"]
    deep = {**params("mha"), "layers": {}}
    for i in range(6):
        deep["layers"][str(i)] = single(params("mha"), 3)["layers"][str(i % 3)]
    spec = type(spec).from_json(spec.to_json().replace("G*3", "G*6"))
    weights = quantized(deep, plain=(2, 3))
    segments = runs(weights, spec.pattern.names)
    assert [s.key for s in segments] == ["0:2", "2:4", "4:6"]
    stacked = restack(weights, segments)
    run = quick(forward(spec))
    wanted = run(dequantized(weights), tokens("mha"))[0]
    assert_close(run(weights, tokens("mha"))[0], wanted)
    assert_close(run(stacked, tokens("mha"))[0], wanted)
    assert_equal(unstack(stacked), weights)
    with pytest.raises(WeightsError, match="differ in their leaves"):
        restack(weights, spec.segments)


def test_runs_part_blocks_that_differ_in_more_than_their_leaves():
    keys = [s.key for s in runs(params(NAME), SPEC.pattern.names)]
    assert keys == ["0", "1", "2", "3", "4", "5"]
    assert [s.key for s in runs(params(NAME))] == ["0", "1:6"]


def test_leaves_are_pytrees():
    """Through flatten, jit, vmap and grad a leaf stays what it is; each array carries L."""
    weights = restack(adapted(quantized(ALONE())), SPEC.segments)
    leaf = weights["layers"]["1:5:2"]["1"]["mlp"]["up"]
    assert isinstance(leaf, AdaptedWeight)
    assert isinstance(leaf.base, QArray)
    arrays, structure = jax.tree.flatten(leaf)
    assert len(arrays) == 5  # values, scale, offset, a, b
    assert all(len(x) == 2 for x in arrays)
    assert_equal(jax.tree.unflatten(structure, arrays), leaf)
    back = jax.jit(lambda x: x)(leaf)
    assert_equal(back, leaf)
    assert (back.scale, back.base.group, back.base.format) == (2.0, 4, "uint4")


def stacked_adapters(**options):
    return restack(adapted(ALONE(), **options), SPEC.segments)


def test_a_fresh_adapter_changes_no_bit():
    weights = restack(fresh_adapters(ALONE()), SPEC.segments)
    assert sum(isinstance(w, AdaptedWeight) for _, w in flatten(weights)) > 20
    assert_equal(logits(weights), full(NAME))


@pytest.mark.parametrize("base", ["plain", "quantized", "outputs first"])
def test_merged_is_attached(base):
    weights = quantized(ALONE()) if base == "quantized" else ALONE()
    weights = adapted(held(SPEC, weights) if base == "outputs first" else weights)
    plain = merged(weights)
    assert not any(is_leaf(leaf) for _, leaf in flatten(plain["layers"]))
    found = logits(restack(weights, SPEC.segments))
    assert_close(found, logits(restack(plain, SPEC.segments)))
    assert np.abs(found - full(NAME)).max() > 0.05


def test_adapter_ids_choose_by_row():
    """Three adapters in stacked segments: row i of a batch runs as if it had its own alone."""
    weights, ids = stacked_adapters(adapters=3), tokens(NAME)
    chosen = jnp.array([0, 3, 1, 2], jnp.int32)
    step = training_step(*ids.shape, adapter_ids=chosen)
    found = logits(weights, step=step)
    assert_close(found[0], full(NAME)[0])

    def only(number):
        def pick(w):
            a, b = (x[number : number + 1] for x in (w.a, w.b))
            return AdaptedWeight(w.base, a, b, scale=w.scale)

        alone = adapted(ALONE(), adapters=3)
        picked = map_leaves(lambda _, w: pick(w) if is_leaf(w) else w, alone)
        return restack(picked, SPEC.segments)

    for row, number in ((1, 2), (2, 0), (3, 1)):
        alone = logits(only(number))
        assert_close(found[row], alone[row])
        assert np.abs(alone[row] - full(NAME)[row]).max() > 0.05


def test_every_array_of_a_stacked_adapter_carries_the_layers():
    layers = stacked_adapters(adapters=3)["layers"]["1:5:2"]["0"]
    for path, leaf in flatten(layers):
        for array in jax.tree.leaves(leaf):
            assert array.shape[0] == 2, path


@pytest.mark.parametrize("name", ["gqa", "mha"])
def test_adapted_embedding_and_head(name):
    """The ends take adapters too, tied (gqa) or not: rows choose theirs, merged = attached."""
    spec, weights, ids = SPECS[name], params(name), tokens(name)
    run, draw = runner(name), np.random.default_rng(5).standard_normal

    def attached(leaf):
        (rows, columns), scale = leaf.shape, np.float32(0.25)
        a, b = draw((2, rows, 3), np.float32), draw((2, 3, columns), np.float32)
        return AdaptedWeight(leaf, a * scale, b * scale, scale=0.5)

    ends = {"embed": {"table": attached(weights["embed"]["table"])}}
    if not spec.head.tied:
        ends["head"] = {"kernel": attached(weights["head"]["kernel"])}
    wanted = [full(name)]
    for number in (0, 1):
        wanted.append(run({**weights, **merged(ends, number)}, ids)[0])
    assert_close(run({**weights, **ends}, ids)[0], wanted[1])
    chosen = (0, 2, 1, 0)
    step = training_step(*ids.shape, adapter_ids=jnp.array(chosen, jnp.int32))
    found, _ = run({**weights, **ends}, ids, step)
    for row, number in enumerate(chosen):
        assert_close(found[row], wanted[number][row])


def test_segments_with_leaves_keep_their_keys():
    weights = stacked_adapters()
    assert segments_of(weights["layers"]) == SPEC.segments
    assert {matrix(p) for p, w in flatten(ALONE()) if matrix(p)} == set(INPUTS)
