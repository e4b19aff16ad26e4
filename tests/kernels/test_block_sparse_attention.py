"""Block-sparse attention on the CPU: maps and lists, the reference, the kernel interpreted and
lowered."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from pallas_kernels.block_sparse_attention import BlockMap, block_sparse_attention, explain
from pallas_kernels.block_sparse_attention.blocks import _halved
from pallas_kernels.errors import ShapeError, UnsupportedError
from pallas_kernels.target import targeting
from tests.kernels.block_sparse import CASES, arguments, by_hand, compare
from tests.kernels.tpus import TPUS, described


@pytest.mark.parametrize("name", CASES)
def test_maps_hold_the_mask(name):
    case = CASES[name]
    rows, columns = np.arange(case.queries)[:, None], np.arange(case.keys)[None]
    np.testing.assert_array_equal(case.map.dense(), case.visible(rows, columns))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("cut", [(128, 128, False), (128, 64, False), (64, 64, True)])
def test_lists_visit_every_pair_once(name, cut):
    case, (tile, block, transposed) = CASES[name], cut
    lists, seen = case.map.lists(*cut), case.map.dense()
    seen = seen.transpose(0, 2, 1) if transposed else seen
    again = np.zeros((len(seen), 1024, 1024), int)
    for m, t in np.ndindex(*lists.counts.shape[:2]):
        partial, every = lists.counts[m, t]
        for place in range(every):
            block_at, pattern = (
                lists.entries[m, t, place] & 0xFFFF,
                lists.entries[m, t, place] >> 16,
            )
            assert (pattern == 0) == (place < every - partial)
            words = lists.words[pattern].view(np.uint32)
            bits = (words[:, :, None] >> np.arange(32, dtype=np.uint32)) & 1
            bits = bits.transpose(1, 0, 2).reshape(tile, block)
            rows, columns = slice(t * tile, (t + 1) * tile), slice(block_at * block, None)
            again[m, rows, columns][:, :block] += bits.astype(int)
    np.testing.assert_array_equal(again[:, : seen.shape[1], : seen.shape[2]], seen)
    if not transposed:  # keys past the end; queries there have no weight anyway
        assert again[:, : seen.shape[1], seen.shape[2] :].sum() == 0


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("cut", [(64, False, 2), (64, True, 1 << 16), (128, False, 1)])
def test_halves_visit_every_pair_of_their_own_once(name, cut):
    case, (block, transposed, gap) = CASES[name], cut
    halves, seen = case.map.halves(block, transposed, gap), case.map.dense()
    seen = seen.transpose(0, 2, 1) if transposed else seen
    again = np.zeros((len(seen), 1024, 1024), int)
    for m, t, w in np.ndindex(*halves.own.shape[:3]):
        masked, whole, end = halves.ends[m, t, w]
        places = halves.own[m, t, w, :end] & 0xFFFF
        patterns = halves.own[m, t, w, :end] >> 16
        assert (patterns[masked:whole] == 0).all()
        assert end > 0 and places[-1] < halves.counts[m, t]
        assert ((np.diff(places) > 0) & (np.diff(places) <= gap)).all()
        for place, pattern in zip(places, patterns, strict=True):
            words = halves.words[pattern].view(np.uint32)
            bits = (words[:, :, None] >> np.arange(32, dtype=np.uint32)) & 1
            bits = bits.transpose(1, 0, 2).reshape(64, block)
            row, column = t * 128 + w * 64, halves.blocks[m, t, place] * block
            again[m, row : row + 64, column : column + block] += bits.astype(int)
    np.testing.assert_array_equal(again[:, : seen.shape[1], : seen.shape[2]], seen)


def test_a_warpgroup_looks_at_a_block_rather_than_skip_many():
    kinds = np.full((2, 8), -1)
    kinds[:, 0] = kinds[0] = 0  # the first one sees all but the last
    kinds[:, 7] = -1, 3  # the second one a whole block and a pattern, the last that is visited
    shared, (first, second) = _halved(kinds, gap=2)
    assert shared == [7, 6, 5, 4, 3, 2, 1, 0]
    assert first == ([1, 2, 3, 4, 5, 6, 7], [0, 7, 7])
    unseen = [place + (1 << 16) for place in (1, 3, 5)]
    assert second == ([3 << 16, *unseen, 7], [4, 5, 5])


@pytest.mark.parametrize("name", CASES)
def test_the_reference(name):
    case = CASES[name]
    qkv, options = arguments(case, jnp.float32)
    out = block_sparse_attention(*qkv, case.map, implementation="reference", **options)
    np.testing.assert_allclose(out, by_hand(case, qkv, options), atol=2e-6)


@pytest.fixture
def _loose():
    """The interpreter's own products mix dtypes, in threads that a context does not reach."""
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    yield
    jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.mark.slow
@pytest.mark.usefixtures("_loose")
@pytest.mark.parametrize("name", CASES)
def test_kernels_in_the_interpreter(name):
    with targeting("interpreter"):
        compare(CASES[name], jnp.bfloat16)


@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradient_lower_for_cuda(name):
    case = CASES[name]
    qkv, options = arguments(case, jnp.bfloat16)

    def loss(*qkv):
        out = block_sparse_attention(*qkv, case.map, **options)
        return jnp.sum(out.astype(jnp.float32))

    with targeting("gpu"):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*qkv)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 3


@pytest.mark.parametrize(
    "name", [n if n == "lengths" else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_the_tpu_kernels_in_the_interpreter(name):
    with targeting("interpreter"):
        compare(CASES[name], jnp.bfloat16, "mosaic_tpu")


def lower_for_tpu(case, sharding=None):
    """Forward and gradient of a case."""
    qkv, options = arguments(case, jnp.bfloat16)
    lengths = {n: options.pop(n) for n in ("key_lengths",) if n in options}

    def loss(qkv, lengths):
        out = block_sparse_attention(*qkv, case.map, **options, **lengths)
        return jnp.sum(out.astype(jnp.float32))

    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
    with targeting("tpu"):
        traced = jax.jit(jax.grad(loss)).trace(*jax.tree.map(like, (qkv, lengths)))
        return traced.lower(lowering_platforms=("tpu",))


@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradient_lower_for_a_tpu(name):
    assert lower_for_tpu(CASES[name]).as_text().count("tpu_custom_call") == 3


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tpu", TPUS)
def test_they_compile_for_every_tpu(tpu, name, monkeypatch):
    device = described(tpu, monkeypatch)
    compiled = lower_for_tpu(CASES[name], SingleDeviceSharding(device)).compile()
    assert compiled.memory_analysis() is not None


def test_wrong_arguments_are_named():
    case = CASES["window and global"]
    (q, k, v), _ = arguments(case, jnp.bfloat16)
    with pytest.raises(
        ShapeError, match="the map is of 200 queries and 200 keys, q and k have 199"
    ):
        block_sparse_attention(q[:, :199], k, v, case.map)
    with pytest.raises(ShapeError, match="2 maps for 4 query heads"):
        block_sparse_attention(q, k, v, BlockMap.even(np.ones((2, 4, 4), bool), 64, 200, 200))
    with pytest.raises(ShapeError, match=r"takes blocks \[M, 4, 4\] of a multiple of 64"):
        BlockMap.even(np.ones((1, 4, 3), bool), 64, 200, 200)
    with pytest.raises(UnsupportedError, match="CUDA device, this is cpu"):
        block_sparse_attention(q, k, v, case.map, implementation="mosaic_gpu")
    assert explain(q, k, v).name == "reference"
    with targeting("gpu"):
        assert explain(q, k, v).name == "mosaic_gpu"
