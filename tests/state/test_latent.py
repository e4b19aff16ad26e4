"""Latent attention: absorbed = plain, and what is remembered is the short vector alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.policy import Policy
from jaxllm.core.qarray import dequantize
from jaxllm.core.quantize import Scheme, quantize
from jaxllm.core.weights import AdaptedWeight, merge_adapter
from jaxllm.errors import ConfigError
from jaxllm.nn import api
from jaxllm.ops import linear
from jaxllm.spec.ops import LatentAttention
from jaxllm.state.dense import dense_state, grow
from jaxllm.state.step import dense_step
from tests.contracts.specs import SPECS, assert_close, full, params, quick, tokens

NAME = "latent"
SPEC = SPECS[NAME]
SIZES = {"heads": 2, "kv_rank": 512, "nope_dim": 128, "rope_dim": 64, "v_dim": 128}


@pytest.mark.parametrize("latent", ["plain", "absorbed"])
def test_both_ways_are_the_full_forward(latent):
    """Prefill, a chunk and single tokens, with a state that grows on the way."""
    ids, state = tokens(NAME), dense_state(SPEC, 4, 8, dtype=np.float32)

    def run(state, ids, start):
        step, policy = dense_step(start, ids.shape[1]), Policy(latent=latent)
        hidden, state, _ = api.apply(SPEC, params(NAME), ids, step, state, policy=policy)
        return api.unembed(SPEC, params(NAME), hidden, policy=policy), state

    run = quick(run)
    for first, size in ((0, 5), (5, 3), (8, 1), (9, 1)):
        state = grow(state, 12) if first == 8 else state
        logits, state = run(state, ids[:, first : first + size], np.full(4, first, np.int32))
        assert_close(logits, full(NAME)[:, first : first + size])


def test_the_state_holds_the_short_vector_and_the_shared_key():
    state = dense_state(SPEC, 2, 9, dtype=np.float32)
    found = [x.shape for x in jax.tree.leaves(state["0"])]
    assert found == [(2, 9, 12), (2, 9, 4)]


def test_few_tokens_absorb():
    """The published sizes: up to 170 new tokens it costs less to leave the vectors as they are."""
    op = LatentAttention(**SIZES)
    assert [op.absorbs(n) for n in (1, 170, 171, 4096)] == [True, True, False, False]


@pytest.mark.parametrize("kind", ["plain", "quantized", "adapted", "outputs first"])
def test_absorbed_views_of_every_kind_of_weight(kind):
    random = np.random.default_rng(0)
    draw = lambda *shape: random.standard_normal(shape).astype(np.float32)  # noqa: E731
    leaf = plain = draw(8, 2, 5)
    if kind == "quantized":
        leaf = quantize(jnp.asarray(plain), Scheme(format="int8", group=4))
        plain = dequantize(leaf, jnp.float32)
    if kind == "adapted":
        leaf = AdaptedWeight(plain, draw(1, 8, 3), draw(1, 3, 2, 5), scale=0.5)
        plain = merge_adapter(leaf)
    if kind == "outputs first":
        leaf = linear.OutputsFirst(plain.transpose(1, 2, 0), inputs=1)
    keys, values = linear.absorbed(leaf, 3, dtype=jnp.float32)
    assert_close(keys, np.asarray(plain)[..., :3])
    assert_close(values, np.asarray(plain)[..., 3:])


WRONG = {
    "are positive": {"kv_rank": 0},
    "heads, ranks": {"q_rank": 0},
    "eps is positive": {"eps": 0.0},
    "latent attention: rope rotates": {"rope_dim": 7},
}


@pytest.mark.parametrize("message", WRONG)
def test_contradictions(message):
    with pytest.raises(ConfigError, match=message):
        LatentAttention(**(SIZES | WRONG[message]))
