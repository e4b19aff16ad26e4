"""Attention over pages on TPU: interpreted, lowered, and compiled for TPUs that are not here."""

import dataclasses
import importlib.util
import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from pallas_kernels.errors import UnsupportedError
from pallas_kernels.paged_attention import explain, paged_attention
from pallas_kernels.target import targeting
from tests.kernels.paged import CASES, CODED, Case, arguments, by_hand, check, coded, options
from tests.kernels.tpus import TPUS, described


def wide(case: Case) -> Case:
    """The same with heads of 128, and values of 256 where they had a width of their own."""
    return dataclasses.replace(case, width=128, value_width=256 if case.value_width else None)


WIDE = {name: wide(case) for name, case in CASES.items() if case.latent is None}
QUICK = ("single queries", "multi-query", "parts of a prompt", "window", "soft-cap and scale")
EACH = [x if x in QUICK else pytest.param(x, marks=pytest.mark.slow) for x in WIDE]
LARGE = {
    "decode": Case(blocks=((0, 900, 1), (1, 64, 1)), heads=(32, 8), size=64, table_width=16,
                   width=128),
    "one head each": Case(blocks=((0, 300, 1),), heads=(32, 32), size=64, table_width=8,
                          width=128),
    "parts of prompts": Case(blocks=((0, 100, 32), (1, 0, 32)), queries=32, heads=(32, 8), size=64,
                             table_width=8, width=128),
    "wide heads": Case(blocks=((0, 100, 8),), queries=8, heads=(16, 2), size=128, table_width=4,
                       width=256, window=64),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", EACH)
def test_interpreted(name, dtype):
    case = WIDE[name]
    given = arguments(case, jnp.dtype(dtype))
    with targeting("interpreter"):
        found = paged_attention(*given, **options(case), implementation="mosaic_tpu")
    assert found[0].dtype == dtype and found[1].dtype == jnp.float32
    check(case, found, by_hand(case, *given), jnp.dtype(dtype))


EIGHT = {
    name: dataclasses.replace(WIDE[name], size=128, table_width=3, firsts=(), heads=heads)
    for name, heads in zip(CODED, [(4, 1), (8, 4), (8, 8), (4, 4), (4, 1), (8, 4)], strict=True)
}
"""Cases whose pages of 8 bits the kernel takes."""


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("name", EIGHT)
def test_pages_of_8_bits(name, dtype):
    case = EIGHT[name]
    given, scales, meant = coded(arguments(case, jnp.float32), dtype)
    given = (given[0].astype(jnp.bfloat16), *given[1:])
    with targeting("interpreter"):
        found = paged_attention(*given, **options(case), scales=scales, implementation="mosaic_tpu")
    check(case, found, by_hand(case, given[0], *meant[1:]), jnp.bfloat16)


def lower(case: Case, dtype, sharding=None):
    """A case, lowered for a TPU; in 8 bits its queries are bfloat16."""
    narrow = dtype in ("int8", "float8_e4m3fn")
    given, scales = arguments(case, jnp.bfloat16 if narrow else jnp.dtype(dtype)), None
    if narrow:
        given, scales, _ = coded(given, dtype)

    def call(scales, *given):
        return paged_attention(*given, **options(case), scales=scales, implementation="auto")

    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
    with targeting("tpu"):
        traced = jax.jit(call).trace(*jax.tree.map(like, (scales, *given)))
        return traced.lower(lowering_platforms=("tpu",))


def copies_no_pool(lowered):
    """Compiled, it takes less for itself than half of the pages of keys, or of values."""
    compiled = lowered.compile().memory_analysis()
    assert compiled is not None
    pool = max(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(lowered.in_avals))
    assert compiled.temp_size_in_bytes < pool / 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*WIDE, *LARGE])
def test_lowering(name, dtype):
    assert lower((WIDE | LARGE)[name], dtype).as_text().count("tpu_custom_call") == 1


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("name", EIGHT)
def test_lowering_of_8_bits(name, dtype):
    assert lower(EIGHT[name], dtype).as_text().count("tpu_custom_call") == 1


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize("name", [*QUICK, *LARGE])
@pytest.mark.parametrize("tpu", TPUS)
def test_they_compile_for_every_tpu_and_copy_no_pool(tpu, name, monkeypatch):
    case = dataclasses.replace((WIDE | LARGE)[name], table_width=64)
    device = SingleDeviceSharding(described(tpu, monkeypatch))
    for dtype in ("float32", "bfloat16"):
        copies_no_pool(lower(case, dtype, device))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("tpu", TPUS)
def test_8_bits_compile_for_every_tpu_and_copy_no_pool(tpu, dtype, monkeypatch):
    device = SingleDeviceSharding(described(tpu, monkeypatch))
    for name in ("pages of 32", "coded, window", "coded, parts of a prompt"):
        case = dataclasses.replace(EIGHT[name], table_width=64)
        copies_no_pool(lower(case, dtype, device))


def test_refusals():
    q, k, v, *_ = given = arguments(WIDE["single queries"], jnp.bfloat16)
    with pytest.raises(UnsupportedError, match="needs a TPU, this is cpu"):
        paged_attention(*given, implementation="mosaic_tpu")
    with targeting("tpu"):
        assert explain(q, k, v).name == "mosaic_tpu"
        assert "float32, not float16" in explain(*(x.astype("float16") for x in (q, k, v))).why
        assert "multiple of 128" in explain(q[..., :64], k[..., :64], v[..., :64]).why
        assert "no form for latent keys" in explain(q, k[:, :, :1], 64).why
        small = coded(given, "int8")[0]
        small = (small[0], *(x[:, :, :1] for x in small[1:3]))
        assert "8 bits of a multiple of 128" in explain(*small).why
        odd = jnp.concatenate([k, k[:, :, :1]], axis=2)
        assert "1, 2, 4 or a multiple of 8 heads" in explain(q[:, :, :3], odd, odd).why
        codes = coded(arguments(EIGHT["pages of 64"], jnp.bfloat16), "int8")[0]
        assert "1, 4 or a multiple" in explain(codes[0], *(x[:, :, :2] for x in codes[1:3])).why
        assert "multiple of 8 tokens" in explain(q, k[:, :4], v[:, :4]).why
