"""Eight virtual devices = one: values and gradients, plain and other leaves, state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.mesh import make_mesh
from jaxllm.core.policy import Policy
from jaxllm.core.sharding import named_sharding, shard
from jaxllm.core.tree import flatten, restack
from jaxllm.core.weights import AdaptedWeight, QArray
from jaxllm.nn import api
from jaxllm.state.dense import dense_state, state_axes
from jaxllm.state.step import dense_step
from tests.contracts.leaves import adapted, quantized
from tests.contracts.specs import (
    NAMES,
    SPECS,
    assert_close,
    forward,
    full,
    gradient,
    loss,
    params,
    quick,
    runner,
    single,
    tokens,
)

MESHES = {"data": {"data": 2, "tensor": 4}, "fsdp": {"fsdp": 4, "tensor": 2}}
QUICK = [("gqa", "data"), ("parallel", "fsdp")]
SLOW = [(n, a) for n in NAMES for a in MESHES if (n, a) not in QUICK]
PAIRS = [*QUICK, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in SLOW)]
EACH = ["data", pytest.param("fsdp", marks=pytest.mark.slow)]


def placed(spec, weights, mesh):
    """Parameters on the mesh as the default rules say."""
    return shard(weights, api.param_shardings(spec, weights, mesh, Policy()))


def batched(mesh, ids):
    return jax.device_put(ids, named_sharding(mesh, ("batch", None), Policy().rules, ids.shape))


# Of its seven layers some read the embedding again: float32 rounds more often.
TOLERANCES = {"shared": 4e-5}


@pytest.mark.parametrize(("name", "axes"), PAIRS)
def test_sharded_is_unsharded(name, axes):
    spec, mesh = SPECS[name], make_mesh(MESHES[axes])
    weights = placed(spec, params(name), mesh)
    step = quick(jax.value_and_grad(loss(spec), has_aux=True))
    with jax.set_mesh(mesh):
        (value, logits), grads = step(weights, batched(mesh, tokens(name)))
    wanted_value, wanted_logits, wanted_grads = gradient(name)
    assert abs(float(value) - wanted_value) < 1e-5
    tolerance = TOLERANCES.get(name, 1e-5)
    assert_close(logits, wanted_logits, tolerance)
    assert_close(grads, wanted_grads, tolerance)


def test_parameters_are_really_spread():
    """Each device holds its part only: an eighth of what tensor and fsdp both divide."""
    spec = SPECS["mha"]
    weights = placed(spec, params("mha"), make_mesh(MESHES["fsdp"]))
    for path, leaf in flatten(weights):
        share = leaf.addressable_shards[0].data.size / leaf.size
        assert share == (1 / 4 if "norm" in path else 1 / 8), path
    weights = placed(spec, params("mha"), make_mesh(MESHES["data"]))
    shares = {leaf.addressable_shards[0].data.size / leaf.size for _, leaf in flatten(weights)}
    assert shares == {1 / 4, 1.0}


def test_activations_are_constrained_under_a_mesh():
    spec, mesh = SPECS["mha"], make_mesh(MESHES["data"])
    run = lambda w, ids: forward(spec)(w, ids)[0]  # noqa: E731
    weights, ids = placed(spec, params("mha"), mesh), batched(mesh, tokens("mha"))
    with jax.set_mesh(mesh):
        out = quick(run)(weights, ids)
    assert out.sharding.spec == jax.P("data", None, "tensor")
    assert "sharding_constraint" not in str(jax.make_jaxpr(run)(params("mha"), tokens("mha")))


@pytest.mark.parametrize(
    ("axes", "format"),
    [("data", "int4"), ("data", "nf4"), pytest.param("fsdp", "int4", marks=pytest.mark.slow)],
)
def test_quantized_and_adapted_parameters_shard(axes, format):
    name = "mha"
    spec, mesh = SPECS[name], make_mesh(MESHES[axes])
    alone = quantized(single(params(name), 3), format=format)
    weights = restack(adapted(alone), spec.segments)
    wanted, _ = runner(name)(weights, tokens(name))
    with jax.set_mesh(mesh):
        found, _ = quick(forward(spec))(placed(spec, weights, mesh), batched(mesh, tokens(name)))
    assert_close(found, wanted)


def test_scales_are_sharded_like_their_values():
    name = "gqa"
    spec, mesh = SPECS[name], make_mesh(MESHES["fsdp"])
    weights = restack(quantized(single(params(name), 6)), spec.segments)
    leaf = placed(spec, weights, mesh)["layers"]["1:5:2"]["0"]["mlp"]["down"]
    assert isinstance(leaf, QArray)
    assert leaf.values.sharding.spec == jax.P(None, "fsdp", "tensor")
    assert leaf.scale.sharding.spec == jax.P(None, "fsdp", "tensor")
    both = api.logical_axes(spec, restack(adapted(single(params(name), 6)), spec.segments))
    leaf = both["layers"]["1:5:2"]["0"]["mlp"]["down"]
    assert isinstance(leaf, AdaptedWeight)
    assert (leaf.base, leaf.a[0], leaf.b[0]) == (("layers", "ffn", "width"), "layers", "layers")


@pytest.mark.parametrize("axes", EACH)
def test_a_sharded_state_decodes_the_same(axes):
    name = "mha"
    spec, mesh, ids = SPECS[name], make_mesh(MESHES[axes]), tokens(name)
    shapes = dense_state(spec, len(ids), 16, dtype=np.float32)
    place = lambda x, axes: named_sharding(mesh, axes, Policy().rules, x.shape)  # noqa: E731
    state = jax.device_put(shapes, jax.tree.map(place, shapes, state_axes(spec)))
    weights, wanted = placed(spec, params(name), mesh), full(name)

    def run(weights, state, ids, start):
        places = dense_step(start, ids.shape[1])
        hidden, state, _ = api.apply(spec, weights, ids, places, state, policy=Policy())
        return api.unembed(spec, weights, hidden, policy=Policy()), state

    step = quick(run)
    with jax.set_mesh(mesh):
        for first, size in ((0, 6), (6, 1), (7, 1)):
            start = jnp.full((len(ids),), first, jnp.int32)
            logits, state = step(weights, state, ids[:, first : first + size], start)
            assert_close(logits, wanted[:, first : first + size])
    assert state["0:3"]["attn"].k.sharding.spec[3] == "tensor"
