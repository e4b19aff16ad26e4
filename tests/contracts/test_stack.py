"""Seams: given embeddings, runs of layers composed over cuts, dropout."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.policy import Policy
from jaxllm.core.tree import map_leaves
from jaxllm.errors import ConfigError, ShapeError, WeightsError
from jaxllm.nn import api
from jaxllm.nn.api import Inputs
from jaxllm.nn.block import dropout
from jaxllm.nn.stack import Carry, run
from jaxllm.ops.norm import rms_norm
from jaxllm.spec.model import Block, sub
from jaxllm.spec.ops import MLP, Norm
from jaxllm.spec.table import model_table
from jaxllm.state.dense import dense_state
from jaxllm.state.step import dense_step, training_step
from tests.contracts.specs import (
    SMALL,
    SPECS,
    assert_close,
    assert_equal,
    forward,
    full,
    model,
    params,
    quick,
    redraw,
    runner,
    single,
    tokens,
)

NAME = "gqa"
SPEC = SPECS[NAME]


@pytest.mark.parametrize("name", ["gqa", "mqa_sandwich"])
def test_given_embeddings_are_the_rows_of_their_ids(name):
    """Rows of the table (times the embedding's scale) at marked places; the ids there are noise."""
    spec, ids = SPECS[name], tokens(name)
    marked = np.random.default_rng(1).random(ids.shape) < 0.5
    rows = np.asarray(params(name)["embed"]["table"])[ids] * np.float32(spec.embedding.scale)
    rows[~marked] = np.nan
    inputs = Inputs(np.where(marked, 0, ids), rows, marked)
    found, _ = runner(name)(params(name), inputs)
    assert_close(found, full(name))


def test_embeddings_without_their_places_are_an_error():
    ids = tokens(NAME)
    with pytest.raises(ShapeError, match="is_embed"):
        forward(SPEC)(params(NAME), Inputs(ids, np.zeros((*ids.shape, 32), np.float32)))


@functools.cache
def stretch(start, stop, stateful=False):
    def go(layers, x, state, step):
        carry = Carry(x, step)
        carry, state = run(SPEC, layers, carry, state, policy=Policy(), span=(start, stop))
        return carry.hidden, state

    return quick(go)


@pytest.mark.parametrize("cuts", [(0, 2, 3, 6), (0, 1, 5, 6)])
def test_runs_of_layers_compose(cuts):
    """Cuts between segments, through a stack, and within a repeated unit."""
    ids, weights = tokens(NAME), params(NAME)
    step, x = training_step(*ids.shape), weights["embed"]["table"][ids]
    whole, _ = stretch(0, 6)(weights["layers"], x, None, step)
    for start, stop in itertools.pairwise(cuts):
        x, _ = stretch(start, stop)(weights["layers"], x, None, step)
    assert_close(x, whole, 1e-6)


def test_cut_layers_bring_their_state():
    """Prefill over two cuts, decode over the states of both: equal to the whole."""
    ids, layers = tokens(NAME), params(NAME)["layers"]
    table, norm = params(NAME)["embed"]["table"], params(NAME)["final_norm"]["scale"]
    empty = dense_state(SPEC, 4, 8, dtype=np.float32)
    states = [empty, empty]
    for first, size in ((0, 7), (7, 1)):
        step = dense_step(jnp.full((4,), first, jnp.int32), size)
        x = table[ids[:, first : first + size]]
        for i, (start, stop) in enumerate(((0, 2), (2, 6))):
            x, states[i] = stretch(start, stop)(layers, x, states[i], step)
    assert set(states[0]) == {"0", "1"}
    logits = jnp.einsum("BTD,VD->BTV", rms_norm(x, norm, eps=1e-5), table, precision="highest")
    assert_close(logits, full(NAME)[:, 7:8])


def test_stages_that_read_the_embedding_are_given_it():
    """Shared parameters and the embedding go along; after a cut nobody can guess the latter."""
    spec, ids, weights = SPECS["shared"], tokens("shared"), params("shared")
    x = jnp.asarray(weights["embed"]["table"][ids])

    def go(layers, x, span, embedded=None):
        carry = Carry(x, training_step(*ids.shape), shared=weights["shared"], embedded=embedded)
        return run(spec, layers, carry, None, policy=Policy(), span=span)[0].hidden

    whole = quick(lambda layers: go(layers, x, (0, 7)))(weights["layers"])
    cut = quick(lambda layers: go(layers, go(layers, x, (0, 3)), (3, 7), x))(weights["layers"])
    assert_close(cut, whole, 1e-6)
    with pytest.raises(ConfigError, match=r"Carry.embedded"):
        jax.eval_shape(lambda layers: go(layers, x, (3, 7)), weights["layers"])


def test_a_stage_needs_its_own_layers_only():
    ids, alone = tokens(NAME), single(params(NAME), 6)["layers"]
    step, x = training_step(*ids.shape), params(NAME)["embed"]["table"][ids]
    own = {key: alone[key] for key in ("2", "3")}
    wanted, _ = stretch(2, 4)(params(NAME)["layers"], x, None, step)
    assert_close(stretch(2, 4)(own, x, None, step)[0], wanted, 1e-6)
    with pytest.raises(WeightsError, match="2:5"):
        stretch(2, 5)(own, x, None, step)


def test_missing_double_and_surplus_layers_are_errors():
    spec, ids = SPECS["mha"], tokens("mha")
    alone = single(params("mha"), 3)
    layers = alone["layers"]
    stack = params("mha")["layers"]["0:3"]
    for wrong in (
        {k: layers[k] for k in "02"},
        {**layers, "3": layers["2"]},
        {**layers, "0:3": stack},
        {k: layers[k] for k in "01"},
    ):
        with pytest.raises(WeightsError, match="layers"):
            jax.eval_shape(forward(spec), {**alone, "layers": wrong}, ids)


def test_a_state_stacked_otherwise_is_an_error():
    state = dense_state(SPEC, 4, 8, dtype=np.float32)
    carry = Carry(jnp.zeros((4, 1, 32)), dense_step(jnp.zeros((4,), jnp.int32), 1))
    with pytest.raises(WeightsError, match="stacked"):
        run(SPEC, single(params(NAME), 6)["layers"], carry, state, policy=Policy())


@pytest.mark.parametrize("span", [(0, 7), (-1, 3), (3, 3), (4, 2)])
def test_a_span_outside_of_the_model_is_an_error(span):
    carry = Carry(jnp.zeros((1, 1, 32)), training_step(1, 1))
    with pytest.raises(ConfigError, match="0:6"):
        run(SPEC, params(NAME)["layers"], carry, None, policy=Policy(), span=span)


SMALL_WEIGHTS = redraw(SMALL)


@functools.cache
def dropped(layout, seed, remat="none"):
    weights = SMALL_WEIGHTS if layout == "scan" else single(SMALL_WEIGHTS, 5)
    key = None if seed is None else jax.random.key(seed)
    policy = Policy(dropout=0.25, remat=remat)
    step = training_step(*IDS.shape, key=key)
    return np.asarray(quick(forward(SMALL, policy))(weights, IDS, step)[0])


IDS = tokens("mha")


def test_dropout_depends_on_the_key_alone():
    first = dropped("scan", 0)
    assert_equal(first, dropped.__wrapped__("scan", 0))
    assert_close(dropped("unrolled", 0), first)
    assert_close(dropped("scan", 0, "full"), first)
    assert np.abs(dropped("scan", 1) - first).max() > 0.1


def test_without_a_key_nothing_is_dropped():
    wanted = quick(forward(SMALL))(SMALL_WEIGHTS, IDS)[0]
    assert_close(dropped("scan", None), wanted, 1e-6)
    assert np.abs(wanted - dropped("scan", 0)).max() > 0.1


def test_dropout_keeps_the_mean_and_the_rate():
    x = jnp.full((200, 500), 2.0, jnp.float32)
    y = np.asarray(dropout(x, 0.25, jax.random.key(0)))
    assert set(np.unique(y)) == {0.0, np.float32(2.0 / 0.75)}
    assert abs((y == 0).mean() - 0.25) < 5 * (0.25 * 0.75 / x.size) ** 0.5
    assert abs(y.mean() - 2.0) < 0.02
    assert dropout(x, 0.0, jax.random.key(0)) is x
    assert dropout(x, 0.25, None) is x


def test_every_dropout_draws_its_own_mask():
    """Embedding and updates all ones: hidden / 2 counts masks, and is binomial if they are free."""
    one = Norm(type="layer", bias=True)
    subs = tuple(sub(name, MLP(width=4, gated=False), norm_out=one) for name in ("a", "b"))
    spec = model(Block(name="G", subs=subs), layers="G*2", final_norm=None)

    def leaf(path, d):
        return np.full(d.shape, path.endswith(("table", "bias")), np.float32)

    weights, policy = map_leaves(leaf, model_table(spec)), Policy(dropout=0.5)
    step = training_step(*IDS.shape, key=jax.random.key(0))
    run = quick(lambda w, i, s: api.apply(spec, w, i, s, policy=policy)[0])
    counts = np.asarray(run(weights, IDS, step)) / 2
    total = counts.size
    assert np.array_equal(counts, counts.astype(int))
    for k in range(6):  # one mask of the embedding, two of each layer
        p = math.comb(5, k) / 32
        found = (counts == k).sum()
        assert abs(found - p * total) < 5 * math.sqrt(p * (1 - p) * total), k


@pytest.mark.parametrize(
    ("group", "name"), [("embed", "table"), ("head", "kernel"), ("final_norm", "scale")]
)
def test_missing_and_misshapen_ends_are_errors(group, name):
    spec, weights = SPECS["mha"], params("mha")
    leaf = weights[group][name]
    without = {k: v for k, v in weights.items() if k != group}
    for broken, said in (
        (without, "missing"),
        ({**weights, group: {name: leaf[:-1]}}, "the spec says"),
    ):
        with pytest.raises(WeightsError, match=said):
            jax.eval_shape(forward(spec), broken, tokens("mha"))


def test_missing_and_misshapen_leaves_of_a_layer_are_errors():
    spec, weights = SPECS["mha"], params("mha")
    mlp = weights["layers"]["0:3"]["mlp"]
    for change, said in (
        ({"up": mlp["up"][:, :, 1:]}, "up.*the spec says"),
        ({"down": None}, "down.*missing"),
    ):
        layer = {**weights["layers"]["0:3"], "mlp": {**mlp, **change}}
        layer["mlp"] = {k: v for k, v in layer["mlp"].items() if v is not None}
        with pytest.raises(WeightsError, match=said):
            jax.eval_shape(forward(spec), {**weights, "layers": {"0:3": layer}}, tokens("mha"))
