"""Flash attention's backward in one pass, interpreted and lowered on the CPU."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.errors import UnsupportedError
from pallas_kernels.flash_attention.mosaic_gpu import Tiles
from pallas_kernels.flash_attention.mosaic_gpu_backward import BackwardTiles, backward
from pallas_kernels.flash_attention.problem import Extras, Spec
from pallas_kernels.target import targeting
from tests.kernels.attention import case, errors, failures, interpreted

WIDE = {"batch": 1, "heads": 2, "kv_heads": 1, "width": 128}
FORWARD = Tiles(block_kv=64)
INTERPRETED = {
    "causal": (case(66, 130, causal=True, **WIDE), BackwardTiles(one_pass=True)),
    "full": (
        case(70, 133, **WIDE),
        BackwardTiles(one_pass=True, dq_buffers=2, by_heads=True, late=True),
    ),
}
SLOW = {
    "everything": (
        case(
            130,
            causal=True,
            window=(70, 0),
            softcap=5.0,
            arrays=("segment_ids", "sinks"),
            **WIDE,
        ),
        BackwardTiles(one_pass=True, late=True, stages=3),
    ),
}


@pytest.mark.parametrize("name", INTERPRETED)
def test_gradients_are_as_exact_as_a_plain_form(name: str) -> None:
    one, tiles = INTERPRETED[name]
    found = errors(one, jnp.bfloat16, interpreted(FORWARD, tiles), repeat=False)
    assert failures(one, found) == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_features_in_one_pass(name: str) -> None:
    one, tiles = SLOW[name]
    found = errors(one, jnp.bfloat16, interpreted(FORWARD, tiles), repeat=False)
    assert failures(one, found) == {}


def arguments(width: int):
    x = jax.ShapeDtypeStruct((1, 512, 4, width), jnp.bfloat16)
    lse = jax.ShapeDtypeStruct((1, 4, 512), jnp.float32)
    kv = jax.ShapeDtypeStruct((1, 512, 2, width), jnp.bfloat16)
    return x, kv, kv, Extras(), (x, lse), (x, lse)


def lowered(tiles: BackwardTiles, width: int = 128) -> str:
    def call(*arrays):
        return backward(*arrays, spec=Spec(scale=0.1, right=0), tiles=tiles)

    with targeting("gpu"):
        traced = jax.jit(call).trace(*arguments(width))
        return traced.lower(lowering_platforms=("cuda",)).as_text()


def test_one_kernel_adds_to_zeros_in_place() -> None:
    text = lowered(BackwardTiles(one_pass=True))
    assert text.count("custom_call @mosaic_gpu") == 1
    assert "output_operand_alias<output_tuple_indices = [2], operand_index = 6" in text
    assert lowered(BackwardTiles()).count("custom_call @mosaic_gpu") == 2


def test_what_one_pass_cannot_serve() -> None:
    with pytest.raises(UnsupportedError, match=r"takes heads of 128 .* not 64 and 64"):
        lowered(BackwardTiles(one_pass=True), 64)
    for other in ("delta", "split", "running"):
        with pytest.raises(UnsupportedError, match="no split, running or delta"):
            lowered(BackwardTiles(one_pass=True, **{other: True}))
