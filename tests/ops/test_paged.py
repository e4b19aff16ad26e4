"""Attention over pages of flat batches: our kernel, interpreted, against the plain loop."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.ops.attention import Scores
from jaxllm.ops.flat import Flat, query_blocks
from jaxllm.ops.paged import obstacle, paged_attention
from jaxllm.ops.pages import PageTable, Pool
from jaxllm.spec.mask import Causal
from pallas_kernels.target import targeting

# Counts and starts of rows, the longest, and tokens of the batch.
BATCHES = {
    "decoding": ((1, 1, 1, 0), (20, 0, 31, 9), 1, 4),
    "verifying": ((3, 1, 2, 0), (20, 0, 12, 9), 3, 8),
    "a prompt beside decoding": ((1, 35, 4, 0), (20, 0, 12, 0), 64, 64),
}


def flat_of(name: str) -> tuple[Flat, int]:
    counts, starts, longest, length = BATCHES[name]
    slots = np.arange(len(counts), dtype=np.int32)
    return Flat(jnp.asarray(counts), jnp.asarray(starts), jnp.asarray(slots), longest), length


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("name", BATCHES)
def test_the_kernel_is_the_loop(name, sinks):
    flat, length = flat_of(name)
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.standard_normal(shape), jnp.bfloat16)  # noqa: E731
    pool = Pool(draw(14, 16, 2, 64), draw(14, 16, 2, 64))
    pages = random.permutation(14)[:12].reshape(4, 3).astype(np.int32)
    table = PageTable(jnp.asarray(pages), jnp.zeros((4,), jnp.int32))
    q = draw(1, length, 4, 64)
    own = jnp.asarray(random.standard_normal(4), jnp.float32) if sinks else None
    given = (q, pool, table, flat)
    more = {"mask": Causal(), "scores": Scores(scale=0.125, sinks=own)}
    wanted = paged_attention(*given, **more, implementation="loop")
    with targeting("interpreter"):
        found = paged_attention(*given, **more, implementation="mosaic_gpu")
    real = int(jnp.sum(flat.counts))
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    found, wanted = (np.asarray(x, np.float32)[0] for x in (found, wanted))
    np.testing.assert_allclose(found[:real], wanted[:real], atol=0.02, rtol=0.02)
    assert not found[real:].any()


@pytest.mark.parametrize("length", [8, 64, 70])
@pytest.mark.parametrize("longest", [3, 40])
def test_every_token_is_in_one_block(length, longest):
    random = np.random.default_rng(length + longest)
    for _ in range(20):
        counts = np.sort(random.integers(0, longest + 1, 5))[::-1].astype(np.int32)
        while counts.sum() > length:
            counts[counts.argmax()] -= 1
        flat = Flat(jnp.asarray(counts), jnp.asarray([5, 0, 9, 1, 2]), jnp.arange(5), longest)
        blocks = query_blocks(flat, length)
        held = np.zeros(length, int)
        for begin, count in zip(np.asarray(blocks.begins), np.asarray(blocks.counts), strict=True):
            held[begin : begin + count] += 1
        assert (held == 1).all()
        ends = np.asarray(blocks.starts) + np.asarray(blocks.counts)
        there = np.asarray(blocks.real).sum(axis=1)
        assert ((ends > 0) == (there > 0)).all()
        assert (np.asarray(blocks.counts)[there > 0] == there[there > 0]).all()


def test_latent_keys_have_a_kernel():
    facts = {"dtype": "bfloat16", "page_size": 64, "mask": Causal(), "latent": True}
    with targeting("gpu"):
        assert obstacle(widths=(576, 512), **facts) is None
        assert "512, a multiple of 128, are values" in (obstacle(widths=(576, 96), **facts) or "")
    assert "needs a CUDA device" in (obstacle(widths=(576, 512), **facts) or "")
