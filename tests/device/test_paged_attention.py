"""Attention over pages on a Hopper GPU (JAX_PLATFORMS=cuda,cpu; pytest -m gpu tests/device)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention import api, paged_attention
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

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a CUDA device"),
]
LONG = {
    "long and short": Case(
        blocks=((0, 2047, 1), (1, 1, 1), (2, 1023, 1)), size=64, table_width=33, heads=(32, 8)
    ),
    "many queries of a long one": Case(
        blocks=((0, 1000, 32), (0, 1032, 17), (1, 0, 32)), queries=32, size=64, table_width=20,
        heads=(8, 2), width=128,
    ),
    "latent of DeepSeek-V3": Case(
        blocks=((0, 700, 1), (1, 77, 1), (1, 0, 0)), heads=(128, 1), size=64, table_width=12,
        width=576, latent=512,
    ),
    "wide heads": Case(blocks=((0, 300, 1), (1, 77, 1)), size=64, table_width=8, width=256),
}  # fmt: skip
ALL = CASES | FLAT | LONG


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("splits", [None, 1, 4])
@pytest.mark.parametrize("name", [*CASES, *LONG])
def test_cases_are_exact_to_a_rounding_and_the_same_twice(name, splits, dtype, monkeypatch):
    if splits is not None:
        monkeypatch.setattr(api, "splits_for", lambda *_: splits)
    case = ALL[name]
    given = arguments(case, jnp.dtype(dtype))
    static = {"static_argnums": 2} if case.latent else {}
    call = lambda *a: paged_attention(*a, **options(case), implementation="mosaic_gpu")  # noqa: E731
    call = jax.jit(call, **static)
    found, again = call(*given), call(*given)
    check(case, found, by_hand(case, *given), jnp.dtype(dtype))
    for one, other in zip(found, again, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def fits(name: str, dtype: str | None) -> bool:
    """Pages of 8 bits hold no latent keys, and 32 tokens or more."""
    case = ALL[name]
    return dtype is None or not (case.latent or case.size == 16)


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (name, dtype)
        for name in ("parts of a prompt", "many queries of a long one", "latent, verified", *FLAT)
        for dtype in (None, "int8", "float8_e4m3fn")
        if fits(name, dtype)
    ],
)
def test_all_queries_one_after_another(name, splits, dtype, monkeypatch):
    monkeypatch.setattr(api, "splits_for", lambda *_: splits)
    case, scales = ALL[name], None
    given = meant = arguments(case, jnp.bfloat16)
    if dtype is not None:
        given, scales, meant = coded(arguments(case, jnp.float32), dtype)
        given = (given[0].astype(jnp.bfloat16), *given[1:])
    wanted = by_hand(case, given[0], *meant[1:])
    given, of = flat(given)
    more = options(case) | {"implementation": "mosaic_gpu", "queries": case.queries}
    q, k, v, *rest = given
    call = jax.jit(
        lambda q, k, *rest: paged_attention(q, k, v, *rest, scales=scales, **more)
    )  # v may be a number
    out, lse = call(q, k, *rest)
    assert not np.any(np.asarray(out, np.float32)[-1])
    check(case, (out[:-1], lse[:-1]), tuple(x[of] for x in wanted), jnp.bfloat16)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("splits", [None, 1, 4])
@pytest.mark.parametrize("name", [*CODED, "long and short", "wide heads"])
def test_pages_of_8_bits(name, splits, dtype, monkeypatch):
    if splits is not None:
        monkeypatch.setattr(api, "splits_for", lambda *_: splits)
    case = ALL[name]
    given, scales, meant = coded(arguments(case, jnp.float32), dtype)
    given = (given[0].astype(jnp.bfloat16), *given[1:])
    more = options(case) | {"implementation": "mosaic_gpu"}
    call = jax.jit(lambda scales, *a: paged_attention(*a, scales=scales, **more))
    found, again = call(scales, *given), call(scales, *given)
    check(case, found, by_hand(case, given[0], *meant[1:]), jnp.bfloat16)
    for one, other in zip(found, again, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
