"""Masks by probing: the gradient of one output row with respect to every input row.

In a model of one layer it is non-zero exactly where the declared mask lets the query see the key.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm.core.policy import Policy
from jaxllm.nn import api
from jaxllm.spec.mask import And, Causal, Full, Or, Window, allowed
from jaxllm.spec.ops import Attention
from jaxllm.state.step import training_step
from tests.oracle.golden import golden
from tests.oracle.mutate import change

LENGTH = 26
POLICY = Policy(layout="unrolled", fused=True)
MASKS = {
    "as declared by llama_mha": ("llama_mha", None),
    "as declared by mistral_window": ("mistral_window", None),
    "both sides": ("mistral_full", Window(left=3, right=2)),
    "everything": ("mistral_full", Full()),
    "a window, or what lies five and more behind": (
        "mistral_full",
        Or(first=Window(left=1), second=And(first=Causal(), second=Window(left=9, right=-0))),
    ),
}


@pytest.mark.parametrize("what", MASKS)
def test_gradients_are_where_the_mask_says(what):
    name, mask = MASKS[what]
    model = jaxllm.load(golden(name).source, policy=POLICY, store=False)
    spec = dataclasses.replace(model.spec, layers="G*1")
    if mask is not None:
        spec = change(spec, Attention, mask=mask)
    params = model.params | {"layers": {"0": model.params["layers"]["0"]}}
    mask = spec.block(0).subs[0].ops[0].op.mask
    random = np.random.default_rng(1)
    given = jnp.asarray(random.standard_normal((1, LENGTH, spec.width)), jnp.float32)
    weights = jnp.asarray(random.standard_normal((1, LENGTH, spec.width)), jnp.float32)
    ids = jnp.zeros((1, LENGTH), jnp.int32)

    def outputs(embeds):
        inputs = api.Inputs(ids, embeds=embeds, is_embed=jnp.ones(ids.shape, bool))
        hidden, _, _ = api.apply(spec, params, inputs, training_step(1, LENGTH), policy=POLICY)
        return (hidden * weights).sum(axis=(0, 2))

    gradients = np.asarray(jax.jit(jax.jacrev(outputs))(given))[:, 0]  # [T, S, D]
    assert np.isfinite(gradients).all()
    seen = np.abs(gradients).max(axis=-1) > 0
    places = np.arange(LENGTH)
    wanted = np.broadcast_to(allowed(mask, places[:, None], places[None]), (LENGTH, LENGTH))
    assert np.array_equal(seen, wanted)
    assert wanted.any(axis=1).all()
