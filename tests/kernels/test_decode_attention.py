"""One new token's attention: the kernel in the interpreter against the reference, and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_attention import Problem, bench, decode_attention, explain
from pallas_kernels.decode_attention.mosaic_gpu import Tiles, attend, tiles_for
from pallas_kernels.decode_attention.shapes import CASES as TIMED
from pallas_kernels.errors import ShapeError, UnsupportedError
from pallas_kernels.target import targeting
from tests.kernels.lowered import kernel_calls

# (heads, key heads, width, slots, positions, options): first and last slots, ends of steps of 64,
# slots that are no multiple of a step, a place past the last one.
CASES = {
    "first": (4, 1, 64, 128, (0,), {}),
    "wide": (8, 2, 128, 256, (70, 255), {}),
    "a head each": (2, 2, 64, 192, (127, 128, 64), {}),
    "eight": (8, 1, 64, 192, (191,), {}),
    "window": (8, 4, 64, 256, (200, 30), {"window": 20}),
    "window of steps": (4, 2, 64, 320, (319, 128), {"window": 64}),
    "soft-cap": (8, 4, 64, 104, (103,), {"softcap": 3.0}),
    "past the end": (8, 4, 64, 104, (120, 103), {}),
    "many steps": (1, 1, 64, 448, (440,), {}),
}


def draw(case, *, turns=True, dtype="bfloat16", nan=True):
    """(arrays, turns, problem) of a case; slots that were never written hold NaN."""
    heads, kv_heads, width, slots, positions, options = case
    batch = len(positions)
    keys = jax.random.split(jax.random.key(7), 4)
    shapes = ((heads + 2 * kv_heads, width), (slots, kv_heads, width), (slots, kv_heads, width))
    qkv, k, v = (
        jax.random.normal(key, (batch, *shape), dtype)
        for key, shape in zip(keys, shapes, strict=False)
    )
    places = jnp.asarray(positions, jnp.int32)
    if nan:
        never = jnp.arange(slots)[None] >= places[:, None]
        k, v = (jnp.where(never[..., None, None], jnp.nan, x).astype(dtype) for x in (k, v))
    both = bench.draw_turns(keys[3], batch, width)
    problem = Problem(heads=heads, scale=width**-0.5, **options)
    return (qkv, k, v, places), both if turns else None, problem


def exact(arrays, turns, problem):
    """(out, k, v) in float64 of numpy, one row and head at a time."""
    qkv, k, v, positions = (np.asarray(x, np.float64) for x in arrays)
    kv_heads, heads = k.shape[2], problem.heads
    if turns is not None:
        cos, sin = (
            np.asarray(turns, np.float64)[:, 0, None],
            np.asarray(turns, np.float64)[:, 1, None],
        )
        turned = qkv * cos + np.roll(qkv, qkv.shape[2] // 2, axis=2) * sin
        rounded = np.asarray(jnp.asarray(turned, arrays[0].dtype), np.float64)
        qkv = np.concatenate([rounded[:, : heads + kv_heads], qkv[:, heads + kv_heads :]], 1)
    k, v, out = k.copy(), v.copy(), np.zeros((len(qkv), heads, k.shape[3]))
    for b, p in enumerate(positions.astype(int)):
        if p < k.shape[1]:
            k[b, p], v[b, p] = qkv[b, heads : heads + kv_heads], qkv[b, heads + kv_heads :]
        first = 0 if problem.window is None else max(0, p - problem.window)
        for n in range(heads):
            mine = (b, slice(first, p + 1), n * kv_heads // heads)
            scores = k[mine] @ qkv[b, n] * problem.scale
            if problem.softcap is not None:
                scores = np.tanh(scores / problem.softcap) * problem.softcap
            weights = np.exp(scores - scores.max())
            out[b, n] = weights @ v[mine] / weights.sum()
    return out, k, v


def check(found, wanted):
    """The result to the rounding of 16 bits; caches to the last bit."""
    np.testing.assert_allclose(np.asarray(found[0], np.float64), wanted[0], atol=0.012, rtol=0.012)
    for cache, true in zip(found[1:], wanted[1:], strict=True):
        narrow = np.asarray(jnp.asarray(true, cache.dtype), np.float32)
        np.testing.assert_array_equal(np.asarray(cache, np.float32), narrow)


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "reference"])
@pytest.mark.parametrize("case", CASES)
def test_what_a_token_finds_and_leaves_is_exact(case, implementation):
    arrays, turns, problem = draw(CASES[case])
    with targeting("interpreter"):
        options = {"problem": problem, "implementation": implementation}
        found = jax.jit(lambda a, t: decode_attention(*a, turns=t, **options))(arrays, turns)
    check(found, exact(arrays, turns, problem))


@pytest.mark.parametrize("keys", [64, 128])
@pytest.mark.parametrize("case", ["window of steps", "past the end", "eight"])
def test_steps_of_any_size_find_the_same(case, keys):
    arrays, turns, problem = draw(CASES[case])
    options = {"problem": problem, "tiles": Tiles(keys=keys, stages=2), "interpret": True}
    check(
        jax.jit(lambda a, t: attend(*a, t, **options))(arrays, turns), exact(arrays, turns, problem)
    )


# (tokens a page, places of the new tokens, first pages, window); -1 is no token.
PAGES = {
    "pages of 64": (64, (70, -1, 128), (0, 0, 0), None),
    "pages of 16": (16, (70, 5, 31), (0, 0, 0), None),
    "pages of 128": (128, (300,), (0,), None),
    "window": (64, (300, 200), (2, 1), 100),
    "window, pages of 32": (32, (300, 64, -1), (6, 0, 0), 100),
}


def draw_pages(case, columns=8):
    """(qkv, pools, positions), turns, table and problem of a case of pages in no order. What holds
    no token is NaN, and pages past a sequence's end have numbers that there are none of."""
    size, positions, firsts, window = PAGES[case]
    rows = len(positions)
    count, rng = rows * columns + 3, np.random.default_rng(0)
    options = {} if window is None else {"window": window}
    dense = (8, 2, 64, columns * size, positions, options)
    (qkv, *_, places), turns, problem = draw(dense, nan=False)
    table = rng.permutation(count)[: rows * columns].reshape(rows, columns).astype(np.int32)
    live = np.zeros((count, size), bool)
    for row, (end, first) in enumerate(zip(positions, firsts, strict=True)):
        for token in range(first * size, end):
            live[table[row, token // size - first], token % size] = True
        for column in range(columns):
            if (column + first) * size > max(end, 0):
                table[row, column] = count + 7 if column % 2 else -3
    keys = jax.random.split(jax.random.key(5))
    pools = (
        jnp.where(live[..., None, None], jax.random.normal(key, (count, size, 2, 64)), jnp.nan)
        for key in keys
    )
    pages = (jnp.asarray(table), jnp.asarray(firsts, jnp.int32))
    return (qkv, *(pool.astype(jnp.bfloat16) for pool in pools), places), turns, pages, problem


def check_pages(found, arrays, turns, pages, problem):
    """Each row as a dense cache of its own pages; pools to the last bit."""
    qkv, k, v, places = arrays
    table, firsts = (np.asarray(x) for x in pages)
    size, pools = k.shape[1], [np.asarray(x, np.float64) for x in (k, v)]
    for row, place in enumerate(np.asarray(places)):
        if place < 0:
            np.testing.assert_array_equal(np.asarray(found[0][row], np.float32), 0.0)
            continue
        offset = firsts[row] * size
        own = np.clip(table[row], 0, len(k) - 1)
        dense = (jnp.asarray(pool[own].reshape(1, -1, *k.shape[2:]), k.dtype) for pool in pools)
        alone = (qkv[row : row + 1], *dense, places[row : row + 1] - offset)
        out, *_ = exact(alone, None if turns is None else turns[row : row + 1], problem)
        np.testing.assert_allclose(
            np.asarray(found[0][row], np.float64), out[0], atol=0.012, rtol=0.012
        )
    with targeting("cpu"):
        wanted = decode_attention(
            *arrays, problem=problem, turns=turns, pages=pages, implementation="reference"
        )
    for pool, true in zip(found[1:], wanted[1:], strict=True):
        pool, true = (np.asarray(x, np.float32) for x in (pool, true))
        np.testing.assert_array_equal(pool, true)


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "reference"])
@pytest.mark.parametrize("case", PAGES)
def test_pages_are_read_and_written_where_the_table_says(case, implementation):
    arrays, turns, pages, problem = draw_pages(case)
    with targeting("interpreter"):
        options = {"problem": problem, "implementation": implementation}
        call = jax.jit(lambda a, t, p: decode_attention(*a, turns=t, pages=p, **options))
        found = call(arrays, turns, pages)
    check_pages(found, arrays, turns, pages, problem)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_without_turns_nothing_is_rotated(dtype):
    arrays, _, problem = draw(CASES["wide"], turns=False, dtype=dtype)
    with targeting("interpreter"):
        options = {"problem": problem, "implementation": "mosaic_gpu"}
        found = jax.jit(lambda a: decode_attention(*a, **options))(arrays)
    assert found[0].dtype == dtype
    check(found, exact(arrays, None, problem))


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize(("heads", "keys", "parts"), [(8, 64, 1), (16, 64, 8), (8, 128, 2)])
def test_it_lowers_for_hopper_and_writes_in_place(width, heads, keys, parts):
    options = {"softcap": 30.0, "window": 700}
    arrays, turns, problem = draw((heads, 2, width, 1024, (5,), options))
    tiles = Tiles(keys=keys, stages=2, parts=parts)

    def call(k, v, qkv, positions, turns):
        return attend(qkv, k, v, positions, turns, problem=problem, tiles=tiles)

    qkv, k, v, positions = arrays
    with targeting("gpu"):
        traced = jax.jit(call, donate_argnums=(0, 1)).trace(k, v, qkv, positions, turns)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert kernel_calls(text) == 1
    assert "output_tuple_indices = [1], operand_index = 3" in text
    assert "output_tuple_indices = [2], operand_index = 4" in text


@pytest.mark.parametrize(
    ("programs", "slots", "parts"),
    [(8, 704, 8), (8, 256, 2), (8, 128, 1), (16, 8192, 8), (64, 4096, 2), (256, 4096, 1)],
)
def test_a_sequences_keys_are_shared_as_far_as_processors_and_steps_go(programs, slots, parts):
    assert tiles_for(programs, slots, 132).parts == parts


def test_calls_that_do_not_fit_are_refused():
    (qkv, k, v, positions), turns, problem = draw(CASES["wide"])
    call = lambda *a, **more: decode_attention(*a, problem=problem, **more)  # noqa: E731
    with pytest.raises(ShapeError, match="k and v alike"):
        call(qkv, k, v[:, 1:], positions)
    with pytest.raises(ShapeError, match=r"qkv \(2, '8 \+ 2 x 2', 128\)"):
        call(qkv[:, 1:], k, v, positions)
    with pytest.raises(ShapeError, match=r"positions are \[B\] = \(2,\) integers"):
        call(qkv, k, v, positions.astype(jnp.float32))
    with pytest.raises(ShapeError, match=r"turns are \[B, 2, H\]"):
        call(qkv, k, v, positions, turns=turns[:, :1])
    with pytest.raises(ShapeError, match="k and v alike"):
        call(qkv, k[:1], v[:1], positions)
    with pytest.raises(ShapeError, match=r"a table \[B, W\] and firsts \[B\] of 2 rows"):
        call(qkv, k, v, positions, pages=(jnp.zeros((2, 3), jnp.int32), jnp.zeros(3, jnp.int32)))


@pytest.mark.parametrize(
    ("change", "platform", "reason"),
    [
        ({}, "cpu", "it needs a CUDA device, this is cpu"),
        ({}, "tpu", "there is no kernel for a TPU"),
        ({"dtype": "float32"}, "gpu", "it takes bfloat16 and float16, not float32"),
        ({"width": 96}, "gpu", "it takes heads of 64 or 128, not 96"),
        ({"heads": 18}, "gpu", "up to 8 query heads of a key head, not 9"),
        ({"slots": 8, "paged": True}, "gpu", "pages of 16, 32, 64 or 128 tokens, not 8"),
        ({"slots": 100}, "gpu", "caches of a multiple of 8 slots, not 100"),
        ({"cache": "float16"}, "gpu", "a cache of the queries' dtype, not float16 beside bfloat16"),
    ],
)
def test_what_the_kernel_cannot_serve_is_said(change, platform, reason):
    heads, width = change.get("heads", 8), change.get("width", 64)
    dtype = change.get("dtype", "bfloat16")
    qkv = jax.ShapeDtypeStruct((1, heads + 4, width), dtype)
    cache, paged = (1, change.get("slots", 128), 2, width), change.get("paged", False)
    k = jax.ShapeDtypeStruct(cache, change.get("cache", dtype))
    with targeting(platform):
        with pytest.raises(UnsupportedError, match=reason):
            explain(qkv, k, heads=heads, paged=paged, implementation="mosaic_gpu")
        assert explain(qkv, k, heads=heads, paged=paged).name == "reference"


@pytest.mark.parametrize("name", ["1B, 1 x 512", "MHA, 8 x 1,024"])
def test_what_the_bench_draws_and_times_fits(name):
    case = TIMED[name]
    qkv, k, v, positions, turns = jax.eval_shape(lambda: bench.draw(case))
    assert k.shape == v.shape == (case.sequences, case.slots, case.kv_heads, case.width)
    assert case.position < case.slots and turns.shape == (case.sequences, 2, case.width)
    forms = bench.forms(case)
    assert set(forms) == {"mosaic_gpu", "reference", "cudnn"}
    for name in ("mosaic_gpu", "reference"):
        with targeting("gpu"):
            out, *caches = jax.eval_shape(forms[name], qkv, k, v, positions, turns)
        assert out.shape == (case.sequences, case.heads, case.width)
        assert [cache.shape for cache in caches] == [k.shape, v.shape]
