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
from jaxllm.spec.mask import (
    And,
    Blocks,
    Causal,
    Chunk,
    Full,
    Global,
    Or,
    Prefix,
    Random,
    Row,
    Window,
    allowed,
)
from jaxllm.spec.ops import Attention
from jaxllm.state.step import training_step
from tests.oracle.encoder_golden import rows
from tests.oracle.golden import golden
from tests.oracle.mutate import change

LENGTH = 26
POLICY = Policy(layout="unrolled", fused=True)
MARKED = np.isin(np.arange(LENGTH), (0, 1, 2, 11))
BESIDE = Or(first=Window(left=1, right=1), second=Global(first=1, last=1))
MASKS = {
    "as declared by llama_mha": ("llama_mha", None),
    "as declared by mistral_window": ("mistral_window", None),
    "both sides": ("mistral_full", Window(left=3, right=2)),
    "everything": ("mistral_full", Full()),
    "Longformer by place": ("llama_mha", Or(first=Window(left=2, right=2), second=Global(first=3))),
    "Longformer by marks": ("llama_mha", Or(first=Window(left=4, right=4), second=Global())),
    "BigBird": ("mistral_full", Blocks(size=2, mask=Or(first=BESIDE, second=Random(count=2)))),
    "BigBird, the last block not full": (
        "llama_mha",
        Blocks(size=3, mask=Or(first=BESIDE, second=Random(count=1, seed=7))),
    ),
    "a prefix by place": ("mistral_full", Or(first=Causal(), second=Prefix(first=9))),
    "a prefix by marks": ("mistral_full", Or(first=Causal(), second=Prefix())),
    "chunks of blocks": (
        "mistral_full",
        And(first=Causal(), second=Blocks(size=2, mask=Chunk(size=3))),
    ),
    "streaming: a window and the first three": (
        "mistral_full",
        And(first=Causal(), second=Or(first=Window(left=5), second=Global(first=3))),
    ),
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

    step = dataclasses.replace(training_step(1, LENGTH), marks=jnp.asarray(MARKED)[None])

    def outputs(embeds):
        inputs = api.Inputs(ids, embeds=embeds, is_embed=jnp.ones(ids.shape, bool))
        hidden, _, _ = api.apply(spec, params, inputs, step, policy=POLICY)
        return (hidden * weights).sum(axis=(0, 2))

    gradients = np.asarray(jax.jit(jax.jacrev(outputs))(given))[:, 0]  # [T, S, D]
    assert np.isfinite(gradients).all()
    seen = np.abs(gradients).max(axis=-1) > 0
    places, heads = np.arange(LENGTH), spec.block(0).subs[0].ops[0].op.heads
    row = Row(
        length=LENGTH,
        head=np.arange(heads)[:, None, None],
        heads=heads,
        marks=(MARKED[:, None], MARKED[None]),
    )
    wanted = np.broadcast_to(
        allowed(mask, places[:, None], places[None], row), (heads, LENGTH, LENGTH)
    ).any(0)  # by any of the heads
    assert np.array_equal(seen, wanted)
    assert wanted.any(axis=1).all()


def test_longformer_global_rows_see_all_by_projections_of_their_own():
    """Row 0 sees all and is seen by all; others see w / 2 on each side, both ends included."""
    model = jaxllm.load(rows("longformer_local").source, policy=POLICY, store=False)
    spec, params = model.spec, model.params
    random = np.random.default_rng(1)
    given = jnp.asarray(random.standard_normal((1, LENGTH, spec.width)), jnp.float32)
    weights = jnp.asarray(random.standard_normal((1, LENGTH, spec.width)), jnp.float32)
    marks = np.arange(LENGTH) == 0
    step = dataclasses.replace(training_step(1, LENGTH), marks=jnp.asarray(marks)[None])

    def outputs(embeds):
        ids = jnp.zeros((1, LENGTH), jnp.int32)
        inputs = api.Inputs(ids, embeds=embeds, is_embed=jnp.ones(ids.shape, bool))
        hidden, _, _ = api.apply(spec, params, inputs, step, policy=POLICY)
        return (hidden * weights).sum(axis=(0, 2))

    gradients = np.asarray(jax.jit(jax.jacrev(outputs))(given))[:, 0]
    places = np.arange(LENGTH)
    wanted = np.abs(places[:, None] - places[None]) <= 2
    wanted[0], wanted[:, 0] = True, True
    assert np.array_equal(np.abs(gradients).max(axis=-1) > 0, wanted)
