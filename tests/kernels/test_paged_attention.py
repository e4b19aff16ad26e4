"""Attention over pages: reference, interpreted kernel, lowering, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.errors import ShapeError, UnsupportedError
from pallas_kernels.paged_attention import api, explain, paged_attention
from pallas_kernels.target import targeting
from tests.kernels.paged import CASES, Case, arguments, by_hand, check, options


@pytest.mark.parametrize("name", CASES)
def test_the_reference(name):
    case = CASES[name]
    given = arguments(case, jnp.float32)
    found = paged_attention(*given, **options(case), implementation="reference")
    check(case, found, by_hand(case, *given), jnp.float32)


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("name", CASES)
def test_interpreted(name, splits, monkeypatch):
    """The parts of a sequence, some of them empty, are merged exactly."""
    monkeypatch.setattr(api, "splits_for", lambda *_: splits)
    case = CASES[name]
    given = arguments(case, jnp.bfloat16)
    with targeting("interpreter"):
        found = paged_attention(*given, **options(case), implementation="mosaic_gpu")
    assert found[0].dtype == jnp.bfloat16 and found[1].dtype == jnp.float32
    check(case, found, by_hand(case, *given), jnp.bfloat16)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", CASES)
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


def test_splits_fill_the_device():
    with targeting("gpu"):
        assert api.splits_for(8, 2048) == 8  # one sequence: parts of 256 keys
        assert api.splits_for(256, 2048) == 4
        assert api.splits_for(2048, 131072) == 1


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
        paged_attention(*given, implementation="mosaic")
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
    with pytest.raises(ShapeError, match=r"q \[M, Q, N, H\]"):
        paged_attention(q[0], k, v, table, firsts, blocks)
    with pytest.raises(ShapeError, match="multiple of key heads"):
        paged_attention(q[:, :, :3], k, v, table, firsts, blocks)
    with pytest.raises(ShapeError, match="starts and counts"):
        paged_attention(q[1:], k, v, table, firsts, blocks)
