"""Flash attention on a Hopper GPU: JAX_PLATFORMS=cuda,cpu python -m pytest -m gpu tests/device."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.flash_attention import tiles
from tests.kernels.attention import FEATURES, LENGTHS, by_name, case, errors, failures

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a CUDA device"),
]


ONE_PASS = [name for name, one in FEATURES.items() if one.one_pass]
PACKED = {"heads": 12, "kv_heads": 4, "packed": True, "causal": True}
# 192 tiles: some programs take several.
MANY_TILES = {
    "packed": case(1024, arrays=("segment_ids",), **PACKED),
    "packed, width 96": case(1000, width=96, arrays=("segment_ids",), **PACKED),
    "packed, everything": case(
        1024,
        window=(300, 0),
        softcap=5.0,
        query_offset=0,
        arrays=("segment_ids", "key_lengths", "sinks", "alibi_slopes"),
        **PACKED,
    ),
}


@pytest.fixture(autouse=True)
def short_rows_go_in_one_pass_too(monkeypatch) -> None:
    monkeypatch.setattr(tiles, "TWO_KERNELS", 0)


@pytest.mark.parametrize("name", FEATURES)
def test_features_are_as_exact_as_a_plain_form(name: str) -> None:
    one = FEATURES[name]
    assert failures(one, errors(one, jnp.bfloat16, by_name("mosaic_gpu"))) == {}


@pytest.mark.parametrize("name", [n for n, one in FEATURES.items() if 64 < one.width <= 128])
def test_features_of_heads_that_share_no_keys(name: str) -> None:
    one = dataclasses.replace(FEATURES[name], kv_heads=FEATURES[name].heads)
    assert failures(one, errors(one, jnp.bfloat16, by_name("mosaic_gpu"))) == {}


@pytest.mark.parametrize("name", [n for n, one in FEATURES.items() if one.width == 128])
def test_features_of_narrow_heads(name: str) -> None:
    one = dataclasses.replace(FEATURES[name], width=64)
    assert failures(one, errors(one, jnp.bfloat16, by_name("mosaic_gpu"))) == {}


@pytest.mark.parametrize("name", MANY_TILES)
def test_programs_of_several_tiles(name: str) -> None:
    one = MANY_TILES[name]
    assert failures(one, errors(one, jnp.bfloat16, by_name("mosaic_gpu"))) == {}


@pytest.mark.parametrize("name", ONE_PASS)
def test_deterministic_they_are_the_same_bits_twice(name: str) -> None:
    one = FEATURES[name].ordered
    assert failures(one, errors(one, jnp.bfloat16, by_name("mosaic_gpu"))) == {}


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(
    ("dtype", "deterministic"), [("bfloat16", False), ("float16", False), ("bfloat16", True)]
)
def test_any_lengths(lengths: tuple[int, int], dtype: str, deterministic: bool) -> None:
    one = case(*lengths, causal=True, deterministic=deterministic)
    assert failures(one, errors(one, jnp.dtype(dtype), by_name("mosaic_gpu"))) == {}
