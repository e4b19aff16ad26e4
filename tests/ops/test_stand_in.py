"""Attention that is only compiled."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from jaxllm.ops import attention as module
from jaxllm.ops.attention import Scores, attention
from jaxllm.ops.mask import Visibility
from jaxllm.ops.stand_in import described, standing_in
from jaxllm.spec.mask import Causal


def loss(q: jax.Array, k: jax.Array, v: jax.Array, **more) -> jax.Array:
    positions = jnp.arange(q.shape[1], dtype=jnp.int32)[None]
    see = Visibility(
        mask=Causal(), query_positions=positions, key_positions=positions, aligned=True
    )
    return jnp.sum(attention(q, k, v, see, scores=Scores(scale=0.1, **more)).astype(jnp.float32))


ARGS = tuple(jax.ShapeDtypeStruct((2, 256, n, 64), jnp.bfloat16) for n in (4, 2, 2))


def compiled(**more):
    gradient = jax.grad(lambda *args: loss(*args, **more), argnums=(0, 1, 2))
    return jax.jit(gradient).lower(*ARGS).compile()


def test_no_scores_are_kept():
    plain = compiled().memory_analysis().temp_size_in_bytes
    with standing_in("gpu"):
        assert described() == "gpu"
        one = compiled()
    assert described() is None
    assert plain > 2 * 4 * 256 * 256 * 4  # rows, heads, queries, keys: float32
    assert one.memory_analysis().temp_size_in_bytes < plain / 4
    assert [x.shape for x in jax.tree.leaves(one.out_info)] == [x.shape for x in ARGS]
    assert compiled().memory_analysis().temp_size_in_bytes == plain  # no trace stays behind


def test_a_mask_that_no_kernel_takes_stays_plain(monkeypatch):
    monkeypatch.setattr(module, "form", lambda *_: "dense")
    monkeypatch.setattr(module, "_cudnn_obstacle", lambda call: "not here")
    plain = compiled().memory_analysis().temp_size_in_bytes
    with standing_in("gpu"):
        assert compiled().memory_analysis().temp_size_in_bytes == plain


@pytest.mark.filterwarnings("ignore")
def test_it_says_so_when_it_is_run():
    arrays = tuple(jnp.ones(x.shape, x.dtype) for x in ARGS)
    with standing_in("gpu"), pytest.raises(Exception, match="it only describes"):
        jax.block_until_ready(jax.jit(loss)(*arrays))
