"""Attention over pages: reference, interpreted kernel, lowering, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.errors import ShapeError, UnsupportedError
from pallas_kernels.paged_attention import api, explain, paged_attention
from pallas_kernels.paged_attention.mosaic_gpu import Tiles
from pallas_kernels.target import targeting
from tests.kernels.paged import (
    CASES,
    CODED,
    FLAT,
    Case,
    arguments,
    by_hand,
    check,
    coded,
    flat,
    options,
)

EIGHT = ["int8", "float8_e4m3fn"]


@pytest.mark.parametrize("name", CASES)
def test_the_reference(name):
    case = CASES[name]
    given = arguments(case, jnp.float32)
    found = paged_attention(*given, **options(case), implementation="reference")
    check(case, found, by_hand(case, *given), jnp.float32)


def pairs(names, seconds, often=()):
    """Each name with each of `seconds`; but for the first of these and names of `often` slow."""
    return [
        pytest.param(
            name, one, marks=[] if one == seconds[0] or name in often else pytest.mark.slow
        )
        for name in names
        for one in seconds
    ]


@pytest.mark.parametrize(("name", "splits"), pairs(CASES, [1, 4], ("verified", "latent, verified")))
def test_interpreted(name, splits, monkeypatch):
    """The parts of a sequence, some of them empty, are merged exactly."""
    monkeypatch.setattr(api, "splits_for", lambda *_: splits)
    case = CASES[name]
    given = arguments(case, jnp.bfloat16)
    with targeting("interpreter"):
        found = paged_attention(*given, **options(case), implementation="mosaic_gpu")
    assert found[0].dtype == jnp.bfloat16 and found[1].dtype == jnp.float32
    check(case, found, by_hand(case, *given), jnp.bfloat16)


@pytest.mark.parametrize(
    ("name", "splits"),
    pairs(["verified", "parts of a prompt", "latent, verified", *FLAT], [1, 4], FLAT),
)
def test_all_queries_one_after_another(name, splits, monkeypatch):
    """What a block does not have is not written: it belongs to the next."""
    monkeypatch.setattr(api, "splits_for", lambda *_: splits)
    case = (CASES | FLAT)[name]
    given = arguments(case, jnp.bfloat16)
    wanted = by_hand(case, *given)
    given, of = flat(given)
    more = options(case) | {"queries": case.queries}
    for how in ("reference", "mosaic_gpu"):
        with targeting("interpreter"):
            out, lse = paged_attention(*given, **more, implementation=how)
        assert not np.any(np.asarray(out, np.float32)[-1]) and np.all(np.isneginf(lse[-1]))
        check(case, (out[:-1], lse[:-1]), tuple(x[of] for x in wanted), jnp.bfloat16)


@pytest.mark.parametrize("name", FLAT)
def test_lowering_of_flat_queries(name):
    case = FLAT[name]
    (q, k, v, *pages), _ = flat(arguments(case, jnp.bfloat16))
    call = jax.jit(lambda *a: paged_attention(*a, **options(case), queries=case.queries))
    with targeting("gpu"):
        lowered = call.trace(q, k, v, *pages).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


def test_forms():
    assert api.form_of(128, 1, latent=True) == "latent"
    assert api.form_of(4, 1) == api.form_of(32, 8) == "few"
    assert (api.form_of(33, 1), api.form_of(33, 2)) == ("whole", "parts")


@pytest.mark.parametrize("form", ["parts", "whole"])
@pytest.mark.parametrize("name", ["single queries", "pages of 64"])
def test_a_few_rows_in_the_other_forms(name, form, monkeypatch):
    """Any form serves any call; which one is taken is a matter of time."""
    monkeypatch.setattr(api, "form_of", lambda *_, **__: form)
    monkeypatch.setattr(api, "splits_for", lambda *_: 1)
    case = CASES[name]
    given = arguments(case, jnp.bfloat16)
    with targeting("interpreter"):
        found = paged_attention(*given, **options(case), implementation="mosaic_gpu")
    check(case, found, by_hand(case, *given), jnp.bfloat16)


@pytest.mark.parametrize("tiles", [{"apart": True, "stages": 2}, {"keys": 128, "stages": 2}])
@pytest.mark.parametrize(("name", "dtype"), [("single queries", None), ("pages of 64", "int8")])
def test_other_tiles(name, dtype, tiles, monkeypatch):
    """Interpreted and lowered; any choice gives the same result."""
    monkeypatch.setattr(api, "tiles_for", lambda _, splits, **__: Tiles(splits=splits, **tiles))
    case, scales = CASES[name], None
    given = meant = arguments(case, jnp.bfloat16)
    if dtype is not None:
        given, scales, meant = coded(arguments(case, jnp.float32), dtype)
        given = (given[0].astype(jnp.bfloat16), *given[1:])
    call = jax.jit(lambda scales, *a: paged_attention(*a, **options(case), scales=scales))
    with targeting("interpreter"):
        found = call(scales, *given)
    check(case, found, by_hand(case, given[0], *meant[1:]), jnp.bfloat16)
    with targeting("gpu"):
        lowered = call.trace(scales, *given).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


@pytest.mark.parametrize(("name", "dtype"), pairs(CODED, EIGHT, ("pages of 64",)))
def test_pages_of_8_bits_are_what_their_codes_stand_for(name, dtype):
    """In the reference and in the interpreted kernel; poisoned where nobody wrote."""
    case = CASES[name]
    given, scales, meant = coded(arguments(case, jnp.float32), dtype)
    wanted = by_hand(case, *meant)
    found = paged_attention(*given, **options(case), scales=scales, implementation="reference")
    check(case, found, wanted, jnp.float32)
    narrow = (given[0].astype(jnp.bfloat16), *given[1:])
    wanted = by_hand(case, narrow[0], *meant[1:])
    with targeting("interpreter"):
        found = paged_attention(*narrow, **options(case), scales=scales, implementation="auto")
        assert explain(*narrow[:3]).name == "mosaic_gpu"
    assert found[0].dtype == jnp.bfloat16 and found[1].dtype == jnp.float32
    check(case, found, wanted, jnp.bfloat16)


@pytest.mark.parametrize("dtype", EIGHT)
def test_what_8_bits_cost(dtype):
    """Against float32 pages of the same numbers. int8 rounds by at most 1/254 of a head's largest
    number, fp8 each number by 1/16; a softmax over many keys averages it."""
    case = CASES["pages of 64"]
    exact = arguments(case, jnp.float32)
    given, scales, _ = coded(exact, dtype)
    wanted = np.asarray(paged_attention(*exact, **options(case))[0])
    found = np.asarray(paged_attention(*given, **options(case), scales=scales)[0])
    error = np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2))
    assert 1e-4 < error < {"int8": 0.02, "float8_e4m3fn": 0.05}[dtype]


@pytest.mark.parametrize(("name", "dtype"), pairs(CODED, EIGHT, ("pages of 64",)))
def test_lowering_of_8_bits(name, dtype):
    case = CASES[name]
    given, scales, _ = coded(arguments(case, jnp.bfloat16), dtype)
    call = jax.jit(lambda scales, *given: paged_attention(*given, **options(case), scales=scales))
    with targeting("gpu"):
        lowered = call.trace(scales, *given).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


@pytest.mark.parametrize(
    ("name", "dtype"), pairs(CASES, ["bfloat16", "float16"], ("verified", "window"))
)
def test_lowering(name, dtype):
    case = CASES[name]
    given = arguments(case, jnp.dtype(dtype))
    q, k, v, *pages = given
    call = jax.jit(
        lambda q, k, *pages: paged_attention(q, k, v, *pages, **options(case))
    )  # v may be a number
    with targeting("gpu"):
        lowered = call.trace(q, k, *pages).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


@pytest.mark.parametrize("dtype", ["bfloat16", *EIGHT])
@pytest.mark.parametrize("queries", [1, 32])
def test_lowering_of_parts_and_shares(queries, dtype, monkeypatch):
    """Of the shapes that are timed: 32 heads of 128 over 8 of keys."""
    case = Case(
        blocks=((0, 60, queries),), queries=queries, heads=(32, 8), width=128, size=64,
        table_width=2,
    )  # fmt: skip
    given, scales = arguments(case, jnp.bfloat16), None
    if dtype in EIGHT:
        given, scales, _ = coded(given, dtype)
    for splits in (1, 4):
        monkeypatch.setattr(api, "splits_for", lambda *_, splits=splits: splits)
        call = jax.jit(lambda scales, *a: paged_attention(*a, scales=scales))
        with targeting("gpu"):
            lowered = call.trace(scales, *given).lower(lowering_platforms=("cuda",))
        assert "mosaic_gpu" in lowered.as_text()


def test_splits_fill_the_device():
    with targeting("gpu"):
        assert api.splits_for(8, 2048) == 8  # one sequence: parts of 256 keys
        assert api.splits_for(8, 32768) == 32
        assert [api.splits_for(n, 2048) for n in (64, 128, 256, 2048)] == [4, 2, 1, 1]
        assert api.splits_for(64, 2048, 1) == 2  # a program fills a processor


def test_merging_is_exact():
    random = np.random.default_rng(0)
    scores, values = random.standard_normal((3, 7)), random.standard_normal((3, 7, 5))
    weights = np.exp(scores)
    parts = np.einsum("sk,skv->sv", weights, values) / weights.sum(1)[:, None]
    lse = np.log(weights.sum(1))
    parts, lse = np.append(parts, np.zeros((1, 5)), 0), np.append(lse, -np.inf)
    out, whole = api.merge(jnp.asarray(parts), jnp.asarray(lse))
    wanted = np.einsum("sk,skv->v", weights, values) / weights.sum()
    np.testing.assert_allclose(out, wanted, rtol=1e-5)
    np.testing.assert_allclose(whole, np.log(weights.sum()), rtol=1e-6)
    out, whole = api.merge(jnp.zeros((2, 5)), jnp.full((2,), -jnp.inf))
    assert np.all(np.asarray(out) == 0) and np.isneginf(whole)


def test_refusals():
    given = arguments(CASES["single queries"], jnp.bfloat16)
    q, k, v, table, firsts, blocks = given
    with pytest.raises(UnsupportedError, match="did you mean 'mosaic_gpu'"):
        paged_attention(*given, implementation="mosaic_gp")
    with pytest.raises(UnsupportedError, match="needs a CUDA device, this is cpu"):
        paged_attention(*given, implementation="mosaic_gpu")
    with targeting("gpu"):
        assert explain(q, k, v).name == "mosaic_gpu"
        wide = q.astype(jnp.float32)
        assert "dtype of the queries" in explain(wide, k, v).why
        assert "not float32" in explain(wide, k.astype(jnp.float32), v).why
        odd = arguments(Case(blocks=((0, 3, 1),), width=80), jnp.bfloat16)
        assert "heads of 64" in explain(*odd[:3]).why
        small = arguments(Case(blocks=((0, 3, 1),), size=8), jnp.bfloat16)
        assert "pages of 16" in explain(*small[:3]).why
    with pytest.raises(ShapeError, match=r"q \[M, Q, N, H\] with"):
        paged_attention(q[0], k, v, table, firsts, blocks)
    with pytest.raises(ShapeError, match="the number of queries of a block"):
        paged_attention(q[:, 0], k, v, table, firsts, (*blocks, blocks[0]))
    with pytest.raises(ShapeError, match="4 arrays of blocks"):
        paged_attention(q, k, v, table, firsts, (*blocks, blocks[0]), queries=1)
    with pytest.raises(ShapeError, match=r"pools k \[P, Z, K, H\]"):
        paged_attention(q, k[0], v[0], table, firsts, blocks)
    with pytest.raises(ShapeError, match="multiple of key heads"):
        paged_attention(q[:, :, :3], k, v, table, firsts, blocks)
    with pytest.raises(ShapeError, match="starts and counts"):
        paged_attention(q[1:], k, v, table, firsts, blocks)


def test_refusals_of_8_bits():
    case = CASES["pages of 64"]
    given, scales, _ = coded(arguments(case, jnp.bfloat16), "int8")
    q, k, v, *rest = given
    with pytest.raises(ShapeError, match="come with scales"):
        paged_attention(*given)
    with pytest.raises(ShapeError, match="come with scales"):
        paged_attention(*arguments(case, jnp.bfloat16), scales=scales)
    with pytest.raises(ShapeError, match="come with scales"):
        paged_attention(q, k, v.astype(jnp.bfloat16), *rest, scales=scales)
    with pytest.raises(ShapeError, match=r"scales \[P, K, 2, Z\] are float32"):
        paged_attention(*given, scales=scales[..., :5])
    with targeting("gpu"):
        assert explain(q, k, v).name == "mosaic_gpu"
        assert "queries in bfloat16" in explain(q.astype(jnp.float16), k, v).why
        small, _, _ = coded(arguments(CASES["single queries"], jnp.bfloat16), "int8")
        assert "32, 64 or 128 tokens" in explain(*small[:3]).why
        assert "not in 8 bits" in explain(q, k[:, :, :1], 64).why
