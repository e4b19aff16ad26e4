"""Models with flash attention by name, lowered for a GPU: the kernels are where they belong."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax import export

from jaxllm.core.mesh import make_mesh
from jaxllm.core.policy import Policy
from jaxllm.data.batch import Batch
from jaxllm.nn import api
from jaxllm.ops.loss import LossOptions
from jaxllm.spec.mask import And, Causal, Window
from jaxllm.state.dense import dense_state
from jaxllm.state.step import dense_step
from jaxllm.train.step import batch_loss
from pallas_kernels.flash_attention import tiles
from pallas_kernels.target import targeting
from tests.contracts.specs import MLP48, heads, model, pre
from tests.kernels.lowered import KERNEL, kernel_calls

LOCAL = And(first=Causal(), second=Window(left=5))
SPEC = model(
    pre("G", heads(4, 2, head_dim=16, softcap=20.0, sinks=True), MLP48),
    pre("L", heads(4, 2, head_dim=64, mask=LOCAL), MLP48),
    layers="G L",
)
ONE = model(pre("G", heads(4, 2, head_dim=16), MLP48), layers="G")
WIDE = model(pre("G", heads(4, 2, head_dim=128), MLP48), layers="G")
POLICY = Policy(attention="mosaic_gpu", compute_dtype="bfloat16")
B, T = 4, 24


@functools.cache
def weights(spec=SPEC):
    return jax.eval_shape(lambda: api.init(spec, jax.random.key(0)))


def batch(packed=True):
    ids = jax.ShapeDtypeStruct((B, T), jnp.int32)
    marks = (ids, ids) if packed else (None, None)
    return Batch(ids, ids, jax.ShapeDtypeStruct((B, T), jnp.float32), *marks)


def gradient(policy, spec=SPEC):
    def loss(params, batch):
        found = batch_loss(spec, params, batch, policy=policy, options=LossOptions(), key=None)
        return jnp.asarray(found.loss)

    return jax.jit(jax.grad(loss))


def prefill(params, state, ids, start):
    step = dense_step(start, ids.shape[1])
    hidden, state, _ = api.apply(SPEC, params, ids, step, state, policy=POLICY)
    return hidden, state


def lowered(function, *args):
    with targeting("gpu"):
        return function.trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("remat", "kernels"),
    [
        ("save_attention", 3),
        pytest.param("none", 3, marks=pytest.mark.slow),
        pytest.param("save_dots", 3, marks=pytest.mark.slow),
        pytest.param("full", 4, marks=pytest.mark.slow),
    ],
)
def test_a_training_step_runs_each_forward_once_unless_told_otherwise(remat, kernels):
    policy = dataclasses.replace(POLICY, remat=remat)
    text = lowered(gradient(policy, ONE), weights(ONE), batch(packed=False))
    assert kernel_calls(text) == kernels


@pytest.mark.parametrize(
    ("attention", "kernels"), [("mosaic_gpu", 2), ("mosaic_gpu_deterministic", 3)]
)
def test_heads_of_128_run_one_kernel_back_unless_told_to_be_deterministic(
    attention, kernels, monkeypatch
):
    monkeypatch.setattr(tiles, "TWO_KERNELS", 0)  # long rows
    policy = dataclasses.replace(POLICY, attention=attention, remat="save_attention")
    whole, documents = batch(packed=False), batch()
    text = lowered(gradient(policy, WIDE), weights(WIDE), whole)
    assert kernel_calls(text) == kernels
    with jax.set_mesh(make_mesh({"data": 2, "tensor": 2})):
        text = lowered(gradient(policy, WIDE), weights(WIDE), whole)
        assert kernel_calls(text) == kernels
        text = lowered(gradient(policy, WIDE), weights(WIDE), documents)
        assert kernel_calls(text) == 3


def test_packed_rows_run_the_kernels():
    text = lowered(gradient(POLICY), weights(), batch())
    assert kernel_calls(text) == 3 * SPEC.num_layers


def test_a_training_step_on_a_mesh_gives_each_device_its_own_kernels():
    with jax.set_mesh(make_mesh({"data": 2, "tensor": 2})):
        text = lowered(gradient(POLICY), weights(), batch())
    assert kernel_calls(text) == 3 * SPEC.num_layers
    outs = re.findall(rf"@{KERNEL}.*-> \(?tensor<([0-9x]+)xbf16>", text)
    assert f"{B // 2}x{T}x2x64" in outs  # half of the rows, half of the heads


def cache():
    return jax.eval_shape(lambda: dense_state(SPEC, B, 64, dtype=jnp.bfloat16))


def arguments():
    ids, start = (jax.ShapeDtypeStruct(s, jnp.int32) for s in ((B, T), (B,)))
    return weights(), cache(), ids, start


def test_a_chunk_of_a_prompt_runs_one_kernel_a_layer_and_donates_its_cache():
    text = lowered(jax.jit(prefill, donate_argnums=1), *arguments())
    assert kernel_calls(text) == SPEC.num_layers
    assert text.count("tf.aliasing_output") == len(jax.tree.leaves(cache()))


def test_it_is_exported_with_the_program():
    args = arguments()
    leaves, tree = jax.tree.flatten(args)
    flat = jax.jit(lambda *leaves: jax.tree.leaves(prefill(*jax.tree.unflatten(tree, leaves))))
    check = export.DisabledSafetyCheck.custom_call(KERNEL)
    with targeting("gpu"):
        made = export.export(flat, platforms=["cuda"], disabled_checks=[check])(*leaves)
    again = export.deserialize(made.serialize())
    assert again.platforms == ("cuda",)
    assert kernel_calls(again.mlir_module()) == SPEC.num_layers


def test_vmapped_models_share_one_kernel():
    ids = jax.ShapeDtypeStruct((3, 2, B, T), jnp.int32)

    def many(params, ids):
        def one(ids):
            step = dense_step(jnp.zeros((B,), jnp.int32), T)
            state = dense_state(SPEC, B, T, dtype=jnp.bfloat16)
            return api.apply(SPEC, params, ids, step, state, policy=POLICY)[0]

        return jax.vmap(jax.vmap(one))(ids)

    text = lowered(jax.jit(many), weights(), ids)
    assert kernel_calls(text) == SPEC.num_layers
    assert f"{6 * B}x{T}x4x64xbf16" in text
