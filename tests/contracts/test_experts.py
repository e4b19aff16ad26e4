"""Experts over a mesh axis = one device, and experts of a bounded capacity."""

import jax
import pytest

from jaxllm.core.mesh import make_mesh
from jaxllm.core.policy import Policy
from jaxllm.core.sharding import named_sharding, shard
from jaxllm.nn import api
from tests.contracts.specs import (
    SPECS,
    assert_close,
    gradient,
    loss,
    params,
    quick,
    tokens,
)

MESHES = {
    "split rows": {"expert": 4, "tensor": 2},
    "all axes": {"data": 2, "expert": 2, "tensor": 2},
}
EACH = [("moe", "split rows"), pytest.param("moe_clamped", "all axes", marks=pytest.mark.slow)]


def placed(spec, weights, mesh):
    return shard(weights, api.param_shardings(spec, weights, mesh, Policy()))


@pytest.mark.parametrize(("name", "axes"), EACH)
def test_experts_over_an_axis_are_those_of_one_device(name, axes):
    spec, mesh = SPECS[name], make_mesh(MESHES[axes])
    weights = placed(spec, params(name), mesh)
    ids = tokens(name)
    lie = named_sharding(mesh, ("batch", None), Policy().rules, ids.shape)
    assert "expert" in lie.spec[0]
    step = quick(jax.value_and_grad(loss(spec), has_aux=True))
    with jax.set_mesh(mesh):
        (value, logits), grads = step(weights, jax.device_put(ids, lie))
    wanted_value, wanted_logits, wanted_grads = gradient(name)
    assert abs(float(value) - wanted_value) < 1e-5
    assert_close(logits, wanted_logits)
    assert_close(grads, wanted_grads)
