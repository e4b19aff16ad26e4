"""Flash attention's backward in one pass, interpreted and lowered on the CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.errors import UnsupportedError
from pallas_kernels.flash_attention import flash_attention, tiles
from pallas_kernels.flash_attention.mosaic_gpu import Tiles
from pallas_kernels.flash_attention.mosaic_gpu_backward import BackwardTiles, backward
from pallas_kernels.flash_attention.problem import Extras, Spec
from pallas_kernels.target import targeting
from tests.kernels.attention import case, errors, failures, interpreted
from tests.kernels.lowered import kernel_calls

WIDE = {"batch": 1, "heads": 2, "kv_heads": 1, "width": 128}
FORWARD = Tiles(block_kv=64)
ONE_PASS = BackwardTiles(one_pass=True, stages=3)
INTERPRETED = {
    "causal": case(66, 130, causal=True, **WIDE),
}
SLOW = {
    "full": case(70, 133, **WIDE),
    "narrow values": case(66, 70, value_width=64, causal=True, **WIDE),
    "everything": case(
        130,
        causal=True,
        window=(70, 0),
        softcap=5.0,
        arrays=("segment_ids", "sinks", "alibi_slopes"),
        **WIDE,
    ),
    "packed": case(200, causal=True, packed=True, arrays=("segment_ids",), **WIDE),
}


@pytest.mark.parametrize("name", INTERPRETED)
def test_gradients_are_as_exact_as_a_plain_form(name: str) -> None:
    one = INTERPRETED[name]
    found = errors(one, jnp.bfloat16, interpreted(FORWARD, ONE_PASS), repeat=False)
    assert failures(one, found) == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_features_in_one_pass(name: str) -> None:
    one = SLOW[name]
    found = errors(one, jnp.bfloat16, interpreted(FORWARD, ONE_PASS), repeat=False)
    assert failures(one, found) == {}


def arguments(width: int, length: int = 512):
    x = jax.ShapeDtypeStruct((1, length, 4, width), jnp.bfloat16)
    lse = jax.ShapeDtypeStruct((1, 4, length), jnp.float32)
    kv = jax.ShapeDtypeStruct((1, length, 2, width), jnp.bfloat16)
    return x, kv, kv, Extras(), (x, lse), (x, lse)


def lowered(tiles: BackwardTiles, width: int = 128) -> str:
    def call(*arrays):
        return backward(*arrays, spec=Spec(scale=0.1, right=0), tiles=tiles)

    with targeting("gpu"):
        traced = jax.jit(call).trace(*arguments(width))
        return traced.lower(lowering_platforms=("cuda",)).as_text()


def test_one_kernel_adds_to_zeros_in_place() -> None:
    text = lowered(ONE_PASS)
    assert kernel_calls(text) == 1
    assert "output_operand_alias<output_tuple_indices = [2], operand_index = 6" in text
    assert kernel_calls(lowered(BackwardTiles())) == 2


def kernels(length: int, **options) -> int:
    """How many kernels the forward and the gradient of heads of 128 are."""
    q, _, v, *_ = arguments(128, length)

    def loss(*qkv):
        out = flash_attention(*qkv, causal=True, **options)
        return jnp.sum(jnp.asarray(out).astype(jnp.float32))

    with targeting("gpu"):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, v, v)
        return kernel_calls(traced.lower(lowering_platforms=("cuda",)).as_text())


def test_heads_of_128_take_one_pass_unless_it_must_be_deterministic() -> None:
    assert kernels(2048) == 2
    assert kernels(2048, deterministic=True) == 3
    assert kernels(1024) == 3


def test_which_widths_take_one_pass() -> None:
    def of(width: int, value_width: int, keys: int = 1025, **more) -> BackwardTiles:
        q, v = ((1, keys, 4, x) for x in (width, value_width))
        return tiles.backward_tiles(q, v, Spec(scale=1.0, **more))

    for widths in ((128, 128), (128, 64)):
        assert of(*widths) == ONE_PASS and not of(*widths, deterministic=True).one_pass
        assert not of(*widths, keys=1024).one_pass
        assert of(*widths, packed=True) == of(*widths, packed=True, deterministic=True)
        assert not of(*widths, packed=True).one_pass
    for widths in ((112, 112), (112, 128), (128, 144), (192, 128), (64, 64)):
        assert of(*widths) == of(*widths, deterministic=True) and not of(*widths).one_pass


def test_a_measured_entry_in_one_pass_is_not_deterministic(monkeypatch) -> None:
    entry = {"device": "", "width": 256, "tiles": {"one_pass": True, "stages": 2}}
    monkeypatch.setattr(tiles, "_table", lambda: {"backward": [entry]})
    of = functools.partial(tiles.backward_tiles, (1, 2048, 4, 128), (1, 2048, 4, 128))
    assert of(Spec(scale=1.0)) == BackwardTiles(one_pass=True, stages=2)
    assert not of(Spec(scale=1.0, deterministic=True)).one_pass


def test_the_reference_ignores_deterministic() -> None:
    qkv = [jnp.asarray(np.random.default_rng(i).standard_normal((1, 9, 2, 8))) for i in range(3)]
    one, other = (flash_attention(*qkv, deterministic=x) for x in (False, True))
    np.testing.assert_array_equal(one, other)


def test_what_one_pass_cannot_serve() -> None:
    with pytest.raises(UnsupportedError, match=r"takes heads of 128 .* not 64 and 64"):
        lowered(BackwardTiles(one_pass=True), 64)
    for other in ("delta", "split", "running"):
        with pytest.raises(UnsupportedError, match="no split, running or delta"):
            lowered(BackwardTiles(one_pass=True, **{other: True}))
