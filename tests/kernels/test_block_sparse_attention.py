"""Block-sparse attention on the CPU: maps and lists, the reference, the kernel interpreted and
lowered."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from pallas_kernels.block_sparse_attention import BlockMap, block_sparse_attention, explain
from pallas_kernels.block_sparse_attention.blocks import Halves, _halved
from pallas_kernels.block_sparse_attention.shapes import CASES as SHAPES
from pallas_kernels.errors import ShapeError, UnsupportedError
from pallas_kernels.target import targeting
from tests.kernels.attention import watched
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


@pytest.mark.slow
@pytest.mark.usefixtures("_loose")
def test_no_races(monkeypatch):
    """Where consumers skip blocks, by the interpreter's vector clocks."""
    states = watched(monkeypatch)
    with targeting("interpreter"):
        compare(CASES["random blocks of each head"], jnp.bfloat16)
    assert [state.races_found for state in states] == [False, False, False]


@pytest.mark.parametrize(("name", "width"), [*((name, None) for name in CASES), ("lengths", 256)])
def test_forward_and_gradient_lower_for_cuda(name, width):
    case = CASES[name]
    case = dataclasses.replace(case, width=width or case.width)
    qkv, options = arguments(case, jnp.bfloat16)

    def loss(*qkv):
        out = block_sparse_attention(*qkv, case.map, implementation="mosaic_gpu", **options)
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


def _goes_on(halves: Halves, at: tuple[int, int], stages: int) -> bool:
    """Whether the loader and both consumers of `ForwardOwn` reach the end of a tile.

    Nobody's choice depends on who comes first, so one order of events decides.
    """
    count = int(halves.counts[at])
    brought = {"k": 0, "v": 0}  # blocks, in the order of visits
    let_go: dict = {name: [set(), set()] for name in brought}

    def consumer(w):
        ends = halves.ends[(*at, w)]
        mine = [count - 1 - int(e & 0xFFFF) for e in halves.own[(*at, w)][: ends[2]][::-1]]

        def skip(first, end):
            for i in range(first, end):
                for name in brought:
                    yield name, i
                    let_go[name][w].add(i)

        done = 0
        for i, place in enumerate(mine):
            yield from skip(done, place)
            yield "k", place
            if i > 1:
                let_go["v"][w].add(mine[i - 2])
            if i:
                yield "v", mine[i - 1]
            let_go["k"][w].add(place)
            done = place + 1
        yield "v", mine[-1]
        let_go["v"][w] |= set(mine)
        yield from skip(done, count)

    consumers = [consumer(0), consumer(1)]
    wanted = [next(one, None) for one in consumers]
    moved = True
    while moved:
        moved = False
        for i in range(2):
            while wanted[i] is not None and brought[wanted[i][0]] > wanted[i][1]:
                wanted[i], moved = next(consumers[i], None), True
        name = "k" if brought["k"] == brought["v"] else "v"
        before = brought[name] - stages
        if brought[name] < count and (before < 0 or all(before in x for x in let_go[name])):
            brought[name], moved = brought[name] + 1, True
    return wanted == [None, None]


def test_no_consumer_waits_for_ever():
    maps = [case.map for case in CASES.values()]
    maps += [shaped.make(shaped.length, shaped.heads) for shaped in list(SHAPES.values())[:2]]
    random = np.random.default_rng(0)
    maps += [BlockMap.even(random.random((2, 32, 32)) < p, 64, 2048, 2048) for p in (0.1, 0.4)]
    for stages in (4, 8):
        for one in maps:
            halves = one.halves(64, gap=stages // 2)
            assert all(_goes_on(halves, at, stages) for at in np.ndindex(*halves.counts.shape))

    def lopsided(
        rows, columns
    ):  # the second half's pattern is visited after 30 blocks of the first
        first = (rows < 64) & (columns < 31 * 64)
        return (first | ((rows >= 64) & ((columns < 64) | (columns % 64 == 63))))[None] & ~(
            (rows >= 64) & (columns >= 64) & (columns < 31 * 64)
        )

    one = BlockMap.of(lopsided, 128, 2048)
    assert _goes_on(one.halves(64, gap=2), (0, 0), 4)
    assert not _goes_on(one.halves(64), (0, 0), 4)


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
