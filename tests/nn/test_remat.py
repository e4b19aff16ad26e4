"""Named remat policies: the same gradients, less kept from the forward pass to the backward."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.policy import Policy
from jaxllm.core.tree import single_segments
from jaxllm.nn import api
from jaxllm.spec.model import Block, Head, ModelSpec, sub
from jaxllm.spec.ops import MLP, Attention, Norm
from jaxllm.state.step import training_step

NORM = Norm()
SPEC = ModelSpec(
    vocab=64,
    width=32,
    blocks=(
        Block(
            name="G",
            subs=(
                sub("attn", Attention(heads=4, kv_heads=2, head_dim=8), norm_in=NORM),
                sub("mlp", MLP(width=96), norm_in=NORM),
            ),
        ),
    ),
    layers="G*6",
    context=64,
    final_norm=NORM,
    head=Head(tied=True),
)
REMATS = ("full", "save_attention", "save_dots", "none")


def gradient(remat, layout):
    """The compiled gradient of a loss, and its arguments."""
    policy = Policy(remat=remat, layout=layout)
    segments = None if layout == "scan" else single_segments(6)
    params = api.init(SPEC, jax.random.key(0), segments=segments)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 64, (4, 48)), jnp.int32)

    def loss(params):
        hidden, _, _ = api.apply(SPEC, params, ids, training_step(4, 48), policy=policy)
        return jnp.mean(jnp.square(hidden * jnp.arange(32, dtype=jnp.float32)[None, None]))

    return jax.jit(jax.grad(loss)).lower(params).compile(), params


@pytest.fixture(scope="module")
def compiled():
    return {remat: gradient(remat, "scan") for remat in REMATS}


@pytest.mark.parametrize("remat", REMATS[:-1])
def test_gradients_are_those_without_remat(compiled, remat):
    want, got = (program(params) for program, params in (compiled["none"], compiled[remat]))
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5 * float(jnp.abs(a).max()))


def test_each_policy_keeps_less_than_the_next(compiled):
    kept = [compiled[r][0].memory_analysis().temp_size_in_bytes for r in REMATS]
    assert kept == sorted(kept)
    assert len(set(kept)) == len(kept), kept


@pytest.mark.parametrize("remat", ["full", "save_dots"])
def test_unrolled_layers_are_recomputed_too(remat):
    want, got = gradient("none", "unrolled"), gradient(remat, "unrolled")
    for a, b in zip(*(jax.tree.leaves(p(x)) for p, x in (want, got)), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5 * float(jnp.abs(a).max()))


def dots(remat):
    """How many matrix products the gradient of one unrolled layer has in its jaxpr."""
    spec = dataclasses.replace(SPEC, layers="G*1")
    params = api.init(spec, jax.random.key(0), segments=single_segments(1))
    ids = jnp.zeros((1, 8), jnp.int32)

    def loss(params):
        step, policy = training_step(1, 8), Policy(remat=remat)
        return jnp.sum(api.apply(spec, params, ids, step, policy=policy)[0])

    return str(jax.make_jaxpr(jax.grad(loss))(params)).count("dot_general[")


def test_what_is_multiplied_again():
    """Kept results are not computed twice: a layer has q k v o, gate up down and attention's 2."""
    plain = dots("none")
    # Recomputed by save_dots: attention's two products, since the reference keeps its output
    # alone; by save_attention also q k v, o, gate and up; down's result no gradient asks for.
    assert dots("save_dots") - plain <= 2
    assert dots("save_attention") - dots("save_dots") == 6
    assert dots("full") >= dots("save_attention")


def test_offload_keeps_the_gradients():
    want, got = gradient("save_dots", "scan"), gradient("offload", "scan")
    for a, b in zip(*(jax.tree.leaves(p(x)) for p, x in (want, got)), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5 * float(jnp.abs(a).max()))
