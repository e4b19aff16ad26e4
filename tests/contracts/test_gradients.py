"""Gradients are finite, reach every parameter, agree with differences, and survive remat."""

import jax
import numpy as np
import pytest

from jaxllm.core.policy import Policy
from jaxllm.core.tree import flatten
from jaxllm.nn import api
from jaxllm.state.step import training_step
from tests.contracts.specs import (
    NAMES,
    SMALL,
    SPECS,
    assert_close,
    gradient,
    loss,
    params,
    quick,
    redraw,
    single,
    tokens,
)

SOME = ("gqa", "parallel")
EACH = [*SOME, *(pytest.param(n, marks=pytest.mark.slow) for n in NAMES if n not in SOME)]


@pytest.mark.parametrize("name", EACH)
def test_gradient_is_finite_and_reaches_every_parameter(name):
    _, _, grads = gradient(name)
    for path, leaf in flatten(grads):
        assert np.isfinite(leaf).all(), path
        # Without rope softmax does not see a key's bias; the balance bias moves by its own rule,
        # and constant rates not at all.
        if not path.endswith(("k_bias", "k_global_bias", "balance_bias", "rate")):
            assert np.abs(leaf).max() > 1e-6, path


def test_gradient_is_the_slope_of_the_loss():
    name = "gqa"
    value, _, grads = gradient(name)
    weights, run = params(name), quick(loss(SPECS[name]))
    random = np.random.default_rng(0)
    direction = jax.tree.map(lambda x: random.standard_normal(x.shape).astype(np.float32), weights)
    slope = sum(
        float(np.vdot(g, d))
        for (_, g), (_, d) in zip(flatten(grads), flatten(direction), strict=True)
    )
    move = lambda size: jax.tree.map(lambda w, d: w + size * d, weights, direction)  # noqa: E731
    up, down = (float(run(move(size), tokens(name))[0]) for size in (1e-3, -1e-3))
    assert abs((up - down) / 2e-3 - slope) < 2e-2 * abs(slope)
    assert down != value != up


@pytest.mark.parametrize("name", ["parallel", pytest.param("gqa", marks=pytest.mark.slow)])
def test_remat_changes_no_value(name):
    spec = SPECS[name]
    step = quick(jax.value_and_grad(loss(spec, Policy(remat="full")), has_aux=True))
    (value, logits), grads = step(params(name), tokens(name))
    wanted = gradient(name)
    assert abs(float(value) - wanted[0]) < 1e-6
    assert_close(logits, wanted[1], 1e-6)
    assert_close(grads, wanted[2])


@pytest.mark.parametrize("layout", ["scan", "unrolled"])
def test_remat_lowers_the_memory_of_a_backward_pass(layout):
    """Without barriers XLA finds the recomputation equal to the first one and keeps everything."""
    ids, weights = jax.ShapeDtypeStruct((8, 64), np.int32), redraw(SMALL)
    weights = weights if layout == "scan" else single(weights, SMALL.num_layers)

    def run(remat, weights, ids):
        policy = Policy(remat=remat)
        hidden, _, _ = api.apply(SMALL, weights, ids, training_step(*ids.shape), policy=policy)
        return hidden.sum()

    def temporaries(remat):
        grad = jax.jit(jax.grad(lambda w, i: run(remat, w, i)))
        compiled = grad.lower(weights, ids).compile({"xla_backend_optimization_level": 0})
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries("full") < 0.8 * temporaries("none")
