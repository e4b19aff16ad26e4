"""Layouts, fused projections and narrow parameters train the same model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxllm.core.tree import flatten, unstack
from jaxllm.errors import ConfigError
from jaxllm.spec.table import FUSED
from jaxllm.train.narrow import in_float32
from jaxllm.train.programs import plan_programs
from tests.train.runs import config_of, random_batch


def trained(config, start=None, steps=3):
    """(state after a few steps, losses), from given parameters."""
    planned = plan_programs(config, None)
    state = planned.init.compile()(np.uint32(0))
    if start is not None:
        state = dataclasses.replace(state, params=start(state.params))
    step, losses = planned.step.compile(), []
    for i in range(steps):
        state, metrics = step(state, random_batch(config, i))
        losses.append(float(metrics.loss))
    return state, np.array(losses)


@pytest.fixture(scope="module")
def plain():
    return trained(config_of())


def test_unrolled_layers_train_as_stacked_ones(plain):
    state, losses = trained(config_of(layout="unrolled"))
    np.testing.assert_allclose(losses, plain[1], rtol=1e-6)
    want = dict(flatten(unstack(jax.tree.map(np.asarray, plain[0].params))))
    for path, leaf in flatten(state.params):
        np.testing.assert_allclose(leaf, want[path], atol=2e-5, err_msg=path)


def test_fused_projections_train_as_separate_ones(plain):
    first = plan_programs(config_of(), None).init.compile()(np.uint32(0)).params

    def start(fused):
        def join(parts, name):
            axis = -2 if name == "qkv" else -1
            return jnp.concatenate([parts[p] for p in FUSED[name]], axis=axis)

        layers = {}
        for key, tree in first["layers"].items():
            attn, mlp = tree["attn"], tree["mlp"]
            layers[key] = tree | {
                "attn": {"qkv": join(attn, "qkv"), "o": attn["o"]},
                "mlp": {"gate_up": join(mlp, "gate_up"), "down": mlp["down"]},
            }
        made = first | {"layers": layers}
        assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, fused)
        return made

    _, losses = trained(config_of(fused=True), start)
    np.testing.assert_allclose(losses, plain[1], rtol=1e-6)


def test_narrow_parameters_and_moments_learn(plain):
    state, losses = trained(config_of(param_dtype="bfloat16"), steps=3)
    floats = [x for x in jax.tree.leaves((state.params, state.opt_state)) if x.ndim]
    assert {str(x.dtype) for x in floats} == {"bfloat16"}
    np.testing.assert_allclose(losses, plain[1], rtol=2e-2)


def test_narrow_updates_are_those_of_float32_rounded_once():
    random = np.random.default_rng(0)
    params = {"w": jnp.asarray(random.standard_normal((8, 8)), jnp.bfloat16)}
    grads = jax.tree.map(lambda x: (0.1 * x).astype(x.dtype), params)
    with jax.numpy_dtype_promotion("standard"):
        inner = optax.adamw(1e-2)
        narrow = in_float32(inner)
        updates, state = narrow.update(grads, narrow.init(params), params)
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), (params, grads))
        want, moments = inner.update(wide[1], inner.init(wide[0]), wide[0])
    assert updates["w"].dtype == jnp.float32
    np.testing.assert_array_equal(updates["w"], want["w"])
    np.testing.assert_array_equal(state[0].nu["w"], moments[0].nu["w"].astype(jnp.bfloat16))


def test_accumulation_over_narrow_gradients_sums_in_float32(plain):
    _, losses = trained(config_of(param_dtype="bfloat16", accumulate=4))
    np.testing.assert_allclose(losses, plain[1], rtol=2e-2)


def test_narrow_logits_change_the_loss_by_their_rounding_alone(plain):
    _, losses = trained(config_of(logit_dtype="bfloat16"))
    np.testing.assert_allclose(losses, plain[1], rtol=5e-3)
    assert not np.array_equal(losses, plain[1])


def test_fused_projections_are_not_split_over_devices():
    with pytest.raises(ConfigError, match="fused"):
        config_of(fused=True, mesh="tensor=2")
