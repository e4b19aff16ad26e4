"""Models whose experts run on the grouped kernel, lowered for a GPU: it is where it belongs."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax import export

from jaxllm.core.mesh import make_mesh
from jaxllm.core.policy import Policy
from jaxllm.data.batch import Batch
from jaxllm.nn import api
from jaxllm.ops.loss import LossOptions
from jaxllm.spec.ops import MLP, MoE, Router
from jaxllm.state.dense import dense_state
from jaxllm.state.step import dense_step
from jaxllm.train.step import batch_loss
from pallas_kernels.target import targeting
from tests.contracts.specs import experts, model
from tests.kernels.lowered import KERNEL, kernel_calls

MIXTURE = MoE(experts=4, active=2, mlp=MLP(width=64), router=Router())
SPEC = model(experts("E", MIXTURE), layers="E*2", width=64)
POLICY = Policy(
    attention="reference", experts="mosaic_gpu", compute_dtype="bfloat16", param_dtype="bfloat16"
)
B, T = 4, 24


def weights():
    return jax.eval_shape(lambda: api.init(SPEC, jax.random.key(0)))


def gradient(policy):
    ids = jax.ShapeDtypeStruct((B, T), jnp.int32)
    batch = Batch(ids, ids, jax.ShapeDtypeStruct((B, T), jnp.float32))

    def loss(params, batch):
        found = batch_loss(SPEC, params, batch, policy=policy, options=LossOptions(), key=None)
        return jnp.asarray(found.loss)

    with targeting("gpu"):
        traced = jax.jit(jax.grad(loss)).trace(weights(), batch)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


# Gate, up and down: each a product, and its two gradients. The routing's gradient reads what comes
# out of down, which is not kept.
REMATS = [
    ("save_dots", 10),
    pytest.param("none", 9, marks=pytest.mark.slow),
    pytest.param("full", 12, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("remat", "kernels"), REMATS)
def test_a_training_step_runs_the_products_that_its_remat_asks_for(remat, kernels):
    assert kernel_calls(gradient(dataclasses.replace(POLICY, remat=remat))) == kernels


@pytest.mark.parametrize(
    "axes", [{"expert": 2}, pytest.param({"tensor": 2}, marks=pytest.mark.slow)]
)
def test_a_training_step_on_a_mesh_gives_each_device_its_own_kernels(axes):
    with jax.set_mesh(make_mesh(axes)):
        text = gradient(dataclasses.replace(POLICY, experts="auto"))
    assert kernel_calls(text) == (9 if "expert" in axes else 0)  # half of 64 is too narrow for it


def test_it_is_exported_with_the_program():
    def prefill(params, state, ids):
        step = dense_step(jnp.zeros((B,), jnp.int32), T)
        hidden, _, _ = api.apply(SPEC, params, ids, step, state, policy=POLICY)
        return hidden

    state = jax.eval_shape(lambda: dense_state(SPEC, B, 64, dtype=jnp.bfloat16))
    ids = jax.ShapeDtypeStruct((B, T), jnp.int32)
    leaves, tree = jax.tree.flatten((weights(), state, ids))
    flat = jax.jit(lambda *leaves: prefill(*jax.tree.unflatten(tree, leaves)))
    check = export.DisabledSafetyCheck.custom_call(KERNEL)
    with targeting("gpu"):
        made = export.export(flat, platforms=["cuda"], disabled_checks=[check])(*leaves)
    again = export.deserialize(made.serialize())
    assert kernel_calls(again.mlir_module()) == 3
